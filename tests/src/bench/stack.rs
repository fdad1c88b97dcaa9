//! What a killed builder leaves: a loop device, an ext4 file system on it, three mounts in that, and a
//! process that stands in it. And the same taken back by nothing but system calls.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use loopdev::LoopDevice;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;

use crate::bystander::attach;
use crate::failure::{OrFail, wait_until};
use crate::place::Place;
use crate::probe;
use crate::wire::Client;

/// How long anything may take that is not measured.
const PATIENCE: Duration = Duration::from_secs(30);
/// `STATX_MNT_ID_UNIQUE`, Linux 6.8.
const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
/// What is mounted inside, as for a chroot.
const INSIDE: [&str; 3] = ["dev", "proc", "sys"];

/// A process of a bench that does nothing until it is killed.
#[derive(Debug)]
pub struct Sleeper {
    child: Child,
    pidfd: OwnedFd,
}

impl Sleeper {
    /// Starts one that stands in a directory.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(place: &Place, directory: &Path) -> Self {
        let mut command = place.command("sleep");
        command.arg("3600").current_dir(directory).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().or_fail("starting a process");
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).or_fail("a process number");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).or_fail("opening a pidfd");
        // Until then it is a shell that enters the place's control groups, and would leave any other.
        let name = format!("/proc/{}/comm", child.id());
        wait_until("a process to be what it is to be", PATIENCE, || {
            fs::read_to_string(&name).is_ok_and(|name| name.trim() == "sleep")
        });
        Self { child, pidfd }
    }

    /// SIGKILL.
    pub fn kill(&self) {
        // One that has ended is as good.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Whether it has ended, waited for or not.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.poll(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
    }

    /// Returns when it has ended.
    pub fn wait_for_end(&self) {
        while !self.poll(None) {}
    }

    fn poll(&self, limit: Option<&Timespec>) -> bool {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut polled, limit).is_ok_and(|count| count > 0)
    }

    /// Takes its exit status, if it has ended, so that nothing of it is left.
    pub fn reap(&mut self) {
        let _ = self.child.try_wait();
    }

    /// The number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl AsFd for Sleeper {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}

/// The stack. What is left of it when it is dropped is taken back, and nothing else: each part is known
/// by a number that the kernel does not give twice.
#[derive(Debug)]
pub struct Stack {
    directory: PathBuf,
    number: u32,
    sequence: u64,
    /// The outermost first.
    mounts: Vec<(PathBuf, u64)>,
    process: Sleeper,
}

impl Stack {
    /// Makes one in a directory that holds its `image`.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn make(place: &Place, directory: &Path) -> Self {
        let root = directory.join("mnt");
        fs::create_dir_all(&root).or_fail("making a mount point");
        let node = attach(&directory.join("image"));
        let number: u32 =
            node.trim_start_matches("/dev/loop").parse().or_fail(format_args!("the number of {node}"));
        let sequence = sequence_of(number).or_fail(format_args!("the sequence number of {node}"));
        let none = None::<&str>;
        mount(Some(node.as_str()), &root, Some("ext4"), MsFlags::empty(), none).or_fail("mounting an image");
        let mut mounts = vec![(root.clone(), probe::mount_number(&root))];
        for name in INSIDE {
            let point = root.join(name);
            fs::create_dir_all(&point).or_fail("making a mount point");
            let source = Path::new("/").join(name);
            mount(Some(&source), &point, none, MsFlags::MS_BIND, none).or_fail("mounting inside");
            mounts.push((point.clone(), probe::mount_number(&point)));
        }
        let process = Sleeper::start(place, &root);
        fs::write(directory.join("pid"), format!("{}\n", process.pid())).or_fail("writing a number");
        Self { directory: directory.to_owned(), number, sequence, mounts, process }
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Sleeper {
        &self.process
    }

    /// Takes the exit status of its process.
    pub fn reap(&mut self) {
        self.process.reap();
    }

