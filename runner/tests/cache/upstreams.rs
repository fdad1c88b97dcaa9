//! Two upstreams with the same files, of which the first misbehaves: every byte comes right from the
//! second, and the first is left alone from then on.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use hostler_runner::cache::{Cache, Digest, FetchError, FetchOptions, Fetcher, LeastPace, Wanted};
use hostler_runner::debian;
use hostler_runner::event::Silent;

use super::upstream::{Fault, Upstream, publish};
use super::world::{WEEK, Warnings, World};

/// The first has faults, the second is good.
struct Pair {
    first: Upstream,
    second: Upstream,
    files: Vec<Wanted>,
    contents: Vec<Vec<u8>>,
    fetcher: Fetcher,
    _directory: tempfile::TempDir,
}

impl Pair {
    fn new() -> Self {
        let (first, second) = (Upstream::start(), Upstream::start());
        let mut files = Vec::new();
        let mut contents = Vec::new();
        for number in 0..6_u32 {
            let body: Vec<u8> = (0..100_000 + number).flat_map(u32::to_le_bytes).collect();
            let path = format!("/pool/{number}");
            for upstream in [&first, &second] {
                upstream.state.lock().unwrap().files.insert(path.clone(), body.clone());
            }
            files.push(Wanted {
                name: path.clone(),
                urls: vec![
                    format!("http://{}{path}", first.address),
                    format!("http://{}{path}", second.address),
                ],
                size: Some(body.len() as u64),
                digest: Digest::of(&body),
            });
            contents.push(body);
        }
        let directory = tempfile::tempdir().unwrap();
        let options = FetchOptions {
            least_pace: LeastPace { bytes: 64 << 10, within: Duration::from_millis(400) },
            ..World::options()
        };
        let fetcher = Fetcher::new(Arc::new(Cache::open(directory.path()).unwrap()), options).unwrap();
        Self { first, second, files, contents, fetcher, _directory: directory }
    }

    /// Every file of the first has this fault.
    fn fault(&self, fault: &Fault) {
        for file in &self.files {
            self.first.fault(&file.name, fault.clone());
        }
    }

    /// Fetches all, one after the other; all must be right.
    fn fetch_all(&self) {
        for (file, content) in self.files.iter().zip(&self.contents) {
            assert!(self.fetcher.fetch(file).unwrap() == *content, "{} is wrong", file.name);
        }
    }

    /// How often the first was asked, and what was told of it.
    fn asked_and_told(&self) -> (usize, String) {
        let told = Warnings::default();
        self.fetcher.tell_news(&told);
        (self.first.take_log().len(), told.0.into_inner().unwrap().join("\n"))
    }
}

#[test]
fn one_that_sends_a_flipped_byte_is_dropped_at_once() {
    let pair = Pair::new();
    pair.fault(&Fault::Flipped);
    pair.fetch_all();
    let (asked, told) = pair.asked_and_told();
    assert_eq!(asked, 1);
    assert!(told.contains(&format!("http://{} is asked last", pair.first.address)), "{told}");
    assert!(told.contains("other bytes than the file has"), "{told}");
    assert_eq!(pair.fetcher.counted().upstream_faults, 1);
}

#[test]
fn one_that_hangs_is_dropped_and_the_other_goes_on_in_the_middle() {
    let pair = Pair::new();
    pair.fault(&Fault::Stuck(70_001));
    pair.fetch_all();
    assert_eq!(pair.asked_and_told().0, 1);
    assert_eq!(pair.second.take_log()[0], "/pool/0 bytes=70001-");
}

#[test]
fn one_that_drips_is_dropped_and_the_other_goes_on_in_the_middle() {
    let pair = Pair::new();
    pair.fault(&Fault::Drip(50_000));
    let started = Instant::now();
    pair.fetch_all();
    assert!(started.elapsed() < Duration::from_secs(20), "it was waited for the drip");
    let (asked, told) = pair.asked_and_told();
    assert_eq!(asked, 1);
    assert!(told.contains("too slow"), "{told}");
    let first = pair.second.take_log().remove(0);
    assert!(first.starts_with("/pool/0 bytes=50"), "{first}");
}

#[test]
fn one_that_breaks_off_is_helped_out_and_dropped_when_it_does_so_again_and_again() {
    let pair = Pair::new();
    pair.fault(&Fault::Truncated(1000));
    pair.fetch_all();
    assert_eq!(pair.asked_and_told().0, 3);
    assert_eq!(
        pair.second.take_log()[..4],
        ["/pool/0 bytes=1000-", "/pool/1 bytes=1000-", "/pool/2 bytes=1000-", "/pool/3"]
    );
}

