//! `make bench` in small: that it works, measures something, and leaves nothing. No time is looked at.

use std::fs;
use std::time::Duration;

use hostler_tests::bench::guardian::Guardian;
use hostler_tests::bench::host::Crowd;
use hostler_tests::bench::stack::{Leak, directories};
use hostler_tests::bench::{Measurement, Sizes};
use hostler_tests::bystander::Bystander;
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::Place;
use hostler_tests::{probe, scenario};

/// Runs one, and wants lines with numbers. That nothing is left is looked for by its scenario.
fn run(measurement: Measurement, lines: usize) {
    let section = measurement.run(&Sizes::SMALL);
    assert_eq!(section.rows.len(), lines, "{section:?}");
    for row in &section.rows {
        let number: f64 = row.own.split(' ').next().and_then(|number| number.parse().ok()).or_fail(&row.own);
        assert!(number >= 0.0 && !row.ratio.contains("NaN") && !row.ratio.contains("inf"), "{row:?}");
    }
    let text = section.markdown();
    assert!(
        text.contains(&section.rows[0].own) && section.notes.iter().all(|note| text.contains(note)),
        "{text}"
    );
}

#[test]
fn one_stack_is_measured() {
    run(Measurement::Reclaim, 2);
}

#[test]
fn many_stacks_are_measured() {
    run(Measurement::Burst, 3);
}

#[test]
fn a_look_is_measured() {
    run(Measurement::Snapshot, 8);
}

#[test]
fn rest_and_an_event_are_measured() {
    run(Measurement::Idle, 4);
}

#[test]
fn a_bench_that_is_killed_leaves_nothing_and_takes_nothing_of_others() {
    scenario::privileged("guardian", |place| {
        let bystanders = Place::new("bystander", place.mounts());
        let bystander = Bystander::new(&bystanders, bystanders.root());
        let guardian = Guardian::of(place);
        let mut leaks: Vec<Leak> =
            directories(place, 2).iter().map(|directory| Leak::unknown(place, directory)).collect();
        let crowd = Crowd::make(place, 5);
        assert!(!place.left().is_empty());

        guardian.leave_it_to_the_guardian();
        wait_until("the end of all that was left", Duration::from_secs(5), || place.left().is_empty());
        assert_eq!(probe::loops_below(place.root()), []);
        assert!(!place.root().exists(), "the directory is still there");
        assert!(place.groups().iter().all(|group| !group.exists()), "a control group is still there");
        bystander.assert_untouched();
        leaks.iter_mut().for_each(Leak::reap);
        // The place has to be there for what looks whether the test left something.
        fs::create_dir(place.root()).or_fail("making the place's directory again");
        drop((leaks, crowd));
    });
}
