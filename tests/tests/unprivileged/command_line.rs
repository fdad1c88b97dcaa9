//! Exit statuses, help and messages: scripts rely on them.

use std::fs;
use std::process::Command;

use hostler_tests::failure::OrFail;
use hostler_tests::program::{self, Ended};

fn hostler(arguments: &[&str]) -> Ended {
    let nowhere = "/nonexistent/hostler.sock";
    program::finish(Command::new(program::path("hostler")).args(arguments).env("HOSTLER_SOCKET", nowhere))
}

fn hostlerd(arguments: &[&str]) -> Ended {
    program::finish(Command::new(program::path("hostlerd")).args(arguments))
}

#[test]
fn help_and_version_succeed_on_standard_output() {
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["run", "--help"],
        &["lease", "--help"],
        &["lease", "open", "--help"],
        &["status", "--help"],
        &["why", "--help"],
        &["plan", "--help"],
        &["reclaim", "--help"],
    ] {
        let ended = hostler(arguments);
        assert_eq!((ended.status, ended.stderr.as_str()), (0, ""), "{arguments:?}");
        assert!(!ended.stdout.is_empty(), "{arguments:?}");
    }
    assert!(hostler(&["--help"]).stdout.contains("Exit status: 0 done"));
    assert_eq!(hostlerd(&["--help"]).status, 0);
    assert_eq!(hostlerd(&["--version"]).status, 0);
}

#[test]
fn wrong_usage_is_2_and_says_what_was_wrong() {
    for (arguments, said) in [
        (&["--nonsense"][..], "--nonsense"),
        (&[], "Usage"),
        (&["nonsense"], "nonsense"),
        (&["run"], "<CMD>"),
        (&["run", "--nonsense", "--", "true"], "--nonsense"),
        (&["why"], "<TARGET>"),
        (&["reclaim", "--lease", "x"], "x"),
        (&["reclaim"], "<TARGET|--lease <ID>>"),
        (&["reclaim", "--lease", "1", "/dev/loop0"], "cannot be used with"),
        (&["lease", "close", "12"], "a token is what `hostler lease open` printed"),
        (&["lease", "open", "--owner", "0"], "--owner takes the number of a process"),
    ] {
        let ended = hostler(arguments);
        assert_eq!((ended.status, ended.stdout.as_str()), (2, ""), "{arguments:?}");
        assert!(ended.stderr.contains(said), "{arguments:?}: {}", ended.stderr);
    }
    assert_eq!(hostlerd(&["--nonsense"]).status, 2);
}

#[test]
fn without_a_watchdog_everything_that_needs_it_is_4_and_says_what_to_do() {
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["why", "/dev/loop0"],
        &["plan"],
        &["reclaim", "--lease", "1"],
        &["reclaim", "/dev/loop0"],
        &["lease", "list"],
        &["lease", "open"],
        &["lease", "close", "1:1"],
        &["run", "--", "sh", "-c", "echo it ran"],
    ] {
        let ended = hostler(arguments);
        assert_eq!((ended.status, ended.stdout.as_str()), (4, ""), "{arguments:?}: {ended:?}");
        assert_eq!(
            ended.stderr,
            "hostler: the watchdog is not reachable at /nonexistent/hostler.sock; start hostlerd, or name its socket with --socket or HOSTLER_SOCKET: No such file or directory (os error 2)\n",
            "{arguments:?}"
        );
    }
}

#[test]
fn the_socket_of_the_flag_goes_before_the_environments() {
    let ended = hostler(&["status", "--socket", "/nonexistent/other.sock"]);
    assert!(ended.stderr.contains("at /nonexistent/other.sock;"), "{ended:?}");
}

