//! SIGKILL at random moments while a cache is filled: nothing wrong is in it afterwards, and nothing piles
//! up.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use hostler_runner::cache::{Cache, Digest, FetchOptions, Fetcher, Wanted};
use hostler_runner::event::{Silent, Stage};

use super::upstream::{Fault, Upstream};

/// How often is killed. 200: `make test-cache`.
fn kills() -> u32 {
    std::env::var("HOSTLER_TESTS_KILLS").map_or(12, |text| text.parse().unwrap())
}

fn content(number: u32) -> Vec<u8> {
    (0..20_000 * (1 + number % 5)).flat_map(|word| (word ^ number << 20).to_le_bytes()).collect()
}

/// Files that the first upstream drips, breaks off or alters, each in its way, and the second has.
fn wanted(first: &str, second: &str) -> Vec<Wanted> {
    let describe = |number: u32| {
        let content = content(number);
        Wanted {
            name: format!("/{number}"),
            urls: vec![format!("{first}/{number}"), format!("{second}/{number}")],
            size: Some(content.len() as u64),
            digest: Digest::of(&content),
        }
    };
    (0..24).map(describe).collect()
}

/// What the child does: fills the cache, shrinks it, and fills it again, until it is killed.
fn fill(directory: &Path) {
    let [first, second] =
        ["FIRST", "SECOND"].map(|name| std::env::var(format!("HOSTLER_TEST_{name}")).unwrap());
    loop {
        let cache = Arc::new(Cache::open(directory).unwrap());
        let options = FetchOptions { backoff: Duration::from_millis(5), ..FetchOptions::default() };
        let fetcher = Fetcher::new(Arc::clone(&cache), options).unwrap();
        fetcher.fetch_all(wanted(&first, &second), Stage::Fetch, &Silent).unwrap();
        drop((fetcher, cache));
        Cache::open(directory).unwrap().shrink(200_000, None).unwrap();
    }
}

/// Every file in the cache whose content is not what its name says.
pub(super) fn wrong(directory: &Path) -> Vec<String> {
    let mut wrong = Vec::new();
    for folder in std::fs::read_dir(directory.join("sha256")).unwrap() {
        for file in std::fs::read_dir(folder.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if Digest::of(&std::fs::read(&path).unwrap()).to_string() != name {
                wrong.push(name);
            }
        }
    }
    wrong
}

#[test]
fn a_cache_that_is_killed_at_random_while_it_is_filled_has_nothing_wrong_in_it() {
    if let Some(directory) = std::env::var_os("HOSTLER_TEST_FILLS") {
        return fill(Path::new(&directory));
    }
    let (first, second) = (Upstream::start(), Upstream::start());
    let urls = [&first, &second].map(|upstream| format!("http://{}", upstream.address));
    for one in wanted(&urls[0], &urls[1]) {
        let number: u32 = one.name[1..].parse().unwrap();
        for upstream in [&first, &second] {
            upstream.state.lock().unwrap().files.insert(one.name.clone(), content(number));
        }
        match number % 6 {
            1 => first.fault(&one.name, Fault::Truncated(30_000)),
            2 => second.fault(&one.name, Fault::TruncatedOnce(30_000)),
            4 => first.fault(&one.name, Fault::Status(500)),
            _ => {}
        }
    }
    let directory = tempfile::tempdir().unwrap();
    // The first may be killed before it has made anything.
    drop(Cache::open(directory.path()).unwrap());
    let mut seed = std::process::id();
    for round in 0..kills() {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "kills::a_cache_that_is_killed_at_random_while_it_is_filled_has_nothing_wrong_in_it",
            ])
            .env("HOSTLER_TEST_FILLS", directory.path())
            .env("HOSTLER_TEST_FIRST", &urls[0])
            .env("HOSTLER_TEST_SECOND", &urls[1])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        std::thread::sleep(Duration::from_micros(u64::from(seed >> 8) % 400_000));
        assert_eq!(child.try_wait().unwrap(), None, "round {round}: it ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(wrong(directory.path()), Vec::<String>::new(), "round {round}");
        // The next one takes over, and takes away what the dead one left.
        let cache = Cache::open(directory.path()).unwrap();
        let count = |name: &str| std::fs::read_dir(directory.path().join(name)).unwrap().count();
        assert_eq!(count("temporary"), 0, "round {round}");
        assert_eq!(count("uses"), 0, "round {round}");
        drop(cache);
    }
    // And it is as good as new.
    let options = FetchOptions { backoff: Duration::from_millis(5), ..FetchOptions::default() };
    let fetcher = Fetcher::new(Arc::new(Cache::open(directory.path()).unwrap()), options).unwrap();
    for one in wanted(&urls[0], &urls[1]) {
        assert!(fetcher.fetch(&one).unwrap() == content(one.name[1..].parse().unwrap()), "{}", one.name);
    }
}
