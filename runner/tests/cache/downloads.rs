//! Downloads against an upstream that misbehaves, and against being killed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hostler_runner::cache::{
    Cache, Digest, FetchError, FetchOptions, Fetcher, Proxies, Remembered, Supply, Wanted,
};
use hostler_runner::debian;
use hostler_runner::event::Silent;
use hostler_runner::stop::{Stop, Stopped};

use super::upstream::Fault;
use super::world::{BIG, Warnings, World, ask};

#[test]
fn a_flipped_byte_is_named_and_never_served() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Flipped);
    let error = world.fetch_fails();
    assert!(matches!(error, FetchError::Altered { .. }), "{error}");
    assert!(error.to_string().starts_with("upstream sent an altered pool/big_1+x_amd64.deb"), "{error}");

    let fetcher = world.fetcher();
    let (mirror, port) = world.mirror(&fetcher);
    let (status, _, body) = ask(port, "GET", BIG, "");
    assert_eq!((status, body.len()), (502, 0));
    let report = mirror.stop();
    assert_eq!(report.failures[0].path, BIG);
    assert!(report.failures[0].reason.contains("altered"), "{:?}", report.failures);
}

#[test]
fn a_truncated_file_is_named_and_a_short_break_is_continued() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Truncated(1000));
    let error = world.fetch_fails();
    assert!(matches!(error, FetchError::Truncated { .. }), "{error}");

    world.upstream.fault(BIG, Fault::TruncatedOnce(1000));
    world.upstream.take_log();
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    assert!(world.upstream.take_log().contains(&format!("{BIG} bytes=1000-")));
}

#[test]
fn an_upstream_that_hangs_is_named() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Stuck(1000));
    let error = world.fetch_fails();
    assert!(matches!(error, FetchError::Silent { .. }), "{error}");
}

#[test]
fn a_missing_file_is_named_with_its_status_and_asked_for_once() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Status(404));
    let error = world.fetch_fails();
    assert!(error.to_string().starts_with("upstream answered 404 for pool/big_1+x_amd64.deb"), "{error}");

    let fetcher = world.fetcher();
    let (mirror, port) = world.mirror(&fetcher);
    world.upstream.take_log();
    assert_eq!(ask(port, "GET", BIG, "").0, 502);
    assert_eq!(ask(port, "GET", BIG, "").0, 502);
    assert_eq!(world.upstream.take_log(), [BIG]);
    assert_eq!(mirror.report().failures[0].upstream_status, Some(404));
}

#[test]
fn downloads_end_at_their_deadline() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Stuck(1000));
    // Not what a busy host takes longer for.
    let selection = world.select(&world.fetcher()).unwrap();
    let stop = Stop::default().within(Duration::from_secs(1));
    let idle_timeout = Duration::from_secs(60);
    let fetcher = world.fetcher_with(FetchOptions { stop, idle_timeout, ..World::options() });
    let started = Instant::now();
    let error = debian::fetch(&selection, &fetcher, &Silent).unwrap_err();
    assert_eq!(Stopped::cause_of(&error), Some(Stopped::Late), "{error}");
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_byte_flipped_on_disk_is_found_and_fetched_again() {
    let world = World::new();
    let fetcher = world.fetcher();
    let selection = world.select(&fetcher).unwrap();
    debian::fetch(&selection, &fetcher, &Silent).unwrap();
    let digest =
        selection.packages.iter().find(|package| package.name == "big").unwrap().file.digest.to_string();
    let path = world.directory.path().join("sha256").join(&digest[..2]).join(&digest);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[1234] ^= 1;
    std::fs::write(&path, &bytes).unwrap();

    let fetcher = world.fetcher();
    let (mirror, port) = world.mirror(&fetcher);
    let original = world.upstream.state.lock().unwrap().files[BIG].clone();
    assert!(ask(port, "GET", BIG, "").2 == original);
    assert_eq!(mirror.stop().failures, []);
    assert_eq!(fetcher.counted().damaged, 1);
    assert!(std::fs::read(&path).unwrap() == original);

    // The same while a build fetches: said, and put right.
    std::fs::write(&path, &bytes).unwrap();
    let warnings = Warnings::default();
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &warnings).unwrap();
    assert_eq!(warnings.0.lock().unwrap().len(), 1);
    assert!(std::fs::read(&path).unwrap() == original);
}

