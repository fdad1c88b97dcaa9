//! How `hostlerd` starts, refuses to start, and takes new settings.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::patience::stretched;
use hostler_tests::place::{Place, kill, signal};
use hostler_tests::{probe, program, scenario};
use nix::sys::signal::Signal;

fn hostlerd(place: &Place, arguments: &[&str]) -> program::Ended {
    program::finish(place.command(program::path("hostlerd")).args(arguments))
}

#[test]
fn it_says_what_it_needs_and_starts_nothing_without_it() {
    scenario::privileged("unfit", |place| {
        let configuration = place.path("hostlerd.toml");
        let text = format!(
            "[api]\nsocket = {:?}\n[state]\ndirectory = {:?}\n",
            place.path("hostler.sock"),
            place.path("state")
        );
        fs::write(&configuration, text).or_fail("writing a configuration");
        let configuration = configuration.to_string_lossy().into_owned();
        // Not the host's mounts: what it unmounted here would stay mounted there.
        let ended = hostlerd(place, &["--config", &configuration]);
        assert_eq!(ended.status, 5, "{ended:?}");
        // Some sandboxes hide even from root which namespace the first process is in.
        let known = ended.stderr.contains("hostlerd runs in mount namespace");
        let unknown = ended.stderr.contains("mount namespace cannot be told");
        assert!((known || unknown) && ended.stderr.contains("pass --own-mount-namespace"), "{ended:?}");
        let mut as_user = place.command_of_user(program::path("hostlerd"));
        let ended = program::finish(as_user.args(["--config", &configuration, "--own-mount-namespace"]));
        assert_eq!(ended.status, 5, "{ended:?}");
        assert!(ended.stderr.contains("hostlerd needs root's privileges"), "{ended:?}");
        assert!(!place.path("state").exists() && !place.path("hostler.sock").exists());
        let text = format!(
            "[api]\nsocket = {:?}\ngroup = \"no-such-group\"\n[state]\ndirectory = {:?}\n",
            place.path("hostler.sock"),
            place.path("state")
        );
        fs::write(&configuration, text).or_fail("writing a configuration");
        let ended = hostlerd(place, &["--config", &configuration, "--own-mount-namespace"]);
        assert_eq!(ended.status, 2, "{ended:?}");
        assert!(ended.stderr.contains("there is no group no-such-group"), "{ended:?}");
    });
}

#[test]
fn two_do_not_share_a_state_or_a_socket() {
    scenario::privileged("two", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let first = place.path("hostlerd.toml").to_string_lossy().into_owned();
        let ended = hostlerd(place, &["--config", &first, "--own-mount-namespace"]);
        assert_eq!(ended.status, 5, "{ended:?}");
        assert!(ended.stderr.contains("is in use by another hostlerd"), "{ended:?}");
        let second = place.path("second.toml");
        let text = format!(
            "[api]\nsocket = {:?}\n[state]\ndirectory = {:?}\n",
            daemon.socket(),
            place.path("other-state")
        );
        fs::write(&second, text).or_fail("writing a configuration");
        let ended = hostlerd(place, &["--config", &second.to_string_lossy(), "--own-mount-namespace"]);
        assert_eq!(ended.status, 5, "{ended:?}");
        assert!(ended.stderr.contains("listening on"), "{ended:?}");
        // The first one is as it was.
        daemon.ask(&["status"]).succeeded();
    });
}

#[test]
fn it_takes_new_settings_on_sighup_and_keeps_the_old_ones_when_they_are_wrong() {
    scenario::privileged("reload", |place| {
        let claim = place.directory("claim");
        let daemon = Daemon::start(place, &Settings { term_timeout: "20s", ..Settings::default() });
        let file = place.path("hostlerd.toml");
        let text = fs::read_to_string(&file).or_fail("the configuration");
        let reload = |text: &str, said: &str| {
            fs::write(&file, text).or_fail("writing the configuration");
            signal(daemon.pid(), Signal::SIGHUP);
            wait_until(said, Duration::from_secs(5), || daemon.log().contains(said));
        };
        reload(&text.replace("20s", "100ms"), "the configuration was read again");
        reload("nonsense = 1\n", "the configuration stays as it was");
        let script = "trap '' TERM; echo $$ > shell; while :; do sleep 0.1; done";
        let mut hostler = daemon
            .run_script("deaf", &claim, script)
            .stdout(Stdio::null())
            .spawn()
            .or_fail("starting hostler");
        let shell = probe::pid_from(&claim.join("shell"));
        let killed = Instant::now();
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        daemon.wait_for_end("deaf", Duration::from_secs(10));
        assert!(!shell.runs());
        assert!(killed.elapsed() < Duration::from_secs(20), "the old term_timeout was used");
    });
}

#[test]
fn its_socket_is_open_to_all_or_to_a_group() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    scenario::privileged("socket", |place| {
        let mut daemon = Daemon::start(place, &Settings::default());
        let mode = |path| fs::metadata(path).or_fail("the socket").permissions().mode() & 0o777;
        assert_eq!(mode(daemon.socket()), 0o666);
        let private = fs::metadata(place.path("state/journal")).or_fail("the journal").permissions().mode();
        assert_eq!(private & 0o022, 0, "others may write to the journal: {private:o}");
        daemon.stop();
        let file = place.path("hostlerd.toml");
        let text = fs::read_to_string(&file).or_fail("the configuration");
        fs::write(&file, text.replace("[state]", "group = \"daemon\"\n[state]")).or_fail("the configuration");
        daemon.start_again();
        let metadata = fs::metadata(daemon.socket()).or_fail("the socket");
        assert_eq!((mode(daemon.socket()), metadata.uid()), (0o660, 0));
        assert_ne!(metadata.gid(), 0);
        let refused = program::finish(&mut daemon.hostler_of_user(&["status"]));
        assert_eq!(refused.status, 4, "{refused:?}");
        assert!(refused.stderr.contains("Permission denied"), "{refused:?}");
    });
}

#[test]
fn systemd_hands_it_its_socket_and_is_told_when_it_is_ready() {
    scenario::privileged("activated", |place| {
        let notify = place.path("notify.sock");
        let told = std::os::unix::net::UnixDatagram::bind(&notify).or_fail("a socket to be told on");
        told.set_read_timeout(Some(stretched(Duration::from_secs(10)))).or_fail("setting a timeout");
        let configuration = place.path("hostlerd.toml");
        let text = format!("[state]\ndirectory = {:?}\n", place.path("state"));
        fs::write(&configuration, text).or_fail("writing a configuration");
        let socket = place.path("activated.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).or_fail("a socket to hand over");
        // Descriptor 3 and the process's own number, as sd_listen_fds(3) wants them.
        let start =
            r#"LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" --config "$1" --own-mount-namespace 3<&0 </dev/null"#;
        let mut child = place
            .command("sh")
            .args(["-c", start])
            .arg(program::path("hostlerd"))
            .arg(&configuration)
            .env("NOTIFY_SOCKET", &notify)
            .env_remove("JOURNAL_STREAM")
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
            .stderr(Stdio::null())
            .spawn()
            .or_fail("starting hostlerd");
        let mut said = String::new();
        let mut buffer = [0u8; 4096];
        while !said.contains("READY=1") {
            let length = told.recv(&mut buffer).or_fail("being told");
            said.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        let mut ask = Command::new(program::path("hostler"));
        program::finish(ask.args(["status", "--socket"]).arg(&socket)).succeeded();
        signal(child.id(), Signal::SIGTERM);
        assert!(child.wait().or_fail("waiting for hostlerd").success());
        assert!(socket.exists(), "the socket is systemd's, and stays");
    });
}
