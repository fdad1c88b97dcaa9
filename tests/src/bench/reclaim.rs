//! How long a dead owner's stack stays: the daemon, against the same calls by somebody who knows already
//! what is to be done.

use std::time::Duration;

use super::report::{Goal, Row, Sample, Section};
use super::stack::directories;
use super::steps;
use super::ways::{Way, Ways};
use crate::daemon::{Daemon, Settings};
use crate::place::Place;

/// Measures so many repetitions of each, one by turns with the other.
///
/// # Panics
/// When anything does not go as it should.
#[must_use]
pub fn measure(place: &Place, repetitions: usize) -> Section {
    let daemon = Daemon::start(place, &Settings::default());
    let directories = directories(place, 1);
    let ways =
        Ways { place, daemon: &daemon, directories: &directories, interval: Duration::from_micros(200) };
    let (mut own, mut bare) = (Sample::default(), Sample::default());
    // The first of each pays for what is made once, and does not count.
    let _ = (ways.by(Way::Daemon), ways.by(Way::Calls));
    for repetition in 0..repetitions {
        // Who is first changes too, so that neither always comes after the other.
        for by_daemon in [repetition % 2 == 0, repetition % 2 != 0] {
            if by_daemon {
                own.push(ways.by(Way::Daemon));
            } else {
                bare.push(ways.by(Way::Calls));
            }
        }
    }
    let line = |percent: usize, goal| {
        let what = format!("from the owner's SIGKILL until all is gone, p{percent}");
        Row::times(&what, own.percentile(percent), "bare calls", bare.percentile(percent), goal)
    };
    let goal = Goal::AtMostAnd(1.2, Duration::from_millis(5));
    Section {
        title: "One stack".to_owned(),
        how: format!(
            "An owner is killed that leaves a loop device, an ext4 file system on it, three bind mounts in \
             that and a process. {repetitions} repetitions, by turns with the same system calls (kill \
             through pidfds, wait, `umount2` four times, `LOOP_CLR_FD`, close) of a program that knows what \
             is to be done. It is looked every 0.2 ms whether all is gone, without asking the daemon."
        ),
        rows: vec![line(50, Goal::None), line(99, goal)],
        notes: vec![steps::told_by(&daemon.log())],
    }
}