#[test]
fn one_that_lacks_files_or_fails_is_dropped_when_it_does_so_again_and_again() {
    for status in [404, 403, 500, 503] {
        let pair = Pair::new();
        pair.fault(&Fault::Status(status));
        pair.fetch_all();
        assert_eq!(pair.asked_and_told().0, 3, "{status}");
    }
}

#[test]
fn one_with_a_page_to_log_in_is_dropped_before_its_bytes_are_read() {
    let pair = Pair::new();
    pair.fault(&Fault::Other);
    pair.fetch_all();
    assert_eq!(pair.asked_and_told().0, 1);
    let all: usize = pair.contents.iter().map(Vec::len).sum();
    assert_eq!(pair.fetcher.counted().upstream_bytes, all as u64);
}

#[test]
fn one_that_is_away_is_dropped() {
    let mut pair = Pair::new();
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for file in &mut pair.files {
        file.urls[0] = format!("http://{gone}{}", file.name);
    }
    pair.fetch_all();
    let (_, told) = pair.asked_and_told();
    assert!(
        told.contains(&format!("http://{gone} is asked last")) && told.contains("cannot be reached"),
        "{told}"
    );
    assert_eq!(pair.fetcher.counted().upstream_requests, 7);
}

#[test]
fn a_lie_in_the_first_half_is_found_and_the_file_is_asked_for_in_one_piece() {
    let pair = Pair::new();
    // It lies in what it sends before it breaks off, so the halves do not fit.
    let file = &pair.files[0];
    pair.first.state.lock().unwrap().files.get_mut(&file.name).unwrap()[5] ^= 1;
    pair.first.fault(&file.name, Fault::Truncated(1000));
    assert!(pair.fetcher.fetch(file).unwrap() == pair.contents[0]);
    assert_eq!(pair.second.take_log(), ["/pool/0 bytes=1000-", "/pool/0"]);
}

#[test]
fn one_that_cannot_continue_begins_anew() {
    let pair = Pair::new();
    pair.fault(&Fault::Truncated(1000));
    pair.second.fault("/pool/0", Fault::Rangeless);
    pair.fetch_all();
}

#[test]
fn a_dropped_one_is_still_asked_for_what_no_other_has() {
    let pair = Pair::new();
    pair.first.fault("/pool/0", Fault::Flipped);
    pair.second.state.lock().unwrap().files.remove("/pool/3");
    pair.fetch_all();
    assert_eq!(pair.first.take_log(), ["/pool/0", "/pool/3"]);
}

#[test]
fn a_slow_one_that_is_the_only_one_is_waited_for() {
    let mut pair = Pair::new();
    let length = pair.contents[0].len();
    pair.first.fault("/pool/0", Fault::Drip(length - 40));
    pair.files.truncate(1);
    pair.files[0].urls.truncate(1);
    pair.fetch_all();
    assert_eq!(pair.asked_and_told(), (1, String::new()));
}

#[test]
fn when_all_fail_each_is_named_with_its_way() {
    let pair = Pair::new();
    pair.first.fault("/pool/0", Fault::Flipped);
    pair.second.fault("/pool/0", Fault::Status(404));
    let error = pair.fetcher.fetch(&pair.files[0]).unwrap_err();
    assert!(matches!(error, FetchError::Everywhere { .. }), "{error}");
    let told = hostler_runner::causes::in_one_line(&error);
    let first = format!("http://{}: upstream sent an altered /pool/0", pair.first.address);
    assert!(told.contains(&first) && told.contains("answered 404"), "{told}");
}

#[test]
fn a_file_is_the_same_from_whichever_mirror_and_an_old_release_file_of_another_mirror_does_not_win() {
    let world = World::new();
    let fetcher = world.fetcher();
    let newer = world.select(&fetcher).unwrap();
    debian::fetch(&newer, &fetcher, &Silent).unwrap();

    // Another mirror of the same archive, a day behind.
    let other = Upstream::start();
    publish(&other, &world.signer, WEEK, SystemTime::now() - Duration::from_secs(86_400));
    let recipe = World::recipe(&other.url(), &world.signer.keyring());
    let fetcher = world.fetcher();
    let selection = debian::select(&recipe, &fetcher, std::path::Path::new("/"), &Silent).unwrap();
    debian::fetch(&selection, &fetcher, &Silent).unwrap();
    assert_eq!(other.take_log(), ["/debian/dists/bookworm/InRelease"]);
    assert_eq!(fetcher.counted().upstream_bytes, 0);
    let date = |selection: &debian::Selection| selection.repositories[0].suites[0].release.date;
    assert_eq!(date(&selection), date(&newer));
}
