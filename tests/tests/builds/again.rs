//! A build that is done again: from the cache alone, with the network gone, with its lock and nothing else.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
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
fn command(place: &Place, command: Command, cache: &Path, arguments: &[&str]) -> Command {
    command_for(place, command, (cache, MORE), arguments)
}

/// The same with more in the recipe.
fn command_for(
    place: &Place,
    mut command: Command,
    (cache, more): (&Path, &str),
    arguments: &[&str],
) -> Command {
    let folder = stand_ins(place, &[("qemu-system-x86_64", PLAYED_QEMU)]);
    command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()));
    command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
    command.arg("build").arg(recipe(place, "again", more)).args(arguments);
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

/// Gives everybody the same text, and ends with the test's process; the address.
fn serve(text: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").or_fail("a port");
    let address = listener.local_addr().or_fail("its address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(stream.try_clone().or_fail("a stream")).lines();
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let length = text.len();
            let answer =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}");
            // A client that went away is served as well.
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    format!("http://{address}/note")
}

#[test]
fn what_no_archive_has_is_in_the_lock_as_unverified_and_comes_again_without_a_network() {
    scenario::build("downloads", |place| {
        let cache = own_cache(place);
        let lock = place.directory_of_user("out").join("x.lock");
        let path = lock.to_str().or_fail("a path");
        let more = format!(
            "{}[[download]]\nname = \"note\"\nurls = [\"{}\"]\n",
            MORE.replace("[guest]\n", "[guest]\nrun = [\"true\"]\n"),
            serve("from far away\n")
        );
        let run = |builder: Command, arguments: &[&str]| {
            let command = command_for(place, builder, (&cache, &more), arguments);
            let mut running = Running::start(place, command);
            (running.finish(LIMIT).code(), running.said())
        };
        let (code, said) = run(place.command_of_user(program::path("hostler")), &["--lock", path]);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("nothing vouches for downloads/note"), "{said}");
        let text = fs::read_to_string(&lock).or_fail("the lock");
        let entry = text.split("[[files]]").find(|entry| entry.contains("\"downloads/note\""));
        assert!(entry.or_fail("the download in the lock").contains("verified = false"), "{text}");

        let mut builder = place.command_of_user("unshare");
        builder.args(["--user", "--map-current-user", "--net"]).arg(program::path("hostler"));
        let (code, said) = run(builder, &["--offline", "--locked", "--lock", path]);
        assert_eq!(code, Some(0), "{said}");
        assert!(!said.contains("nothing vouches"), "{said}");
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
