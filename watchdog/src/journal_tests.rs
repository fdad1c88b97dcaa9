use std::collections::BTreeSet;

use hostler_protocol::lease::Tracking;
use proptest::prelude::*;

use super::*;
use crate::model::{DiskSequence, Phase, ProcessIdentity, StartTime};

fn lease(id: u64) -> Lease {
    Lease {
        id: LeaseId(id),
        epoch: hostler_protocol::lease::Epoch(7),
        name: format!("job {id}"),
        opener: Default::default(),
        uid: 1000,
        owner: ProcessIdentity { pid: 40, start: StartTime(7) },
        tracking: Tracking::Descent,
        cgroup: None,
        owner_inside: false,
        phase: Phase::Open,
        claims: Vec::new(),
        loops: BTreeSet::new(),
        mounts: BTreeSet::new(),
        processes: BTreeSet::new(),
        maps: Default::default(),
        namespaces: Default::default(),
        namespaces_there: None,
        loops_before: DiskSequence(0),
        mounts_before: BTreeSet::new(),
        boot: BootId("a-boot".to_owned()),
        evidence_closed: false,
        owner_handle: None,
        opened_at_ms: 5,
        deadline_ms: None,
    }
}

fn boot() -> BootId {
    BootId("a-boot".to_owned())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
}

fn lease_entry(lease: &Lease) -> Entry {
    Entry::Lease { lease: Box::new(lease.clone()) }
}

#[test]
fn a_restart_finds_the_leases_that_had_not_ended() {
    let place = tempfile::tempdir().expect("a temporary directory");
    let (journal, recovered) = Journal::open(place.path(), &boot()).expect("fresh");
    assert_eq!(recovered, Recovered { next_lease: 1, ..Recovered::default() });
    let mut second = lease(2);
    let append = |entries| runtime().block_on(journal.append(entries)).expect("writable");
    append(vec![lease_entry(&lease(1)), lease_entry(&second)]);
    second.phase = Phase::Over;
    append(vec![lease_entry(&second), Entry::Ended { lease: LeaseId(1) }]);
    drop(journal);
    // The thread ends with the last handle, and with it the lock.
    let reopened = (0..100).find_map(|_| {
        std::thread::sleep(Duration::from_millis(10));
        Journal::open(place.path(), &boot()).ok()
    });
    let (_, recovered) = reopened.expect("the lock is free once the thread ended");
    assert_eq!(recovered.leases.into_values().collect::<Vec<_>>(), [second]);
    assert_eq!(recovered.next_lease, 3);
    assert_eq!(recovered.damaged, Vec::<usize>::new());
}

#[test]
fn its_file_grows_only_when_nobody_waits_and_reads_the_same() {
    let place = tempfile::tempdir().expect("a temporary directory");
    let (journal, _) = Journal::open(place.path(), &boot()).expect("fresh");
    let length = || fs::metadata(place.path().join("journal")).expect("there").len();
    let filled = (0..200).find(|_| {
        std::thread::sleep(Duration::from_millis(10));
        length() >= AHEAD
    });
    assert!(filled.is_some(), "{} bytes", length());
    let before = length();
    let name = "x".repeat(10_000);
    for id in 1..=20 {
        let entries = vec![lease_entry(&Lease { name: name.clone(), ..lease(id) })];
        runtime().block_on(journal.append(entries)).expect("writable");
        assert_eq!(length(), before);
    }
    let bytes = fs::read(place.path().join("journal")).expect("readable");
    let recovered = recover(&bytes);
    assert_eq!((recovered.leases.len(), recovered.damaged), (20, Vec::new()));
    // Whatever of a line was written when the host lost power, the rest of it is empty lines.
    let end = bytes.trim_ascii_end().len();
    let mut torn = bytes.clone();
    torn[end - 5000..end].fill(b'\n');
    let recovered = recover(&torn);
    assert_eq!((recovered.leases.len(), recovered.damaged), (19, vec![21]));
}

#[test]
fn two_daemons_do_not_share_a_journal() {
    let place = tempfile::tempdir().expect("a temporary directory");
    let _first = Journal::open(place.path(), &boot()).expect("fresh");
    assert!(matches!(Journal::open(place.path(), &boot()), Err(JournalError::InUse { .. })));
}

