//! Which upstream to ask first, by what each did so far. Pure.
//!
//! An upstream is a host with its scheme and port: what it does with one file, it does with others. One
//! that lies, hangs or drips is dropped at once; one that breaks off, lacks files or fails is dropped when
//! that adds up. A dropped one is asked for what no other has and for nothing else, so the last one left
//! is never lost: whatever it sends is checked.

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

/// What adds up to being dropped.
const LIMIT: u32 = 3;

/// What an upstream did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Fault {
    /// It sent other bytes than the file has.
    Lied,
    /// It sent something that is not what was asked for, or not signed by who should, or old.
    Unusable,
    /// It said nothing for too long.
    Silent,
    /// It sent too little for too long.
    Slow,
    /// It could not be reached.
    Unreachable,
    /// Its certificate was not accepted.
    Untrusted,
    /// It broke off.
    Truncated,
    /// It lacks the file.
    Missing,
    /// It answered that it cannot.
    Failing,
}

impl Fault {
    fn weight(self) -> u32 {
        match self {
            Self::Lied | Self::Unusable | Self::Silent | Self::Slow | Self::Unreachable | Self::Untrusted => {
                LIMIT
            }
            Self::Truncated | Self::Missing | Self::Failing => 1,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Lied => "it sent other bytes than the file has",
            Self::Unusable => "its answer cannot be used",
            Self::Silent => "it hangs",
            Self::Slow => "it is too slow",
            Self::Unreachable => "it cannot be reached",
            Self::Untrusted => "its certificate is not accepted",
            Self::Truncated => "it keeps breaking off",
            Self::Missing => "it lacks files",
            Self::Failing => "it keeps failing",
        })
    }
}

/// The upstream of an address, without the password that it may have.
#[must_use]
pub(super) fn upstream_of(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let host = authority.rsplit('@').next().unwrap_or(authority);
    format!("{scheme}://{host}").to_ascii_lowercase()
}

/// An address without the name and the password that it may have, and without a slash at its end.
#[must_use]
pub fn without_user(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let host = authority.rsplit('@').next().unwrap_or(authority);
    format!("{scheme}://{host}{path}").trim_end_matches('/').to_owned()
}

/// The last part of the path of an address: the folder of an archive.
#[must_use]
pub fn last_part(url: &str) -> &str {
    url.split_once("://")
        .and_then(|(_, rest)| rest.split_once('/'))
        .and_then(|(_, path)| path.trim_end_matches('/').rsplit('/').next())
        .unwrap_or("")
}

/// The mirrors that an environment asks for: `HOSTLER_MIRROR`, addresses with commas between them.
#[must_use]
pub fn mirrors(variable: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let text = variable("HOSTLER_MIRROR").unwrap_or_default();
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

#[derive(Clone, Copy, Debug, Default)]
struct Record {
    faults: u32,
    strikes: u32,
    dropped: bool,
}

/// What each upstream did.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    records: HashMap<String, Record>,
}

impl Ledger {
    /// The places of `urls` in the order in which to ask them: as they come, but what is of dropped
    /// upstreams last.
    pub(super) fn order(&self, urls: &[String]) -> Vec<usize> {
        let (good, dropped): (Vec<usize>, Vec<usize>) =
            (0..urls.len()).partition(|place| !self.is_dropped(&urls[*place]));
        good.into_iter().chain(dropped).collect()
    }

    pub(super) fn is_dropped(&self, url: &str) -> bool {
        self.records.get(&upstream_of(url)).is_some_and(|record| record.dropped)
    }

    /// Is there another upstream for the same file that is not dropped?
    pub(super) fn has_other(&self, url: &str, urls: &[String]) -> bool {
        let own = upstream_of(url);
        urls.iter().any(|other| upstream_of(other) != own && !self.is_dropped(other))
    }

    /// Counts a fault. The upstream, if it is dropped by this.
    pub(super) fn note(&mut self, url: &str, fault: Fault) -> Option<String> {
        let upstream = upstream_of(url);
        let record = self.records.entry(upstream.clone()).or_default();
        record.faults += 1;
        record.strikes = record.strikes.saturating_add(fault.weight());
        let dropped = !record.dropped && record.strikes >= LIMIT;
        record.dropped |= dropped;
        dropped.then_some(upstream)
    }

    /// How many faults there were.
    pub(super) fn faults(&self) -> u64 {
        self.records.values().map(|record| u64::from(record.faults)).sum()
    }
}

/// The least that an upstream has to send, where there is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeastPace {
    /// Bytes.
    pub bytes: u64,
    /// In how much time.
    pub within: Duration,
}

/// Watches the pace of one transfer.
pub(super) struct Pace {
    least: LeastPace,
    since: Instant,
    bytes: u64,
}

