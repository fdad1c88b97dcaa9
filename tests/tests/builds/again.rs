//! A build that is done again: from the cache alone, with the network gone, with its lock and nothing else.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hostler_tests::builds::{PLAYED_QEMU, Running, own_cache, recipe, shared_cache, stand_ins, users_cache};
use hostler_tests::failure::OrFail;
use hostler_tests::place::Place;
use hostler_tests::{program, scenario};

const MORE: &str = "[guest]\nmemory = \"512MiB\"\n[verify]\nboot = false\n";
const LIMIT: Duration = Duration::from_secs(300);

/// A build with a played machine: what it downloads, chooses and unpacks is real.
fn command(place: &Place, mut command: Command, cache: &Path, arguments: &[&str]) -> Command {
    let folder = stand_ins(place, &[("qemu-system-x86_64", PLAYED_QEMU)]);
    command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()));
    command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
    command.arg("build").arg(recipe(place, "again", MORE)).args(arguments);
    command.arg("--output").arg(place.path("out")).arg("--cache").arg(cache);
    command
}

fn build(place: &Place, cache: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let builder = place.command_of_user(program::path("hostler"));
    let mut running = Running::start(place, command(place, builder, cache, arguments));
    (running.finish(LIMIT).code(), running.said())
}

/// The same where there is no network at all, and no loopback either.
fn build_without_a_network(place: &Place, cache: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let mut builder = place.command_of_user("unshare");
    builder.args(["--user", "--map-current-user", "--net"]).arg(program::path("hostler"));
    let mut running = Running::start(place, command(place, builder, cache, arguments));
    (running.finish(LIMIT).code(), running.said())
}

#[test]
fn a_build_is_done_again_without_a_network_and_with_its_lock() {
    scenario::build("again", |place| {
        let (cache, out) = (own_cache(place), place.directory_of_user("out"));
        let lock = out.join("first.lock");
        let path = lock.to_str().or_fail("a path");
        let (code, said) = build(place, &cache, &["--lock", path]);
        assert_eq!(code, Some(0), "{said}");
        let first = fs::read_to_string(&lock).or_fail("the lock");
        for part in ["name = \"qemu\"", "stage = \"guest\"", "/InRelease\"", "/a/apt/apt_", "linux-image"] {
            assert!(first.contains(part), "{part} is not in the lock:\n{first}");
        }

        let again = out.join("again.lock");
        let (code, said) = build_without_a_network(
            place,
            &cache,
            &["--offline", "--lock", again.to_str().or_fail("a path")],
        );
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("downloaded 0 B of packages and 0 B of release files"), "{said}");
        assert_eq!(fs::read_to_string(&again).or_fail("the lock"), first);

        let (code, said) = build_without_a_network(place, &cache, &["--offline", "--locked", "--lock", path]);
        assert_eq!(code, Some(0), "{said}");
        assert!(!said.contains("warning"), "{said}");

        // One file is taken out of the lock, and one out of the cache.
        let place_in_lock = first.find("/a/apt/apt_").or_fail("apt in the lock");
        let start = first[..place_in_lock].rfind("[[files]]").or_fail("its beginning");
        let end = first[start + 1..].find("[[files]]").map_or(first.len(), |end| start + 1 + end);
        let less = format!("{}{}", &first[..start], &first[end..]);
        fs::write(&lock, less).or_fail("changing the lock");
        let (code, said) = build(place, &cache, &["--locked", "--lock", path]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("the lock does not have pool/") && said.contains("/a/apt/apt_"), "{said}");
        let digest = first[start..].split("sha256 = \"").nth(1).and_then(|rest| rest.get(..64));
        let digest = digest.or_fail("its digest");
        fs::remove_file(cache.join("sha256").join(&digest[..2]).join(digest)).or_fail("losing a file");
        let (code, said) = build(place, &cache, &["--offline"]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("/a/apt/apt_") && said.contains("--offline asks no upstream"), "{said}");
        let (code, said) = build(place, &cache, &["--locked", "--lock", "/nonexistent/lock"]);
        assert_eq!(code, Some(2), "{said}");
    });
}

#[test]
fn roots_lock_goes_where_root_says_and_is_kept_to() {
    scenario::build("again-root", |place| {
        // Filled, and shared with whom root builds as.
        drop(users_cache());
        let cache = shared_cache();
        let lock = place.directory("locks").join("root.lock");
        let path = lock.to_str().or_fail("a path");
        let run = |arguments: &[&str]| {
            let builder = place.command(program::path("hostler"));
            let mut running = Running::start(place, command(place, builder, &cache, arguments));
            (running.finish(LIMIT).code(), running.said())
        };
        let (code, said) = run(&["--lock", path]);
        assert_eq!(code, Some(0), "{said}");
        assert_eq!(fs::metadata(&lock).or_fail("the lock").uid(), 0);
        let names = fs::read_dir(place.path("out")).or_fail("the output").count();
        assert_eq!(names, 6, "image, its documents, digests and log, and no lock");
        let (code, said) = run(&["--locked", "--offline", "--lock", path]);
        assert_eq!(code, Some(0), "{said}");
    });
}