    /// Whether nothing of it is left. Begins with what goes last, so that asking early costs one read.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        !self.is_attached() && self.process.has_ended() && self.mounts.iter().all(|mount| !is_mounted(mount))
    }

    fn is_attached(&self) -> bool {
        let bound = format!("/sys/block/loop{}/loop", self.number);
        sequence_of(self.number) == Some(self.sequence) && Path::new(&bound).exists()
    }

    /// Ends the process and waits for it.
    pub fn end_process(&self) {
        self.process.kill();
        self.process.wait_for_end();
    }

    /// Unmounts what is mounted inside.
    ///
    /// # Errors
    /// What `umount2(2)` says.
    pub fn unmount_inside(&self) -> io::Result<()> {
        for (point, _) in self.mounts.iter().skip(1).rev() {
            umount2(point, MntFlags::UMOUNT_NOFOLLOW)?;
        }
        Ok(())
    }

    /// Unmounts the file system.
    ///
    /// # Errors
    /// What `umount2(2)` says.
    pub fn unmount_root(&self) -> io::Result<()> {
        let (root, _) = self.mounts.first().or_fail("the outermost mount");
        Ok(umount2(root, MntFlags::UMOUNT_NOFOLLOW)?)
    }

    /// Opens the device, `LOOP_CLR_FD`, and closes it, which is when the kernel detaches it.
    ///
    /// # Errors
    /// What the calls say.
    pub fn detach(&self) -> io::Result<()> {
        LoopDevice::open(format!("/dev/loop{}", self.number))?.detach()
    }

    /// All of that in order.
    ///
    /// # Errors
    /// Of the first that fails.
    pub fn take_back(&self) -> io::Result<()> {
        self.end_process();
        self.unmount_inside()?;
        self.unmount_root()?;
        self.detach()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.process.kill();
        self.process.wait_for_end();
        for mount in self.mounts.iter().rev().filter(|mount| is_mounted(mount)) {
            let _ = umount2(&mount.0, MntFlags::UMOUNT_NOFOLLOW);
        }
        if self.is_attached() {
            // What it says goes to whoever watches; the place looks for what is left.
            let _ = Command::new("losetup").arg("--detach").arg(format!("/dev/loop{}", self.number)).status();
        }
    }
}

/// Whether a mount is still the one on top of its mount point.
fn is_mounted((point, number): &(PathBuf, u64)) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    statx(CWD, point, flags, UNIQUE).is_ok_and(|status| status.stx_mnt_id == *number)
}

fn sequence_of(number: u32) -> Option<u64> {
    fs::read_to_string(format!("/sys/block/loop{number}/diskseq")).ok()?.trim().parse().ok()
}

/// A stack with the process whose death makes it a leak.
#[derive(Debug)]
pub struct Leak {
    owner: Sleeper,
    stack: Stack,
}

impl Leak {
    /// One that nobody knows of.
    #[must_use]
    pub fn unknown(place: &Place, directory: &Path) -> Self {
        Self { owner: Sleeper::start(place, place.root()), stack: Stack::make(place, directory) }
    }

    /// One under a lease that claims the directory, as `hostler run` would have made it.
    ///
    /// # Panics
    /// When the daemon refuses.
    #[must_use]
    pub fn leased(place: &Place, directory: &Path, client: &mut Client) -> Self {
        let owner = Sleeper::start(place, place.root());
        let lease = client.open_lease("leak", &owner.pidfd);
        let opened = File::open(directory).or_fail("opening a directory");
        client.claim(lease, &opened, false).or_fail("claiming a directory");
        let stack = Stack::make(place, directory);
        let adopt = json!({ "lease": lease.lease, "epoch": lease.epoch, "process": 0 });
        client.call("Adopt", &adopt, &[stack.process.as_fd()]).or_fail("adopting a process");
        Self { owner, stack }
    }

    /// What leaks.
    #[must_use]
    pub fn stack(&self) -> &Stack {
        &self.stack
    }

    /// Kills the owner.
    pub fn kill_owner(&self) {
        self.owner.kill();
    }

    /// Takes the exit statuses of what has ended.
    pub fn reap(&mut self) {
        self.owner.reap();
        self.stack.reap();
    }

    /// Kills the owner, waits for that, and takes the stack back.
    ///
    /// # Errors
    /// Of the first call that fails.
    pub fn take_back(&self) -> io::Result<()> {
        self.owner.kill();
        self.owner.wait_for_end();
        self.stack.take_back()
    }
}

/// Looks again and again until nothing of any is left, and says when that was.
///
/// # Panics
/// When something is left after half a minute.
#[must_use]
pub fn when_gone(leaks: &[Leak], interval: Duration) -> Instant {
    let begun = Instant::now();
    // What went first is not asked for again.
    let mut left: Vec<&Leak> = leaks.iter().collect();
    loop {
        while left.last().is_some_and(|leak| leak.stack.is_gone()) {
            left.pop();
        }
        let now = Instant::now();
        if left.is_empty() {
            return now;
        }
        assert!(begun.elapsed() < PATIENCE, "{} leaks are still there", left.len());
        std::thread::sleep(interval);
    }
}

/// Directories, each with an image that is big enough for one stack.
///
/// # Panics
/// When they cannot be made.
#[must_use]
pub fn directories(place: &Place, count: usize) -> Vec<PathBuf> {
    let template = place.image("template.img", 2);
    let make = |index: usize| {
        let directory = place.directory(format!("stacks/{index}"));
        fs::copy(&template, directory.join("image")).or_fail("copying an image");
        directory
    };
    (0..count).map(make).collect()
}
