//! Tools of the host that hang, and an archive that hangs: neither outlasts `hostler`, nor holds it up.
//! No network, no guest, no privileges: the tools are scripts of the test's own.

#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const RECIPE: &str = "kind = \"debian\"\n[image]\nname = \"x\"\nsize = \"256MiB\"\n[debian]\nsource = \"http://127.0.0.1:9/debian\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\npackages = []\n";

fn script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn wait_for<T>(what: &str, mut answer: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = answer() {
            return answer;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a program of that name runs with that argument: its number would be of no use, as it is
/// another one outside of a namespace.
fn runs(program: &str, argument: &str) -> bool {
    let wanted = format!("{program}\0{argument}\0");
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(Result::ok)
        .any(|process| fs::read(process.path().join("cmdline")).is_ok_and(|line| line == wanted.as_bytes()))
}

/// A folder with a `bin` in it, in which there is a qemu that tells its version.
fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    // Started by root, the tools run as another user.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let programs = folder.path().join("bin");
    fs::create_dir(&programs).unwrap();
    script(&programs.join("qemu-system-x86_64"), "echo QEMU emulator version 1.0");
    (folder, programs)
}

#[test]
fn a_doctor_gives_up_an_archive_that_never_answers() {
    let (folder, programs) = folder();
    script(&programs.join("qemu-img"), "echo qemu-img version 1.0");
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", proxy.local_addr().unwrap());
    // It takes connections and keeps them; ends with the test's process.
    std::thread::spawn(move || proxy.incoming().collect::<Vec<_>>());
    let started = Instant::now();
    let told = Command::new(env!("CARGO_BIN_EXE_hostler"))
        .args(["doctor", "--limit", "2s", "--cache", "cache"])
        .current_dir(folder.path())
        .env("PATH", &programs)
        .env("http_proxy", &address)
        .env("https_proxy", &address)
        .env("HOSTLER_SOCKET", "/nonexistent/hostler.sock")
        .output()
        .unwrap();
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(started.elapsed() < Duration::from_secs(20), "{text}");
    assert!(text.contains("was given up: the time for it is over"), "{text}");
    assert!(text.contains("give this more time with --limit"), "{text}");
}

#[test]
fn a_killed_build_leaves_no_tool_running() {
    let (folder, programs) = folder();
    let seconds = format!("600.{}", std::process::id());
    script(&programs.join("qemu-img"), &format!("exec sleep {seconds}"));
    fs::write(folder.path().join("x.toml"), RECIPE).unwrap();
    let mut hostler = Command::new(env!("CARGO_BIN_EXE_hostler"))
        .args(["build", "x.toml", "--output", "out", "--cache", "cache"])
        .current_dir(folder.path())
        .env("PATH", &programs)
        .env("HOSTLER_SOCKET", "/nonexistent/hostler.sock")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the tool", || runs("sleep", &seconds).then_some(()));
    hostler.kill().unwrap();
    hostler.wait().unwrap();
    wait_for("the end of the tool", || (!runs("sleep", &seconds)).then_some(()));
}
