//! A disk without space while the cache is filled: a clean failure that names it, nothing wrong or left
//! over, and everything goes on when there is space again.
//!
//! The disk is a small file system in memory, in namespaces of the test's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hostler_runner::cache::Cache;
use hostler_runner::causes::in_one_line;
use hostler_runner::debian;
use hostler_runner::event::Silent;

use super::world::{BIG, World, ask, serve};

/// Of the disk, in KiB: the test's archive takes 1600 of it.
const SIZE: usize = 4096;

/// How much is free, in KiB: nothing, a bit, and so on until all is there.
fn steps() -> Vec<usize> {
    let few = [0, 4, 8, 12, 16, 24, 32, 64];
    few.into_iter().chain((128..2048).step_by(192)).collect()
}

#[test]
fn a_full_disk_is_named_leaves_nothing_and_is_no_matter_when_there_is_space_again() {
    if let Some(disk) = std::env::var_os("HOSTLER_TEST_FULL") {
        return fill(Path::new(&disk));
    }
    let place = tempfile::tempdir().unwrap();
    let script = format!(
        "mount -t tmpfs -o size={SIZE}k none {0} && exec \"$1\" --exact --nocapture full::a_full_disk_is_named_leaves_nothing_and_is_no_matter_when_there_is_space_again",
        place.path().display()
    );
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script, "sh"])
        .arg(std::env::current_exe().unwrap())
        .env("HOSTLER_TEST_FULL", place.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}\n{output:?}");
}

fn fill(disk: &Path) {
    // What is not the cache's lies elsewhere.
    let world = World { directory: tempfile::tempdir_in(disk).unwrap(), ..World::new() };
    let ballast = disk.join("ballast");
    let mut failures = 0;
    for free in steps() {
        let directory = world.directory.path();
        drop(Cache::open(directory).unwrap());
        let fetcher = world.fetcher();
        leave(&ballast, disk, free);
        let built = world.select(&fetcher).map_err(|error| in_one_line(&error)).and_then(|selection| {
            debian::fetch(&selection, &fetcher, &Silent).map_err(|error| in_one_line(&error))
        });
        if let Err(told) = &built {
            failures += 1;
            assert!(told.contains("check its space") && told.contains("No space left on device"), "{told}");
        }
        drop(fetcher);
        assert_nothing_wrong(&world, free);
        // A cache on a full disk can be looked at and made smaller.
        Cache::open(directory).unwrap().shrink(u64::MAX, None).unwrap();

        // The mirror answers with the right bytes or with none.
        fs::remove_file(&ballast).unwrap();
        let fetcher = world.fetcher();
        let (mirror, port) = world.mirror(&fetcher);
        leave(&ballast, disk, free);
        let (status, _, body) = ask(port, "GET", BIG, "");
        let original = world.upstream.state.lock().unwrap().files[BIG].clone();
        assert!(
            status == 200 && body == original || status == 502 && body.is_empty(),
            "{free} KiB: {status}"
        );
        if status == 502 {
            let reason = mirror.report().failures.last().unwrap().reason.clone();
            assert!(reason.contains("No space left on device"), "{reason}");
        }
        assert_nothing_wrong(&world, free);

        // There is space again, for the mirror that is running and for whoever comes.
        fs::remove_file(&ballast).unwrap();
        assert!(ask(port, "GET", BIG, "").2 == original, "{free} KiB");
        drop((mirror, fetcher));
        let fetcher = world.fetcher();
        let selection = world.select(&fetcher).unwrap();
        debian::fetch(&selection, &fetcher, &Silent).unwrap();
        // What is there is read from a disk that is full to the last byte.
        leave(&ballast, disk, 0);
        let again = world.fetcher();
        let (mirror, port) = serve(selection, &again);
        assert!(ask(port, "GET", BIG, "").2 == original, "{free} KiB");
        drop((mirror, fetcher, again));
        fs::remove_file(&ballast).unwrap();
        for name in ["sha256", "metadata", "uses", "partial"] {
            fs::remove_dir_all(directory.join(name)).unwrap();
        }
    }
    let all = steps().len();
    assert!((3..all).contains(&failures), "{failures} of {all} failed: the steps miss what they are for");
}

/// Fills the disk until so many KiB are free.
fn leave(ballast: &Path, disk: &Path, free: usize) {
    let room = rustix::fs::statvfs(disk).unwrap();
    let room = usize::try_from(room.f_bavail * room.f_frsize).unwrap();
    fs::write(ballast, vec![0; room.saturating_sub(free * 1024)]).unwrap();
}

/// Nothing in the cache is wrong, and nothing is left but the beginning of a file that the next one goes on with.
fn assert_nothing_wrong(world: &World, free: usize) {
    assert_eq!(super::kills::wrong(world.directory.path()), Vec::<String>::new(), "{free} KiB");
    // What was broken off because another file failed ends a moment later.
    let deadline = Instant::now() + Duration::from_secs(5);
    while world.kept().1 > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(world.kept().1, 0, "{free} KiB free left something temporary");
    let original = &world.upstream.state.lock().unwrap().files[BIG];
    let is_beginning = |part: PathBuf| fs::read(part).is_ok_and(|part| original.starts_with(&part));
    assert!(world.parts().into_iter().all(is_beginning), "{free} KiB");
}
