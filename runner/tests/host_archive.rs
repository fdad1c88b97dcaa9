//! Chooses, fetches and composes a real system out of the archive that this host's apt sources name,
//! as whatever user runs the test, and compares the finished file system with the packages.
//!
//! Needs that archive to be reachable, gpgv and e2fsprogs. The cache is `HOSTLER_CACHE` where that is
//! set, so that a second run shows what a warm one costs.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use hostler_runner::cache::{Cache, FetchOptions, Fetcher};
use hostler_runner::debian::{self, deb};
use hostler_runner::disk;
use hostler_runner::event::Silent;
use hostler_runner::recipe::Recipe;
use hostler_runner::stop::Stop;

/// What the tar headers of a package say about a path.
#[derive(Debug, PartialEq, Eq)]
struct Expected {
    uid: u64,
    gid: u64,
    mode: u32,
    size: Option<u64>,
}

#[test]
fn a_real_system_is_composed_with_the_owners_and_modes_of_its_packages() {
    let scratch = tempfile::tempdir().unwrap();
    let directory =
        std::env::var_os("HOSTLER_CACHE").map_or_else(|| scratch.path().join("cache"), PathBuf::from);
    let recipe =
        Recipe::load(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/debian-12.toml"))).unwrap();
    let cache = Arc::new(Cache::open(&directory).unwrap());
    let fetcher = Fetcher::new(cache, FetchOptions::default()).unwrap();

    let started = Instant::now();
    let selection = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).unwrap();
    let selected = started.elapsed();
    debian::fetch(&selection, &fetcher, &Silent).unwrap();
    let fetched = started.elapsed() - selected;
    let stop = Stop::default();
    let composed =
        disk::compose((&recipe, &selection, None), None, fetcher.cache(), scratch.path(), &stop, &Silent)
            .unwrap();
    let total = started.elapsed();
    println!(
        "select {selected:.1?}, fetch {fetched:.1?}, compose {:.1?}, total {total:.1?}; {} packages, {} bytes, {} paths; {:?}",
        total - selected - fetched,
        selection.packages.len(),
        selection.download_size(),
        composed.paths,
        fetcher.counted()
    );
    let tools = disk::builder_tools(&selection, &fetcher, scratch.path(), &Silent).unwrap();
    for file in [&tools.kernel, &tools.busybox, &tools.modules.join("modules.order")] {
        assert!(file.is_file(), "{} is missing", file.display());
    }
    assert!(composed.preinst.iter().any(|preinst| preinst.package == "base-passwd"));

    // A second look with another tool than the one that set the owners.
    let place = format!("{}?offset={}", composed.image.display(), composed.partition.offset);
    let mut checked = 0;
    let mut special = 0;
    for package in &selection.packages {
        let file = fetcher.cache().get(package.file.digest, package.file.size).unwrap().unwrap();
        let expected = expected_of(file);
        let paths: Vec<&String> = expected.iter().map(|(path, _)| path).collect();
        let found = stat(&place, &paths, scratch.path());
        assert_eq!(found.len(), expected.len(), "{}", package.name);
        for ((path, expected), mut found) in expected.iter().zip(found) {
            // A hard link's header has no size.
            if expected.size.is_none() {
                found.size = None;
            }
            // Directories belong to many packages and the first one counts; here their owner is enough.
            if expected.mode & 0o170_000 == 0o040_000 {
                assert_eq!((expected.uid, expected.gid), (found.uid, found.gid), "{path}");
            } else if !path.starts_with("/etc/") {
                assert_eq!(*expected, found, "{path} of {}", package.name);
            }
            checked += 1;
            special += usize::from(found.gid != 0 || found.mode & 0o7000 != 0);
        }
    }
    println!("{checked} entries checked, {special} of them with other owners or special bits");
    assert!(special > 5);
}

fn expected_of(file: std::fs::File) -> Vec<(String, Expected)> {
    let read = deb::read(file, |_, data| {
        let mut expected = Vec::new();
        for entry in data.entries().map_err(|source| deb::DebError::Archive { source })? {
            let entry = entry.unwrap();
            let header = entry.header();
            let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
            let path = path.trim_start_matches('.').trim_end_matches('/').to_owned();
            let kind = match header.entry_type() {
                tar::EntryType::Directory => 0o040_000,
                tar::EntryType::Symlink => 0o120_000,
                _ => 0o100_000,
            };
            let merged = ["/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"];
            let merged = path.is_empty()
                || merged.iter().any(|name| path == *name || path.starts_with(&format!("{name}/")));
            let path = if merged { format!("/usr{path}") } else { path };
            let is_file = header.entry_type() == tar::EntryType::Regular;
            expected.push((
                path,
                Expected {
                    uid: header.uid().unwrap(),
                    gid: header.gid().unwrap(),
                    mode: kind | header.mode().unwrap() & 0o7777,
                    size: is_file.then(|| entry.size()),
                },
            ));
        }
        Ok::<_, deb::DebError>(expected)
    });
    read.unwrap()
}

fn stat(place: &str, paths: &[&String], scratch: &Path) -> Vec<Expected> {
    let commands: String = paths.iter().map(|path| format!("stat \"{path}\"\n")).collect();
    let script = scratch.join("stat.debugfs");
    std::fs::write(&script, commands).unwrap();
    let output =
        Command::new("/usr/sbin/debugfs").arg("-f").arg(&script).arg(place).env_clear().output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut found = Vec::new();
    let mut kind = 0;
    let mut mode = 0;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["Inode:", _, "Type:", name, "Mode:", bits, ..] => {
                kind = match *name {
                    "directory" => 0o040_000,
                    "symlink" => 0o120_000,
                    _ => 0o100_000,
                };
                mode = u32::from_str_radix(bits, 8).unwrap();
            }
            ["User:", uid, "Group:", gid, .., "Size:", size] => found.push(Expected {
                uid: uid.parse().unwrap(),
                gid: gid.parse().unwrap(),
                mode: kind | mode,
                size: (kind == 0o100_000).then(|| size.parse().unwrap()),
            }),
            _ => {}
        }
    }
    found
}
