//! What a daemon costs that has nothing to do, and what one event costs it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use loopdev::{LoopControl, LoopDevice};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use serde_json::json;

use super::cost;
use super::host::Crowd;
use super::report::{Goal, Row, Sample, Section};
use super::stack::{Leak, Sleeper, directories, when_gone};
use crate::daemon::{Daemon, Settings};
use crate::failure::{OrFail, wait_until};
use crate::place::Place;
use crate::probe;

const PATIENCE: Duration = Duration::from_secs(30);

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// How long nothing is done.
    pub idle: Duration,
    /// Events at each size of the mount table, each time.
    pub events: usize,
    /// The mounts of the two tables.
    pub mounts: [usize; 2],
}

/// Measures a daemon with one lease open and one that was taken back.
///
/// # Panics
/// When anything does not go as it should.
#[must_use]
pub fn measure(place: &Place, size: Size) -> Section {
    let daemon = Daemon::start(place, &Settings::default());
    let mut client = daemon.client();
    for directory in directories(place, 1) {
        let leaks = [Leak::leased(place, &directory, &mut client)];
        leaks.iter().for_each(Leak::kill_owner);
        let _ = when_gone(&leaks, Duration::from_millis(1));
    }
    let owner = Sleeper::start(place, place.root());
    let claimed = place.directory("claimed");
    let lease = client.open_lease("idle", &owner);
    let opened = File::open(&claimed).or_fail("opening a directory");
    client.claim(lease, &opened, false).or_fail("claiming a directory");
    // The lease is its owner's, and needs no connection; the reader of one ends soon after it.
    drop(client);
    wait_until("the end of the client's reader", PATIENCE, || cost::processes(&daemon).len() == 2);
    cost::wait_until_quiet(&daemon);
    let mut rows = idle(&daemon, size.idle);
    rows.extend(events(place, &daemon, &claimed, size));
    let close = json!({ "lease": lease.lease, "epoch": lease.epoch });
    daemon.client().call("CloseLease", &close, &[]).or_fail("closing a lease");
    Section {
        title: "At rest, and one event".to_owned(),
        how: format!(
            "A daemon that has taken one lease back and has another open. At rest for {} s; a wake-up is \
             counted for each time that a task of the daemon or of its workers' origin stopped running. An event \
             is a loop device that is attached to a file in the claimed directory, until the daemon has \
             written down whose it is; medians of {} each.",
            size.idle.as_secs(),
            size.events * BLOCKS
        ),
        rows,
        notes: Vec::new(),
    }
}

fn idle(daemon: &Daemon<'_>, time: Duration) -> Vec<Row> {
    let uevents = uevents();
    let pids = cost::processes(daemon);
    let before = cost::switches(&pids);
    std::thread::sleep(time);
    let switches = cost::switches(&pids) - before;
    let told = count(&uevents);
    assert_eq!(cost::processes(daemon), pids, "the daemon's processes are others");
    let minutes = time.as_secs_f64() / 60.0;
    let wakeups = switches as f64 / minutes;
    let what = format!("wake-ups at rest ({told} uevents of the kernel meanwhile)");
    vec![
        Row::number(&what, wakeups, "per minute", Goal::Number(1.0)),
        Row::number(
            "private memory of the daemon and its workers' origin",
            cost::private_memory(&pids),
            "MiB",
            Goal::Number(8.0),
        ),
    ]
}

/// A socket that gets the kernel's uevents, to tell a daemon that wakes by itself from one that was told.
fn uevents() -> std::os::fd::OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let protocol = SockProtocol::NetlinkKObjectUEvent;
    let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol);
    let socket = socket.or_fail("listening for uevents");
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1)).or_fail("listening for uevents");
    socket
}

fn count(uevents: &std::os::fd::OwnedFd) -> usize {
    let mut buffer = [0; 8192];
    std::iter::from_fn(|| recv(uevents.as_raw_fd(), &mut buffer, MsgFlags::empty()).ok()).count()
}

/// How often each size has its turn.
const BLOCKS: usize = 2;

fn events(place: &Place, daemon: &Daemon<'_>, claimed: &Path, size: Size) -> Vec<Row> {
    let image = claimed.join("image");
    crate::place::make_image(&image, 1);
    let mut samples: [[Sample; 2]; 2] = Default::default();
    for _ in 0..BLOCKS {
        for (mounts, [latency, work]) in size.mounts.iter().zip(&mut samples) {
            let there = probe::mounts().len();
            let crowd = mounts.checked_sub(there).map(|missing| Crowd::make(place, missing));
            cost::wait_until_quiet(daemon);
            for _ in 0..size.events {
                let (time, worked) = event(place, daemon, &image);
                latency.push(time);
                work.push(worked);
            }
            drop(crowd);
            cost::wait_until_quiet(daemon);
        }
    }
    let [[few_latency, few_work], [many_latency, many_work]] = &samples;
    let [few, many] = size.mounts;
    let line = |what: &str, more: &Sample, less: &Sample| {
        let what = format!("{what} of a loop event among {many} mounts");
        Row::times(&what, more.median(), &format!("among {few}"), less.median(), Goal::AtMost(1.2))
    };
    vec![line("CPU time", many_work, few_work), line("latency", many_latency, few_latency)]
}

/// Attaches a device, waits until the daemon knows, and detaches it. Says how long the first took, and how
/// much the daemon worked for it, with all that it did afterwards.
fn event(place: &Place, daemon: &Daemon<'_>, image: &Path) -> (Duration, Duration) {
    let journal = place.path("state/journal");
    let known = cost::journal_length(&journal);
    let before = cost::cpu_time(daemon);
    let begun = Instant::now();
    let device = attach(image);
    while cost::journal_length(&journal) <= known {
        assert!(begun.elapsed() < PATIENCE, "hostlerd does not know of a loop device");
        std::thread::sleep(Duration::from_micros(500));
    }
    let time = begun.elapsed();
    cost::wait_until_quiet(daemon);
    let worked = cost::cpu_time(daemon).saturating_sub(before);
    let written = std::fs::read(&journal).or_fail("reading the journal");
    let new = String::from_utf8_lossy(written.get(known..).unwrap_or_default()).into_owned();
    assert!(new.contains("\"loops\":[{"), "what the daemon wrote is of no loop device: {new}");
    device.detach().or_fail("detaching");
    drop(device);
    wait_until("the end of a loop device", PATIENCE, || probe::loops_below(image).is_empty());
    cost::wait_until_quiet(daemon);
    (time, worked)
}

/// Another may take the device that was free a moment ago.
fn attach(image: &Path) -> LoopDevice {
    let control = LoopControl::open().or_fail("opening the control of loop devices");
    let begun = Instant::now();
    loop {
        let device = control.next_free().or_fail("finding a free loop device");
        match device.attach_file(image) {
            Ok(()) => return device,
            Err(error) if error.raw_os_error() == Some(16) && begun.elapsed() < PATIENCE => {}
            Err(error) => panic!("attaching {}: {error}", image.display()),
        }
    }
}
