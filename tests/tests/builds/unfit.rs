//! What a host lacks is said before anything is started, with what to do.

use std::ffi::OsString;
use std::fs;
use std::process::Command;

use hostler_tests::failure::OrFail;
use hostler_tests::image_build::{Confined, recipe};
use hostler_tests::place::{Place, USER};
use hostler_tests::program::{self, Ended};
use hostler_tests::scenario;
use nix::mount::{MsFlags, mount};

/// Runs `hostler` with these arguments, as an ordinary user and as root, and wants it to say that the
/// host is not fit, and to leave nothing.
#[track_caller]
fn refused(place: &Place, start: &[OsString], expected: &[&str]) {
    let output = place.directory_of_user("out");
    for of_root in [false, true] {
        let cache = if of_root { place.directory("roots-cache") } else { place.directory_of_user("cache") };
        let hostler = program::path("hostler");
        let mut words: Vec<OsString> = start.to_vec();
        if !of_root {
            let user = USER.to_string();
            words.extend(
                ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "--"].map(OsString::from),
            );
        }
        words.push(hostler.into());
        let run = |words: &[OsString], more: &[&str]| -> Ended {
            let mut command: Command = place.command(&words[0]);
            command.args(&words[1..]).args(more).current_dir(place.path("out"));
            command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock").env("HOSTLER_CACHE", &cache);
            command.env("SUDO_UID", USER.to_string()).env("SUDO_GID", USER.to_string());
            program::finish(&mut command)
        };
        let path = recipe(place, "unfit", "");
        let told = run(&words, &["build", &path.to_string_lossy(), "--output", &output.to_string_lossy()]);
        assert_eq!((told.status, told.stdout.as_str()), (5, ""), "of root: {of_root}: {told:?}");
        for words in expected {
            assert!(told.stderr.contains(words), "of root: {of_root}: {words:?} is not in {}", told.stderr);
        }
        assert!(!told.stderr.contains("select: start"), "{}", told.stderr);
        assert_eq!(fs::read_dir(&output).or_fail("the output directory").count(), 0);
        assert!(Confined::all(place).is_empty());

        // An unreachable archive ends the doctor's look at accelerators, and nothing else.
        let examined = run(&words, &["doctor", "--limit", "1s"]);
        assert_eq!(examined.status, 5, "of root: {of_root}: {examined:?}");
        let unfit = examined.stdout.lines().find(|line| line.starts_with("UNFIT"));
        assert!(unfit.is_some_and(|line| line.contains(expected[0])), "{}", examined.stdout);
        assert!(examined.stdout.contains(expected[1]), "{}", examined.stdout);
    }
}

fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.map(OsString::from).to_vec()
}

#[test]
fn a_host_without_qemu() {
    scenario::privileged("without-qemu", |place| {
        // Only this test's mount namespace loses it.
        let qemu = "/usr/bin/qemu-system-x86_64";
        mount(Some("/dev/null"), qemu, None::<&str>, MsFlags::MS_BIND, None::<&str>).or_fail("hiding qemu");
        let expected =
            ["qemu-system-x86_64 is not installed", "apt-get install --allow-downgrades qemu-system-x86"];
        refused(place, &words(["env"]), &expected);
    });
}

#[test]
fn a_host_without_user_namespaces() {
    scenario::privileged("without-namespaces", |place| {
        // The kernel gives none to a process whose root directory was changed
        // (user_namespaces(7)); everything else is as ever in there.
        let root = place.directory("root");
        let all = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some("/"), &root, None::<&str>, all, None::<&str>)
            .or_fail("another view of the root directory");
        let expected = ["this user may not make user namespaces", "sysctl user.max_user_namespaces=15000"];
        let start: Vec<OsString> = vec!["chroot".into(), root.clone().into(), "env".into()];
        refused(place, &start, &expected);
        nix::mount::umount2(&root, nix::mount::MntFlags::MNT_DETACH).or_fail("taking the view away");
    });
}

#[test]
fn a_directory_with_too_little_space() {
    scenario::privileged("without-space", |place| {
        // An ordinary user's build works in its output directory, root's in its cache.
        for folder in ["out", "roots-cache"] {
            let folder = place.directory(folder);
            mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), Some("size=64m,mode=755"))
                .or_fail("a small file system");
        }
        let expected = ["free in ", "free some space, or choose another directory with --"];
        refused(place, &words(["env"]), &expected);
        for folder in ["out", "roots-cache"] {
            nix::mount::umount2(&place.path(folder), nix::mount::MntFlags::MNT_DETACH).or_fail("unmounting");
        }
    });
}
