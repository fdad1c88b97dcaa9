//! A mirror of only what some packages need is as good as the archive to those who use it: debootstrap makes
//! a system out of it, and apt in that system updates and installs, both with signatures on.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::chown;
use std::process::{Child, Command, Stdio};

use hostler_tests::failure::OrFail;
use hostler_tests::place::{Place, USER};
use hostler_tests::{program, scenario};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A mirror's server; it ends when this is dropped.
pub(super) struct Serving {
    child: Child,
    pub(super) address: String,
}

impl Serving {
    pub(super) fn start(command: Command) -> Self {
        let mut serving = Self::start_saying(command, "serving http://", "/");
        serving.address.insert_str(0, "http://");
        serving
    }

    /// Starts a server that says its address between these two.
    pub(super) fn start_saying(mut command: Command, before: &str, after: &str) -> Self {
        let (reader, writer) = std::io::pipe().or_fail("a pipe");
        let other = writer.try_clone().or_fail("a pipe");
        let child = command.stdin(Stdio::null()).stdout(other).stderr(writer).spawn();
        let child = child.or_fail("starting the server");
        drop(command);
        let mut lines = BufReader::new(reader).lines().map_while(Result::ok);
        let address = lines.find_map(|line| Some(line.split_once(before)?.1.split_once(after)?.0.to_owned()));
        // Nobody is to fail because nobody listens any more.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address: address.or_fail("the address that it serves") }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // One that has ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program of root's with its output in a file of the place.
pub(super) fn succeed(place: &Place, name: &str, command: &mut Command) -> String {
    let path = place.path(name);
    let log = || File::options().create(true).append(true).open(&path).or_fail("opening the log");
    let status = command.stdin(Stdio::null()).stdout(log()).stderr(log()).status();
    let said = fs::read_to_string(&path).unwrap_or_default();
    assert!(status.or_fail(name).success(), "{name} failed:\n{said}");
    said
}

#[test]
fn debootstrap_and_apt_work_from_a_mirror_of_what_they_need() {
    scenario::build("mirror", |place| {
        // Shared by all runs, so that only the first one downloads.
        let root = program::target_directory().join("package-mirror");
        fs::create_dir_all(&root).or_fail("making the mirror's directory");
        chown(&root, Some(USER), Some(USER)).or_fail("giving it to its user");
        let mut sync = place.command(program::path("hostler"));
        sync.args(["mirror", "sync", "debian", "--suite", "bookworm", "--packages", "less", "--into"])
            .arg(&root);
        let said = succeed(place, "sync.log", &mut sync);
        assert!(said.contains(" files, "), "{said}");

        let mut serve = place.command(program::path("hostler"));
        serve.args(["mirror", "serve", "--listen", "127.0.0.1:0"]).arg(&root);
        let serving = Serving::start(serve);

        let target = place.path("target");
        let mut debootstrap = place.command("debootstrap");
        debootstrap
            .args(["--variant=minbase", &format!("--keyring={KEYRING}"), "bookworm"])
            .arg(&target)
            .arg(format!("{}/debian", serving.address));
        let said = succeed(place, "debootstrap.log", &mut debootstrap);
        assert!(said.contains("Valid Release signature"), "{said}");
        assert!(said.contains("Base system installed successfully"), "{said}");

        let sources: String = [
            ("debian", "bookworm"),
            ("debian", "bookworm-updates"),
            ("debian-security", "bookworm-security"),
        ]
        .map(|(folder, suite)| {
            format!("deb [signed-by={KEYRING}] {}/{folder} {suite} main\n", serving.address)
        })
        .concat();
        fs::write(target.join("etc/apt/sources.list"), sources).or_fail("writing the target's sources");
        let mut apt = place.command("chroot");
        apt.arg(&target).args([
            "sh",
            "-ec",
            "apt-get update; apt-get install -y --no-install-recommends less; less --version",
        ]);
        let said = succeed(place, "apt.log", apt.env("DEBIAN_FRONTEND", "noninteractive"));
        assert!(said.contains("Setting up less"), "{said}");
        assert!(!said.contains("NO_PUBKEY") && !said.contains("\nErr:"), "{said}");
        drop(serving);
    });
}
