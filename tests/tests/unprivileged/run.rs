//! `hostler run` stands between a caller and the command, and neither notices.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hostler_tests::failure::{OrFail, wait_for};
use hostler_tests::program::{self, Ended};
use hostler_tests::{place, probe};
use nix::sys::signal::Signal;

/// Tests that are run in the background, or by CI, have some signals ignored, and what they start
/// inherits that.
fn with_default_signals(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal").arg(program);
    command
}

fn run(arguments: &[&str]) -> Command {
    let mut command = with_default_signals(program::path("hostler"));
    command.args(["run", "--no-watchdog", "--"]).args(arguments);
    command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
    command
}

#[track_caller]
fn ended(arguments: &[&str]) -> Ended {
    program::finish(&mut run(arguments))
}

#[test]
fn the_exit_status_is_the_commands() {
    for status in [0, 1, 2, 42, 126, 255] {
        assert_eq!(ended(&["sh", "-c", &format!("exit {status}")]).status, status);
    }
    let missing = ended(&["no-such-command-here"]);
    assert_eq!(missing.status, 127);
    assert!(missing.stderr.contains("hostler: no-such-command-here: No such file"), "{missing:?}");
    let place = tempfile::tempdir().or_fail("a temporary directory");
    let file = place.path().join("not-executable");
    fs::write(&file, "").or_fail("writing a file");
    assert_eq!(ended(&[&file.to_string_lossy()]).status, 126);
    assert_eq!(ended(&[&place.path().to_string_lossy()]).status, 126);
}

#[test]
fn the_signal_that_ends_the_command_ends_hostler() {
    for (signal, name) in [
        (Signal::SIGKILL, "KILL"),
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGINT, "INT"),
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGABRT, "ABRT"),
        (Signal::SIGSEGV, "SEGV"),
        (Signal::SIGPIPE, "PIPE"),
        (Signal::SIGUSR1, "USR1"),
    ] {
        let ended = ended(&["sh", "-c", &format!("kill -{name} $$; sleep 5")]);
        assert_eq!(ended.signal, Some(signal as i32), "{name}: {ended:?}");
    }
    // As a shell shows it.
    let script = r#""$0" run --no-watchdog -- sh -c 'kill -KILL $$' 2>/dev/null; echo $?"#;
    let shell = program::finish(Command::new("sh").args(["-c", script]).arg(program::path("hostler")));
    assert_eq!(shell.stdout, "137\n");
}

#[test]
fn a_caller_that_ignores_sigchld_is_no_reason_to_hang_and_the_command_ignores_it_as_well() {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", "20", "env", "--ignore-signal=CHLD"]).arg(program::path("hostler"));
    command.args(["run", "--no-watchdog", "--", "grep", "SigIgn", "/proc/self/status"]);
    let ended = program::finish(&mut command);
    assert_eq!(ended.status, 0, "{ended:?}");
    let mask = ended.stdout.trim().rsplit('\t').next().and_then(|mask| u64::from_str_radix(mask, 16).ok());
    let ignored = mask.or_fail("a mask") & 1 << (Signal::SIGCHLD as i32 - 1);
    assert_ne!(ignored, 0, "{ended:?}");
}

/// A command under `hostler` that says when it is ready; killed when it is dropped.
struct Running {
    hostler: Child,
    said: String,
}