#[test]
fn a_good_configuration_is_0_and_silent() {
    let place = tempfile::tempdir().or_fail("a temporary directory");
    let file = place.path().join("hostlerd.toml");
    for text in [
        "",
        "[reclaim]\nterm_timeout = \"2s\"\n[limits]\nleases = 7\n",
        "[api]\nsocket = \"/run/x\"\n[metrics]\nlisten = \"[::1]:9821\"\n",
    ] {
        fs::write(&file, text).or_fail("writing a configuration");
        let ended = hostlerd(&["check-config", &file.to_string_lossy()]);
        assert_eq!((ended.status, ended.stdout.as_str(), ended.stderr.as_str()), (0, "", ""), "{text}");
    }
}

#[test]
fn a_bad_configuration_is_2_with_file_line_and_what_is_allowed() {
    let place = tempfile::tempdir().or_fail("a temporary directory");
    let file = place.path().join("hostlerd.toml");
    for (text, said) in [
        (&b"[reclaim]\ngrace = \"1s\"\ngarce = \"1s\"\n"[..], &["line 3", "garce", "`term_timeout`"][..]),
        (b"[reclam]\n", &["line 1", "reclam", "`reclaim`"]),
        (b"[reclaim]\n\ngrace = 5\n", &["line 3", "string"]),
        (b"[reclaim]\ngrace = \"soon\"\n", &["line 2", "\"5s\""]),
        (b"[metrics]\nlisten = \"here\"\n", &["line 2", "socket address"]),
        (b"[sweep]\ninterval = \"1ms\"\n", &["line 2", "\"1s\""]),
        (b"\n[[policy]]\nname = \"x\"\nkind = \"mount\"\nuid = 1\n", &["line 2", "takes mounted_under"]),
        (b"[limits]\nleases = -1\n", &["line 2", "leases"]),
        (b"[api\n", &["line 1"]),
        (b"[api]\nsocket = \"a\"\nsocket = \"b\"\n", &["line 3", "duplicate key"]),
        (b"\xff\xfe", &["UTF-8"]),
    ] {
        fs::write(&file, text).or_fail("writing a configuration");
        let ended = hostlerd(&["check-config", &file.to_string_lossy()]);
        let text = String::from_utf8_lossy(text);
        assert_eq!((ended.status, ended.stdout.as_str()), (2, ""), "{text}: {ended:?}");
        assert!(ended.stderr.contains("hostlerd.toml"), "{text}: {}", ended.stderr);
        for words in said {
            assert!(ended.stderr.contains(words), "{words:?} is not said of {text}: {}", ended.stderr);
        }
    }
    let ended = hostlerd(&["check-config", "/nonexistent/hostlerd.toml"]);
    assert_eq!(ended.status, 2);
    assert!(ended.stderr.contains("reading /nonexistent/hostlerd.toml failed"), "{ended:?}");
    // The daemon itself says the same, before it does anything.
    fs::write(&file, "nonsense = 1\n").or_fail("writing a configuration");
    let ended = hostlerd(&["--config", &file.to_string_lossy()]);
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(ended.stderr.contains("nonsense"), "{ended:?}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let script = r#""$0" --help | head -n 1; "$0" run --help | true"#;
    let ended = program::finish(Command::new("sh").args(["-c", script]).arg(program::path("hostler")));
    assert_eq!((ended.status, ended.stderr.as_str()), (0, ""));
}

#[test]
fn a_watchdog_that_takes_no_connection_is_not_waited_for_for_ever() {
    use std::os::unix::net::{UnixListener, UnixStream};
    let place = tempfile::tempdir().or_fail("a temporary directory");
    let socket = place.path().join("stuck.sock");
    // Nobody accepts, and the queue is full.
    let listener = UnixListener::bind(&socket).or_fail("listening");
    rustix::net::listen(&listener, 0).or_fail("a queue of one");
    let _first = UnixStream::connect(&socket).or_fail("the place in the queue");
    let started = std::time::Instant::now();
    let mut status = Command::new(program::path("hostler"));
    let told = program::finish(status.arg("--socket").arg(&socket).arg("status"));
    assert_eq!(told.status, 4, "{told:?}");
    assert!(started.elapsed() < std::time::Duration::from_secs(20));
}