#[test]
fn a_second_run_asks_for_no_byte_of_a_package_or_index() {
    let world = World::new();
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    world.upstream.take_log();

    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    assert_eq!(world.upstream.take_log(), ["/debian/dists/bookworm/InRelease"]);
    let counted = fetcher.counted();
    assert_eq!((counted.upstream_bytes, counted.upstream_requests), (0, 1));
    // Over plain HTTP the Release file comes whole: "not modified" would be said of validators, which whoever
    // once stood between may have given to an old one.
    assert!(counted.metadata_bytes > 0);
    assert!(counted.cache_bytes > 1_000_000);
}

#[test]
fn a_cache_goes_on_without_its_upstream() {
    let world = World::new();
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    world.upstream.fault("/debian/dists/bookworm/InRelease", Fault::Status(503));
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    assert_eq!(fetcher.counted().upstream_bytes, 0);
}

#[test]
fn a_proxy_is_asked_with_the_whole_address() {
    let world = World::new();
    let proxies = Proxies { http: Some(format!("http://{}", world.upstream.address)), ..Proxies::default() };
    let fetcher = world.fetcher_with(FetchOptions { proxies, ..World::options() });
    let recipe = World::recipe("http://archive.test/debian", &world.signer.keyring());
    let selection = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).unwrap();
    debian::fetch(&selection, &fetcher, &Silent).unwrap();
    assert!(world.upstream.take_log().contains(&format!("http://archive.test{BIG}")));
}

#[test]
fn what_is_too_large_to_be_an_index_is_not_read_into_memory() {
    let world = World::new();
    let cache = Cache::open(world.directory.path()).unwrap();
    let url = format!("{}/dists/bookworm/InRelease", world.upstream.url());
    // What an import may have brought along.
    let large = vec![b'x'; (32 << 20) + 1];
    let digest = cache.put(&large).unwrap();
    let size = large.len() as u64;
    let remembered =
        Remembered { digest: digest.to_string(), size, etag: None, last_modified: None, policy: None };
    cache.remember(&url, &remembered).unwrap();
    let supply = Supply { lock: None, offline: true };
    let fetcher = world.fetcher_with(FetchOptions { supply, ..World::options() });
    let error = fetcher.metadata("InRelease", std::slice::from_ref(&url)).unwrap_err();
    assert!(matches!(error, FetchError::Offline { .. }), "{error}");

    world.upstream.take_log();
    let wanted = Wanted { name: "index".to_owned(), urls: vec![url], size: Some(1 << 40), digest };
    let error = world.fetcher().fetch(&wanted).unwrap_err();
    assert!(error.to_string().starts_with("index has 1.0 TiB, and an index may have 512.0 MiB"), "{error}");
    assert_eq!(world.upstream.take_log(), Vec::<String>::new());
}

