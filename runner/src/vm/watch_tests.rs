use proptest::prelude::*;

use super::*;
use crate::signs::{Place, Rules, prompt};
use crate::vm::console::Console;

const LIMITS: Limits = Limits {
    total: Duration::from_secs(160),
    used: Duration::from_secs(60),
    no_progress: Duration::from_secs(10),
};

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn watch() -> Watch {
    Watch::new("5fe7".into(), LIMITS)
}

fn class(outcome: Option<Outcome>) -> &'static str {
    match outcome {
        None => "running",
        Some(Outcome::Proven) => "proven",
        Some(Outcome::Failed(failure)) => failure.class().name(),
    }
}

fn done(nonce: &str) -> Seen {
    Seen::Control(Message::Done(nonce.into()))
}

fn failed(step: &str) -> Seen {
    Seen::Control(Message::Failed { step: step.into(), status: 1 })
}

fn finding(place: Place, text: &str) -> Finding {
    Rules::builtin().find(place, text).unwrap()
}

fn full() -> Finding {
    finding(Place::Line, "No space left on device")
}

fn panic() -> Seen {
    Seen::Sign(finding(Place::Line, "[ 1.0] Kernel panic - not syncing: x"))
}

/// A look at a screen that shows this, with the cursor behind it.
fn screen(is_new: bool, text: &str) -> Seen {
    let finding = Rules::builtin().find(Place::Screen, text);
    Seen::Screen(ScreenSeen { is_new, finding, prompt: prompt(text).map(str::to_owned) })
}

#[test]
fn the_right_nonce_is_success() {
    assert_eq!(watch().see(at(1), done("5fe7")), Some(Outcome::Proven));
}

#[test]
fn another_nonce_is_no_proof_and_stays_so() {
    let mut watch = watch();
    assert_eq!(class(watch.see(at(1), done("5fe8"))), "no_proof");
    assert_eq!(class(watch.see(at(2), done("5fe7"))), "no_proof");
}

#[test]
fn an_end_of_qemu_is_never_success() {
    let ended = Seen::QemuEnded("exit status: 0".into());
    assert_eq!(class(watch().see(at(1), ended)), "qemu_died");
}

#[test]
fn a_failed_step_outlives_the_machines_end_and_a_late_proof() {
    let mut watch = watch();
    assert_eq!(watch.see(at(1), Seen::Sign(full())), None);
    assert_eq!(watch.see(at(2), failed("configure")), None);
    assert_eq!(watch.see(at(2), failed("later")), None);
    assert_eq!(
        watch.see(at(3), Seen::QemuEnded("exit status: 0".into())),
        Some(Outcome::Failed(Failure::StepFailed {
            step: "configure".into(),
            status: 1,
            because: Because { sign: Some(Box::new(full())), refused: None }
        }))
    );
    let mut other = self::watch();
    other.see(at(2), failed("configure"));
    assert_eq!(class(other.see(at(3), done("5fe7"))), "step_failed");
}

#[test]
fn a_guest_that_failed_and_lingers_is_ended_as_failed() {
    let mut watch = Watch::new(
        "5fe7".into(),
        Limits { no_progress: Duration::from_secs(1000), total: Duration::from_secs(1000), ..LIMITS },
    );
    watch.see(at(5), failed("configure"));
    assert_eq!(watch.deadline(), at(25));
    assert_eq!(class(watch.look(at(24))), "running");
    assert_eq!(class(watch.look(at(25))), "step_failed");
}

#[test]
fn a_panic_ends_at_once() {
    assert_eq!(class(watch().see(at(1), panic())), "kernel_panic");
}

#[test]
fn a_guest_that_switches_itself_off_gave_no_proof() {
    let mut watch = watch();
    assert_eq!(watch.see(at(1), Seen::GuestEnded), None);
    assert_eq!(class(watch.see(at(2), Seen::QemuEnded("exit status: 0".into()))), "no_proof");
}

#[test]
fn every_source_of_progress_moves_the_deadline() {
    let sources = [
        screen(true, "Setting up less"),
        Seen::CacheBytes(1),
        Seen::Blocks(BlockTotals { operations: 1, ..BlockTotals::default() }),
        Seen::Control(Message::Stage("x".into())),
    ];
    for seen in sources {
        let mut watch = watch();
        assert_eq!(watch.deadline(), at(10));
        watch.see(at(9), seen.clone());
        assert_eq!(watch.deadline(), at(19), "{seen:?}");
        // The same total again is no progress.
        if !matches!(seen, Seen::Control(_) | Seen::Screen(_)) {
            watch.see(at(12), seen.clone());
            assert_eq!(watch.deadline(), at(19), "{seen:?}");
        }
    }
}

