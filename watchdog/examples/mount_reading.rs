//! Measures how long a look at the mounts of all namespaces takes, against plain reading of the same
//! kernel data. To be run as root, and optimised:
//!
//! `cargo run --release --package hostler-watchdog --example mount_reading -- [NAMESPACES] [MOUNTS]`
//!
//! makes NAMESPACES mount namespaces with MOUNTS mounts each, beside its own with as many, all in a mount
//! namespace of its own, and takes them away again by ending.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hostler_watchdog::kernel::mounts::{self, Wanted};
use hostler_watchdog::kernel::namespaces::{self, Means};
use hostler_watchdog::model::{DeviceNumber, Mount};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// How often each is measured; the quickest is told, since what else runs can only add to it.
const ROUNDS: usize = 25;
const NOTHING: Option<&str> = None;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>());
    let namespaces = arguments.next().transpose()?.unwrap_or(50);
    let mounts = arguments.next().transpose()?.unwrap_or(100);

    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING)?;
    let base = std::env::temp_dir().join(format!("hostler-mount-reading-{}", std::process::id()));
    fs::create_dir(&base)?;
    let result = measure(&base, namespaces, mounts);
    // What is mounted below goes with this process's namespace; the directory itself is the host's.
    umount2(&base, MntFlags::MNT_DETACH)?;
    fs::remove_dir(&base)?;
    result
}

fn measure(base: &Path, namespaces: usize, mounts: usize) -> Result<(), Box<dyn std::error::Error>> {
    mount(Some("none"), base, Some("tmpfs"), MsFlags::empty(), NOTHING)?;
    // What is wanted: one mount of each ten.
    let wanted = base.join("wanted");
    fs::create_dir(&wanted)?;
    mount(Some("none"), &wanted, Some("tmpfs"), MsFlags::empty(), NOTHING)?;
    let plain = base.join("plain");
    fs::create_dir(&plain)?;
    let already = fs::read_to_string("/proc/self/mountinfo")?.lines().count();
    for number in already..mounts {
        let (from, kind) = if number % 10 == 0 { (&wanted, "wanted") } else { (&plain, "plain") };
        let point = base.join(format!("a-directory-of-a-build/{kind}-{number}"));
        fs::create_dir_all(&point)?;
        mount(Some(from), &point, NOTHING, MsFlags::MS_BIND, NOTHING)?;
    }
    let mut children = Children(Vec::new());
    for _ in 0..namespaces {
        let mut sleep = Command::new("unshare");
        sleep.args(["--mount", "--propagation", "unchanged", "sleep", "600"]).stdin(Stdio::null());
        children.0.push(sleep.spawn()?);
    }
    let own = mounts::namespace_of(None)?;
    let limit = Instant::now() + Duration::from_secs(60);
    for child in &children.0 {
        while mounts::namespace_of(Some(child.id()))? == own {
            assert!(Instant::now() < limit, "a namespace was not made in time");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    let (_, all) = mounts::own()?;
    let device = |point: &Path| -> Option<DeviceNumber> {
        let found = all.iter().find(|mount| mount.point == point.as_os_str().as_encoded_bytes());
        found.map(Mount::device)
    };
    let wanted = Wanted { devices: device(&wanted).into_iter().collect::<HashSet<_>>() };

    let raw_own = quickest(|| raw("thread-self"));
    let raw_all = quickest(|| {
        raw("thread-self") + children.0.iter().map(|child| raw(&child.id().to_string())).sum::<usize>()
    });
    println!("{} mounts in the own namespace, as many in each of {namespaces} others", all.len());
    println!("plain reading of mountinfo, own:  {raw_own:>8.2?}");
    println!("plain reading of mountinfo, all:  {raw_all:>8.2?}");
    let own = quickest(|| mounts::own().map_or(0, |(_, mounts)| mounts.len()));
    println!("own, as the watchdog reads it:    {own:>8.2?}  {:.2} of plain", ratio(own, raw_own));
    for means in [Means::Numbers, Means::Visits, Means::Search] {
        let mut kept = (0, 0);
        let took = quickest(|| match namespaces::others_by(means, &all, &wanted, &mut |_| true) {
            Ok(others) => {
                kept = (others.namespaces.len(), others.mounts.len());
                kept.1
            }
            Err(error) => panic!("{error}"),
        });
        let both = own + took;
        println!(
            "others by {means:<8}: {took:>8.2?}, with own {both:>8.2?}  {:.2} of plain ({} namespaces, {} mounts kept)",
            ratio(both, raw_all),
            kept.0,
            kept.1,
            means = format!("{means:?}").to_lowercase(),
        );
    }
    let each = Wanted { devices: all.iter().map(Mount::device).collect() };
    let took = quickest(|| {
        let others = namespaces::others_by(Means::Numbers, &all, &each, &mut |_| true);
        others.map_or(0, |others| others.mounts.len())
    });
    let both = own + took;
    println!(
        "others by numbers, all kept: {took:>8.2?}, with own {both:>8.2?}  {:.2} of plain",
        ratio(both, raw_all)
    );
    Ok(())
}

/// The bytes of a process's mountinfo.
fn raw(process: &str) -> usize {
    fs::read(format!("/proc/{process}/mountinfo")).map_or(0, |bytes| bytes.len())
}

fn ratio(one: Duration, other: Duration) -> f64 {
    one.as_secs_f64() / other.as_secs_f64()
}

fn quickest(mut run: impl FnMut() -> usize) -> Duration {
    let once = || {
        let start = processor_time();
        std::hint::black_box(run());
        processor_time().saturating_sub(start)
    };
    std::iter::repeat_with(once).take(ROUNDS).min().unwrap_or_default()
}

/// Of this thread: nothing here waits, and what else runs is not to be measured.
fn processor_time() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID);
    time.map_or(Duration::ZERO, Duration::from)
}

struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended already is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