/// Plays both parts: the parent starts this test once more as the one to be killed.
#[test]
fn a_killed_download_leaves_nothing_or_what_the_next_one_goes_on_with() {
    if let Some(directory) = std::env::var_os("HOSTLER_TEST_KILLED_CACHE") {
        let url = std::env::var("HOSTLER_TEST_KILLED_URL").unwrap();
        let keyring = std::env::var_os("HOSTLER_TEST_KILLED_KEYRING").unwrap();
        let cache = Arc::new(Cache::open(Path::new(&directory)).unwrap());
        let fetcher = Fetcher::new(cache, FetchOptions::default()).unwrap();
        let recipe = World::recipe(&url, Path::new(&keyring));
        let selection = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).unwrap();
        drop(debian::fetch(&selection, &fetcher, &Silent));
        return;
    }
    let world = World::new();
    let fetch = || {
        world.upstream.heal();
        world.upstream.take_log();
        let fetcher = world.fetcher();
        assert_eq!(world.kept().1, 0);
        debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
        let digest = Digest::of(&world.upstream.state.lock().unwrap().files[BIG]);
        std::fs::remove_file(world.content(digest)).unwrap();
        assert_eq!(world.parts().len(), 0);
        assert_eq!(fetcher.counted().upstream_faults, 0);
        world.upstream.take_log().into_iter().filter(|asked| asked.starts_with(BIG)).collect::<Vec<_>>()
    };
    // Little is not worth keeping.
    kill_at(&world, 200_000);
    assert_eq!(fetch(), [BIG]);
    kill_at(&world, 1_300_000);
    assert_eq!(fetch(), [format!("{BIG} bytes=1300000-")]);
    // What is wrong on the disk is found when the whole is checked, and no upstream is blamed.
    kill_at(&world, 1_300_000);
    let part = world.parts().remove(0);
    let mut bytes = std::fs::read(&part).unwrap();
    bytes[7] ^= 1;
    std::fs::write(&part, bytes).unwrap();
    assert_eq!(fetch(), [format!("{BIG} bytes=1300000-"), BIG.to_owned()]);
    // It was killed after the last byte.
    let whole = world.upstream.state.lock().unwrap().files[BIG].clone();
    std::fs::write(world.directory.path().join("partial").join(Digest::of(&whole).to_string()), whole)
        .unwrap();
    assert_eq!(fetch(), Vec::<String>::new());
}

/// Starts a process that downloads, and kills it when it has so many bytes.
fn kill_at(world: &World, bytes: usize) {
    let mut child = start_download(world, bytes);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Starts a process that downloads, and waits until it has so many bytes; more do not come.
fn start_download(world: &World, bytes: usize) -> Child {
    world.upstream.fault(BIG, Fault::Stuck(bytes));
    drop(Cache::open(world.directory.path()).unwrap());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "downloads::a_killed_download_leaves_nothing_or_what_the_next_one_goes_on_with"])
        .env("HOSTLER_TEST_KILLED_CACHE", world.directory.path())
        .env("HOSTLER_TEST_KILLED_URL", world.upstream.url())
        .env("HOSTLER_TEST_KILLED_KEYRING", world.signer.keyring())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let is_there = || {
        let sizes = world.parts().into_iter().filter_map(|path| Some(path.metadata().ok()?.len()));
        sizes.max() == Some(bytes as u64)
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_there() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    if !is_there() {
        child.kill().unwrap();
        child.wait().unwrap();
        panic!("the download never came so far");
    }
    child
}

#[test]
fn a_process_that_is_stopped_in_a_download_stops_no_other() {
    let world = World::new();
    let mut child = start_download(&world, 1_300_000);
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
    world.upstream.heal();
    world.upstream.take_log();
    let patience = Duration::from_millis(700);
    let stop = Stop::default().within(Duration::from_secs(30));
    let fetcher = world.fetcher_with(FetchOptions { patience, stop, ..World::options() });
    let told = Warnings::default();
    let fetched = debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &told);
    child.kill().unwrap();
    child.wait().unwrap();
    fetched.unwrap();
    // What the other has begun is its own as long as it lives.
    assert!(world.upstream.take_log().contains(&BIG.to_owned()));
    let told = told.0.into_inner().unwrap().join("\n");
    assert!(told.contains("has not gone on for 700ms"), "{told}");
}

#[test]
fn a_download_that_failed_for_lack_of_an_upstream_is_gone_on_with() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Truncated(1_500_000));
    let fetcher = world.fetcher_with(FetchOptions { attempts: 1, ..World::options() });
    let error = debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap_err();
    assert!(matches!(error, FetchError::Truncated { .. }), "{error}");
    world.upstream.heal();
    world.upstream.take_log();
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    assert!(world.upstream.take_log().contains(&format!("{BIG} bytes=1500000-")));
    assert_eq!(world.parts().len(), 0);
}