#[test]
fn silence_is_a_stall_and_chatter_ends_at_the_total() {
    let mut silent = watch();
    silent.see(at(0), Seen::Control(Message::Stage("mount".into())));
    assert_eq!(
        silent.look(at(10)),
        Some(Outcome::Failed(Failure::Stalled {
            limit: at(10),
            stage: Some("mount".into()),
            activity: Activity::Idle
        }))
    );
    let mut chatty = watch();
    for second in 1..100 {
        assert_eq!(chatty.see(at(second), Seen::ConsoleBytes(second)), None);
        assert_eq!(chatty.see(at(second), screen(true, "more")), None);
        assert_eq!(chatty.look(at(second)), None);
    }
    // The message names the limit that the recipe has, not what was left of it.
    let limit = Duration::from_secs(160);
    assert_eq!(chatty.look(at(100)), Some(Outcome::Failed(Failure::TimedOut { limit, stage: None })));
}

#[test]
fn a_guest_that_never_says_anything_did_not_boot() {
    assert_eq!(class(watch().look(at(10))), "boot_failed");
}

#[test]
fn a_guest_that_computes_in_silence_has_longer_than_an_idle_one_but_not_for_ever() {
    let mut watch = watch();
    watch.see(at(0), Seen::ConsoleBytes(5000));
    for second in 0..40 {
        // Half a processor.
        watch.see(at(second), Seen::Processors(at(second) / 2));
        assert_eq!(watch.look(at(second)), None, "{second}");
    }
    watch.see(at(40), Seen::Processors(at(20)));
    assert_eq!(
        watch.look(at(40)),
        Some(Outcome::Failed(Failure::Stalled { limit: at(40), stage: None, activity: Activity::Busy }))
    );
}

#[test]
fn a_slow_download_lives() {
    let mut watch = watch();
    for second in 1..100 {
        // One byte from upstream in a while, and nothing else at all.
        if second % 9 == 0 {
            watch.see(at(second), Seen::CacheBytes(second));
        }
        assert_eq!(watch.look(at(second)), None, "{second}");
    }
}

#[test]
fn a_question_that_stays_is_known_within_a_minute() {
    let limits = Limits { no_progress: at(1000), total: at(1000), used: at(0) };
    for (text, known) in [
        ("[!] Configure the network Hostname: debian <Go Back> <Continue>", 20),
        ("Do you want to continue? [Y/n]", 45),
    ] {
        let mut watch = Watch::new("5fe7".into(), limits);
        watch.see(at(0), Seen::ConsoleBytes(9));
        watch.see(at(2), screen(true, text));
        for second in 3..known + 2 {
            watch.see(at(second), screen(false, text));
            assert_eq!(class(watch.look(at(second))), "running", "{text} at {second}");
        }
        assert_eq!(class(watch.look(at(known + 2))), "waiting_for_input", "{text}");
    }
}

/// What an installer showed for 55 minutes: a question, and below a clock that is drawn anew each minute.
#[test]
fn a_question_below_a_clock_is_known_within_a_minute() {
    let bytes = include_bytes!("../../tests/waiting/debian-installer.console.log");
    let redraw = b"\x1b[H\x1b[7m";
    let redraws: Vec<usize> = memchr::memmem::find_iter(bytes, redraw).skip(1).collect();
    let (question, clocks) = bytes.split_at(redraws[0]);
    let limits = Limits { no_progress: at(1000), total: at(3600), used: at(0) };
    // As it was, and as it would be with a clock that tells seconds.
    for seconds_between in [60, 1] {
        let mut console = Console::new(std::io::sink(), 0);
        let mut watch = Watch::new("5fe7".into(), limits);
        console.push(question).unwrap();
        let mut clock = clocks.split_inclusive(|byte| *byte == b'B').cycle();
        let known = (0..120).find(|second| {
            if second % seconds_between == 0 {
                console.push(clock.next().unwrap()).unwrap();
            }
            watch.see(at(*second), Seen::ConsoleBytes(console.bytes()));
            watch.see(at(*second), Seen::Screen(console.look()));
            watch.look(at(*second)).is_some()
        });
        assert!(known.is_some_and(|second| second <= 60), "{known:?}");
        let outcome = watch.look(at(120));
        let Some(Outcome::Failed(failure)) = &outcome else { panic!("{outcome:?}") };
        assert_eq!(failure.class().name(), "waiting_for_input");
        assert!(failure.to_string().contains("Select your location"), "{failure}");
    }
}