#[test]
fn a_number_is_not_given_again_after_its_lease_ended() {
    let mut bytes = Vec::new();
    write_line(&lease_entry(&lease(9)), &mut bytes).expect("to memory");
    write_line(&Entry::Ended { lease: LeaseId(9) }, &mut bytes).expect("to memory");
    assert_eq!(recover(&bytes).next_lease, 10);
}

#[test]
fn an_altered_line_is_found_and_the_others_count() {
    let mut bytes = Vec::new();
    for id in [1, 2, 3] {
        write_line(&lease_entry(&lease(id)), &mut bytes).expect("to memory");
    }
    let text = String::from_utf8(bytes).expect("text").replace("job 2", "job X");
    let recovered = recover(text.as_bytes());
    assert_eq!(recovered.damaged, [2]);
    assert_eq!(recovered.leases.keys().map(|id| id.0).collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn a_damaged_file_is_kept_aside() {
    let place = tempfile::tempdir().expect("a temporary directory");
    fs::write(place.path().join("journal"), "1 00000000 {}\n").expect("writable");
    let (_, recovered) = Journal::open(place.path(), &boot()).expect("damage is no obstacle");
    assert_eq!(recovered.damaged, [1]);
    let aside = fs::read_to_string(place.path().join("journal.damaged")).expect("kept");
    assert_eq!(aside, "1 00000000 {}\n");
}

proptest! {
    #[test]
    fn a_torn_end_loses_only_the_torn_line(cut in 1usize..200) {
        let mut bytes = Vec::new();
        for id in [1, 2, 3] {
            write_line(&lease_entry(&lease(id)), &mut bytes).expect("to memory");
        }
        let length = bytes.len();
        let mut ends = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(index, _)| index + 1);
        let cut = cut.min(length);
        let kept = length - cut;
        let whole = ends.by_ref().filter(|end| *end <= kept + 1).count();
        bytes.truncate(kept);
        prop_assert_eq!(recover(&bytes).leases.len(), whole);
    }

    #[test]
    fn recovery_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = recover(&bytes);
    }
}

#[test]
fn a_lease_that_was_never_opened_is_known_until_it_has_ended() {
    let place = tempfile::tempdir().expect("a temporary directory");
    let group = |name: &str| PathBuf::from(format!("/groups/{name}"));
    let opening = |lease: u64, name: &str| Entry::Opening { lease: LeaseId(lease), cgroup: group(name) };
    let mut bytes = Vec::new();
    for entry in [
        opening(3, "opened"),
        lease_entry(&lease(3)),
        opening(4, "never"),
        opening(5, "ended"),
        Entry::Ended { lease: LeaseId(5) },
    ] {
        write_line(&entry, &mut bytes).expect("in memory");
    }
    fs::write(place.path().join("journal"), &bytes).expect("writable");
    let unopened = [(LeaseId(4), group("never"))].into_iter().collect();
    assert_eq!(recover(&bytes).unopened, unopened);
    assert_eq!(recover(&bytes).next_lease, 6);
    // Opening a journal writes it anew, and must not lose it.
    let (_, recovered) = Journal::open(place.path(), &boot()).expect("readable");
    assert_eq!(recovered.unopened, unopened);
    let again = fs::read(place.path().join("journal")).expect("written anew");
    assert_eq!((recover(&again).unopened, recover(&again).next_lease), (unopened, 6));
}

#[test]
fn with_much_to_keep_it_is_not_written_anew_for_each_entry() {
    use std::os::unix::fs::MetadataExt;
    let place = tempfile::tempdir().expect("a temporary directory");
    let (journal, _) = Journal::open(place.path(), &boot()).expect("fresh");
    let append = |entries| runtime().block_on(journal.append(entries)).expect("writable");
    let number = || fs::metadata(place.path().join("journal")).expect("there").ino();
    let large = |id| Lease { name: "x".repeat(1024 * 1024), ..lease(id) };
    // More than the size at which what is superseded goes.
    append((1..=6).map(|id| lease_entry(&large(id))).collect());
    append(vec![lease_entry(&lease(7))]);
    let written = number();
    for _ in 0..20 {
        append(vec![lease_entry(&lease(7))]);
        assert_eq!(number(), written);
    }
    // It does not grow without end either.
    for _ in 0..8 {
        append(vec![lease_entry(&large(8))]);
    }
    assert_ne!(number(), written);
}