impl Running {
    fn start(script: &str) -> Self {
        let mut hostler = run(&["sh", "-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // A group with a parent outside it: in one without, as CI may start the tests in, the
            // kernel stops nobody.
            .process_group(0)
            .spawn()
            .or_fail("starting hostler");
        let stdout = hostler.stdout.as_mut().or_fail("its output");
        let mut said = String::new();
        let mut byte = [0u8];
        while !said.ends_with('\n') {
            assert_eq!(stdout.read(&mut byte).or_fail("reading its output"), 1, "it ended: {said}");
            said.push(byte[0].into());
        }
        Self { hostler, said: said.trim().to_owned() }
    }

    /// What else it says until its end, and its exit status.
    fn finish(mut self) -> (String, Option<i32>) {
        let (status, _) = wait_for("the end of hostler", Duration::from_secs(10), || {
            self.hostler.try_wait().or_fail("waiting for hostler")
        });
        let mut rest = String::new();
        let stdout = self.hostler.stdout.as_mut().or_fail("its output");
        stdout.read_to_string(&mut rest).or_fail("reading its output");
        (rest, status.code())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.hostler.kill();
        let _ = self.hostler.wait();
    }
}

#[test]
fn signals_to_hostler_reach_the_command() {
    for name in ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM", "WINCH", "PWR", "CONT"] {
        let script =
            format!("trap 'echo got {name}; exit 5' {name}; echo ready; while :; do sleep 0.05; done");
        let running = Running::start(&script);
        let signal: Signal = format!("SIG{name}").parse().or_fail("a signal's name");
        place::signal(running.hostler.id(), signal);
        assert_eq!(running.finish(), (format!("got {name}\n"), Some(5)), "{name}");
    }
}

#[test]
fn a_stopped_command_stops_hostler_and_goes_on_with_it() {
    let running = Running::start("echo $$; kill -STOP $$; echo went on; exit 3");
    let pid = running.hostler.id();
    let patience = Duration::from_secs(10);
    wait_for("hostler to stop", patience, || (probe::state(pid) == Some('T')).then_some(()));
    place::signal(pid, Signal::SIGCONT);
    assert_eq!(running.finish(), ("went on\n".to_owned(), Some(3)));
}

#[test]
fn a_stop_that_is_sent_to_hostler_stops_the_command() {
    let running = Running::start("echo $$; while :; do sleep 0.05; done");
    let command: u32 = running.said.parse().or_fail("the command's number");
    place::signal(running.hostler.id(), Signal::SIGTSTP);
    let patience = Duration::from_secs(10);
    wait_for("the command to stop", patience, || (probe::state(command) == Some('T')).then_some(()));
    place::signal(running.hostler.id(), Signal::SIGCONT);
    wait_for("the command to go on", patience, || (probe::state(command) != Some('T')).then_some(()));
    place::signal(running.hostler.id(), Signal::SIGTERM);
    assert_eq!(running.finish(), (String::new(), None));
}

#[test]
fn input_and_output_pass_through_unread() {
    let sent: Vec<u8> = (0..3_000_000u32).map(|index| (index % 251) as u8).collect();
    let mut child = run(&["cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .or_fail("starting hostler");
    let mut stdin = child.stdin.take().or_fail("its input");
    let expected = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent).is_ok());
    let output = child.wait_with_output().or_fail("its output");
    assert!(output.status.success() && writer.join().is_ok_and(|sent| sent));
    assert!(output.stdout == expected, "{} bytes came back", output.stdout.len());
}

#[test]
fn a_reader_that_goes_away_ends_the_command_as_ever() {
    let script = r#""$0" run --no-watchdog -- yes 2>/dev/null | head -n 1"#;
    let ended = program::finish(Command::new("sh").args(["-c", script]).arg(program::path("hostler")));
    assert_eq!((ended.status, ended.stdout.as_str()), (0, "y\n"));
}

#[test]
fn a_command_that_does_not_reset_its_signals_hears_them() {
    // Not by way of a shell: many shells unblock signals for what they start.
    let direct =
        program::finish(with_default_signals("grep").args(["-E", "SigBlk|SigIgn", "/proc/self/status"]));
    assert_eq!(ended(&["grep", "-E", "SigBlk|SigIgn", "/proc/self/status"]).stdout, direct.stdout);
    let mut child = run(&["sleep", "25"]).stderr(Stdio::null()).spawn().or_fail("starting hostler");
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let sleep = |pid: &str| fs::read(format!("/proc/{pid}/comm")).is_ok_and(|name| name == b"sleep\n");
    wait_for("the command", Duration::from_secs(10), || {
        fs::read_to_string(&children).ok()?.split_whitespace().any(sleep).then_some(())
    });
    place::signal(child.id(), Signal::SIGTERM);
    let (status, _) = wait_for("the end of hostler", Duration::from_secs(10), || {
        child.try_wait().or_fail("waiting for hostler")
    });
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(Signal::SIGTERM as i32));
}

#[test]
fn the_command_inherits_what_it_would_have_and_no_more() {
    let script = "pwd; umask; ulimit -c; ulimit -n; env | grep -v ^_= | sort; ls -l /proc/self/fd | wc -l; grep Sig /proc/self/status";
    let place = tempfile::tempdir().or_fail("a temporary directory");
    let set = |command: &mut Command| {
        command
            .current_dir(place.path())
            .env("MARKED", "a value")
            .env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
    };
    let mut direct = with_default_signals("sh");
    set(direct.args(["-c", script]));
    let mut under = run(&["sh", "-c", script]);
    set(&mut under);
    assert_eq!(program::finish(&mut under).succeeded(), program::finish(&mut direct).succeeded());
}

#[test]
fn the_command_is_a_child_of_hostler_in_the_same_group_and_session() {
    let ended = ended(&[
        "sh",
        "-c",
        "ps -o ppid=,pgid=,sid= -p $$; ps -o pid=,pgid=,sid= -p $PPID; ps -o comm= -p $PPID",
    ]);
    let lines: Vec<Vec<&str>> = ended.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], lines[1], "{ended:?}");
    assert_eq!(lines[2], ["hostler"]);
}

#[test]
fn running_without_a_watchdog_is_said_once() {
    let ended = ended(&["sh", "-c", "echo err >&2"]);
    let lines: Vec<&str> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{ended:?}");
    assert!(lines[0].ends_with("running without it: what the command leaves behind stays"), "{ended:?}");
    assert_eq!(lines[1], "err");
}

#[test]
fn when_hostler_is_killed_before_the_command_runs_it_never_does() {
    // The launcher waits for its parent's word; without a parent there is none.
    let launcher =
        program::finish(Command::new(program::path("hostler")).args(["__launch", "1", "", "echo", "it ran"]));
    assert_eq!((launcher.status, launcher.stdout.as_str()), (126, ""));
    assert!(launcher.stderr.contains("the parent is gone"), "{launcher:?}");
}