#[test]
fn a_clock_that_runs_is_no_progress() {
    let mut console = Console::new(std::io::sink(), 0);
    let mut watch = Watch::new("5fe7".into(), LIMITS);
    watch.see(at(0), Seen::Control(Message::Stage("x".into())));
    for second in 0..12 {
        console.push(format!("\rwaiting ({second}s / no limit)").as_bytes()).unwrap();
        watch.see(at(second), Seen::ConsoleBytes(console.bytes()));
        watch.see(at(second), Seen::Screen(console.look()));
    }
    assert_eq!(class(watch.look(at(12))), "stalled");
}

#[test]
fn a_question_on_the_screen_of_a_guest_that_works_is_none() {
    let text = "Do you want to continue? [Y/n]";
    let limits = Limits { no_progress: at(1000), total: at(1000), used: at(0) };
    type Work = fn(u64) -> Seen;
    let works: [Work; 4] = [
        |second| Seen::Blocks(BlockTotals { operations: second, ..BlockTotals::default() }),
        Seen::CacheBytes,
        |second| Seen::Processors(Duration::from_secs(second)),
        |_| screen(true, "Do you want to continue? [Y/n]"),
    ];
    for work in works {
        let mut watch = Watch::new("5fe7".into(), limits);
        for second in 0..200 {
            watch.see(at(second), screen(false, text));
            watch.see(at(second), work(second));
            assert_eq!(watch.look(at(second)), None);
        }
    }
}

#[test]
fn a_flood_on_the_console_ends_the_run() {
    assert_eq!(class(watch().see(at(1), Seen::ConsoleBytes(MOST_CONSOLE_BYTES))), "running");
    assert_eq!(class(watch().see(at(1), Seen::ConsoleBytes(MOST_CONSOLE_BYTES + 1))), "console_flood");
}

#[test]
fn a_file_that_upstream_refused_explains_a_failure_of_the_same_step_only() {
    let refused = |refusal| {
        let (path, reason) = ("/x.deb".into(), "no".into());
        Seen::Refused(Refused { path, refusal, status: None, reason })
    };
    let mut watch = watch();
    watch.see(at(1), refused(Refusal::Unavailable));
    watch.see(at(2), failed("configure"));
    assert_eq!(class(watch.see(at(3), Seen::QemuEnded(String::new()))), "download_failed");
    let mut other = self::watch();
    other.see(at(1), refused(Refusal::Unavailable));
    other.see(at(1), refused(Refusal::Unnamed));
    other.see(at(2), Seen::Control(Message::Stage("next".into())));
    other.see(at(2), refused(Refusal::Unnamed));
    other.see(at(2), failed("next"));
    assert_eq!(class(other.see(at(3), Seen::QemuEnded(String::new()))), "step_failed");
    let mut greedy = self::watch();
    greedy.see(at(1), refused(Refusal::Limit));
    greedy.see(at(2), failed("configure"));
    assert_eq!(class(greedy.see(at(3), Seen::QemuEnded(String::new()))), "download_limit");
}

#[test]
fn a_full_host_disk_is_told_from_a_broken_one() {
    assert_eq!(class(watch().see(at(1), Seen::DiskError { no_space: true })), "host_disk_full");
    assert_eq!(class(watch().see(at(1), Seen::DiskError { no_space: false })), "host_disk_error");
}

fn any_seen() -> impl Strategy<Value = Seen> {
    prop_oneof![
        any::<u64>().prop_map(Seen::ConsoleBytes),
        any::<u64>().prop_map(Seen::CacheBytes),
        "[0-9a-f]{4}".prop_map(|nonce| done(&nonce)),
        Just(Seen::QemuEnded("exit status: 0".into())),
        Just(failed("x")),
        Just(Seen::Sign(full())),
        Just(screen(true, "Hostname: <Go Back>")),
        (0_u64..100).prop_map(|spent| Seen::Processors(at(spent))),
        Just(panic()),
        Just(Seen::Cancelled),
        Just(Seen::GuestEnded),
        any::<bool>().prop_map(|no_space| Seen::DiskError { no_space }),
    ]
}

proptest! {
    #[test]
    fn nothing_but_the_nonce_is_ever_success(events in prop::collection::vec(any_seen(), 0..40)) {
        let mut watch = Watch::new("a nonce nobody can guess".into(), LIMITS);
        for (second, seen) in (0..).zip(events) {
            prop_assert_ne!(watch.see(at(second), seen), Some(Outcome::Proven));
            prop_assert_ne!(watch.look(at(second)), Some(Outcome::Proven));
        }
    }

    #[test]
    fn every_run_ends_by_its_total_limit(events in prop::collection::vec(any_seen(), 0..40)) {
        let mut watch = watch();
        for (second, seen) in (0..).zip(events) {
            watch.see(at(second), seen);
        }
        prop_assert!(watch.look(LIMITS.left()).is_some());
    }
}