impl Pace {
    pub(super) fn new(least: LeastPace, now: Instant) -> Self {
        Self { least, since: now, bytes: 0 }
    }

    /// Takes a piece. Is it too slow?
    pub(super) fn is_too_slow(&mut self, now: Instant, bytes: u64) -> bool {
        self.bytes += bytes;
        if now.saturating_duration_since(self.since) < self.least.within {
            return false;
        }
        let slow = self.bytes < self.least.bytes;
        (self.since, self.bytes) = (now, 0);
        slow
    }
}

/// How many bytes a second came lately.
pub(super) struct Rate {
    since: Instant,
    bytes: u64,
    rate: u64,
}

impl Rate {
    pub(super) fn new(now: Instant, bytes: u64) -> Self {
        Self { since: now, bytes, rate: 0 }
    }

    /// The rate, when this many bytes have come in all; made anew every two seconds.
    pub(super) fn rate(&mut self, now: Instant, bytes: u64) -> u64 {
        let seconds = now.saturating_duration_since(self.since).as_secs_f64();
        let measured = (bytes.saturating_sub(self.bytes) as f64 / seconds.max(0.001)) as u64;
        if seconds >= 2.0 {
            (self.since, self.bytes, self.rate) = (now, bytes, measured);
        }
        if self.rate == 0 { measured } else { self.rate }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls() -> Vec<String> {
        ["http://a.test/1", "http://a.test/2", "http://b.test:80/1"].map(str::to_owned).to_vec()
    }

    #[test]
    fn addresses_are_told_without_passwords() {
        for (url, told) in [
            ("https://me:p@ss@host.test:8443/debian/", "https://host.test:8443/debian"),
            ("http://host.test", "http://host.test"),
            ("http://host.test/a@b", "http://host.test/a@b"),
            ("host.test/a", "host.test/a"),
        ] {
            assert_eq!(without_user(url), told);
        }
    }

    #[test]
    fn a_liar_is_asked_last_from_then_on() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.order(&urls()), [0, 1, 2]);
        assert_eq!(ledger.note("http://a.test/9", Fault::Lied).as_deref(), Some("http://a.test"));
        assert_eq!(ledger.order(&urls()), [2, 0, 1]);
        assert!(!ledger.has_other("http://b.test:80/1", &urls()));
        assert!(ledger.has_other("http://a.test/1", &urls()));
        assert_eq!(ledger.note("http://a.test/1", Fault::Silent), None, "it is dropped once");
    }

    #[test]
    fn small_faults_add_up() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.note("http://a.test/1", Fault::Missing), None);
        assert_eq!(ledger.note("http://a.test/1", Fault::Truncated), None);
        assert_eq!(ledger.order(&urls()), [0, 1, 2]);
        assert!(ledger.note("http://a.test/1", Fault::Failing).is_some());
        assert_eq!(ledger.order(&urls()), [2, 0, 1]);
        assert_eq!(ledger.faults(), 3);
    }

    #[test]
    fn an_upstream_is_a_host_and_its_password_is_no_part_of_it() {
        assert_eq!(upstream_of("https://u:p@Mirror.test:8/x@y"), "https://mirror.test:8");
        assert_eq!(upstream_of("http://mirror.test"), "http://mirror.test");
    }

    #[test]
    fn a_drip_is_too_slow_and_a_pause_after_a_flood_is_not() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let least = LeastPace { bytes: 100, within: Duration::from_secs(10) };
        let mut pace = Pace::new(least, start);
        assert!(!pace.is_too_slow(at(9), 1));
        assert!(pace.is_too_slow(at(10), 1));
        let mut pace = Pace::new(least, start);
        assert!(!pace.is_too_slow(at(1), 1000));
        assert!(!pace.is_too_slow(at(11), 1));
    }

    #[test]
    fn a_rate_is_of_the_last_seconds() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut rate = Rate::new(start, 100);
        assert_eq!(rate.rate(at(1), 150), 50);
        assert_eq!(rate.rate(at(2), 300), 100);
        assert_eq!(rate.rate(at(3), 900), 100);
        assert_eq!(rate.rate(at(4), 300), 0);
    }

    proptest::proptest! {
        #[test]
        fn every_address_stays_in_the_order_once(faults in proptest::collection::vec((0..3_usize, 0..7_usize), 0..20)) {
            let kinds = [
                Fault::Lied, Fault::Silent, Fault::Slow, Fault::Unreachable, Fault::Truncated, Fault::Missing,
                Fault::Failing,
            ];
            let mut ledger = Ledger::default();
            for (place, kind) in faults {
                ledger.note(&urls()[place], kinds[kind]);
            }
            let mut order = ledger.order(&urls());
            order.sort_unstable();
            proptest::prop_assert_eq!(order, [0, 1, 2]);
        }
    }
}
