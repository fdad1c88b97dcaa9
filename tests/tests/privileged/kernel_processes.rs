//! What processes hold, and how long it takes to read it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::Place;
use hostler_tests::sleeper::Sleeper;
use hostler_tests::{probe, scenario};
use hostler_watchdog::kernel::{calls, processes, signals};
use hostler_watchdog::model::{FileHold, MountNamespace, SnapshotDepth};
use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};

use crate::kernel_seen::shown_at;
use crate::worker::Worker;

#[test]
fn open_files_are_told_from_paths_and_namespaces() {
    scenario::privileged("holds", |place| {
        let node = hostler_tests::bystander::attach(&place.image("image", 8));
        let point = place.directory("mnt");
        hostler_tests::program::succeed("mount", [node.as_ref(), point.as_os_str()]);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let path = openat(CWD, &point, flags, Mode::empty()).or_fail("opening a path");
        let open = File::open(&point).or_fail("opening a directory");
        let device = File::open(&node).or_fail("opening the device");
        let namespace = File::open("/proc/thread-self/ns/mnt").or_fail("opening a namespace");
        let pipe = std::io::pipe().or_fail("making a pipe");

        let snapshot = Worker::start(place).look(SnapshotDepth::Holders);
        let own = snapshot.processes.iter().find(|process| process.identity.pid == std::process::id());
        let own = own.or_fail("this test in the snapshot");
        let hold = |descriptor: i32| -> Option<&FileHold> {
            own.files.iter().find(|file| i32::try_from(file.descriptor) == Ok(descriptor))
        };
        let number = shown_at(&point);
        let file = hold(path.as_raw_fd()).or_fail("the path");
        assert_eq!((file.is_path, file.place.device, file.namespace), (true, number, None));
        let file = hold(open.as_raw_fd()).or_fail("the directory");
        assert_eq!((file.is_path, file.place.device, file.block_device), (false, number, None));
        let file = hold(device.as_raw_fd()).or_fail("the device");
        let is_it = |device: &&probe::LoopSeen| format!("/dev/loop{}", device.number) == node;
        let number = probe::loops().iter().find(is_it).or_fail("the device").number;
        assert_eq!(file.block_device.map(|device| (device.major, device.minor)), Some((7, number)));
        let file = hold(namespace.as_raw_fd()).or_fail("the namespace");
        assert_eq!(file.namespace, Some(MountNamespace(inode("/proc/thread-self/ns/mnt"))));
        assert_eq!(hold(pipe.0.as_raw_fd()), None, "what lies on no mount holds none");
        assert_eq!(own.namespace, Some(MountNamespace(inode("/proc/self/ns/mnt"))));

        drop((path, open, device));
        // What other tests start has these open, too, until it is another program.
        let unmount = || nix::mount::umount2(&point, nix::mount::MntFlags::empty()).is_ok();
        wait_until("the mount to be free", Duration::from_secs(5), unmount);
        hostler_tests::program::succeed("losetup", ["-d", &node]);
    });
}

#[test]
fn a_file_whose_path_is_too_long_to_be_told_is_held_all_the_same() {
    scenario::privileged("long-path", |place| {
        let (flags, mode) = (OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::RWXU);
        let top = File::open(place.directory("deep")).or_fail("opening a directory");
        let mut deep = openat(&top, ".", flags, mode).or_fail("opening a directory");
        let name = "d".repeat(250);
        for _ in 0..20 {
            mkdirat(&deep, &name, mode).or_fail("making a directory");
            deep = openat(&deep, &name, flags, mode).or_fail("opening a directory");
        }
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = File::from(openat(&deep, "file", flags, mode).or_fail("making a file"));
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        assert_eq!(link.map_err(|error| error.raw_os_error()), Err(Some(nix::libc::ENAMETOOLONG)));

        let own = std::process::id();
        let (found, unreadable) =
            processes::list(Path::new("/proc"), SnapshotDepth::Holders, &mut |pid| pid == own)
                .or_fail("listing processes");
        assert!(unreadable.iter().all(|(pid, _)| *pid != own), "{unreadable:?}");
        let found = found.iter().find(|process| process.identity.pid == own).or_fail("this test");
        let hold_of = |file: &dyn AsRawFd| -> Option<&FileHold> {
            found.files.iter().find(|hold| i32::try_from(hold.descriptor) == Ok(file.as_raw_fd()))
        };
        let hold = hold_of(&file).or_fail("the file that this test has open");
        assert_eq!(Some(hold.place), hold_of(&top).map(|hold| hold.place), "it is told as on another mount");
    });
}

fn inode(path: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).or_fail("a namespace").ino()
}

const MANY: usize = 2000;

/// Many processes that sleep. They end when this is dropped.
struct Crowd(Vec<Child>);

impl Crowd {
    fn new(place: &Place) -> Self {
        let mut all = Self(Vec::with_capacity(MANY));
        for _ in 0..MANY {
            let null = || Stdio::from(File::open("/dev/null").or_fail("opening /dev/null"));
            let child = place.command("sleep").arg("600").stdin(null()).stdout(null()).stderr(null()).spawn();
            all.0.push(child.or_fail("starting one of many"));
        }
        all
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
        }
        for child in &mut self.0 {
            let _ = child.wait();
        }
    }
}

/// The best of several, since other work on the machine only ever adds to it.
fn best(mut work: impl FnMut()) -> Duration {
    let once = |work: &mut dyn FnMut()| {
        let begin = Instant::now();
        work();
        begin.elapsed()
    };
    (0..7).map(|_| once(&mut work)).min().unwrap_or_default()
}

#[test]
#[ignore = "a measurement: cargo test --release -p hostler-tests --test privileged many_processes -- --ignored --nocapture"]
fn many_processes_are_read_about_as_fast_as_the_kernel_tells_of_them() {
    scenario::privileged("crowd", |place| {
        let crowd = Crowd::new(place);
        std::thread::sleep(Duration::from_secs(2));
        let proc = Path::new("/proc");
        let list =
            |depth| best(|| drop(processes::list(proc, depth, &mut |_| true).or_fail("listing processes")));
        println!("{MANY} processes besides the host's own");
        println!("ownership: {:?}, raw {:?}", list(SnapshotDepth::Ownership), best(|| raw(false)));
        println!("holders:   {:?}, raw {:?}", list(SnapshotDepth::Holders), best(|| raw(true)));
        drop(crowd);
    });
}

/// The same files of the kernel, read and not looked at.
fn raw(holders: bool) {
    for entry in std::fs::read_dir("/proc").or_fail("reading /proc").flatten() {
        let is_process = entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
        if !is_process {
            continue;
        }
        let path = entry.path();
        let _ = std::fs::read(path.join("stat"));
        let _ = std::fs::metadata(&path);
        let _ = std::fs::read_link(path.join("ns/mnt"));
        if holders {
            let _ = std::fs::read(path.join("cgroup"));
            let _ = std::fs::read(path.join("maps"));
            for link in ["cwd", "root", "exe"] {
                let _ = std::fs::metadata(path.join(link));
            }
            for file in std::fs::read_dir(path.join("fd")).into_iter().flatten().flatten() {
                let _ = std::fs::read_link(file.path());
                let _ = std::fs::metadata(file.path());
            }
        }
    }
}

#[test]
fn each_process_has_a_handle_of_its_own_where_the_kernel_has_any() {
    scenario::privileged("pidfs", |place| {
        let (one, other) = (Sleeper::start(place, false), Sleeper::start(place, true));
        let handle = |process: &Sleeper| {
            let identity = signals::process_of(process).or_fail("a pidfd").or_fail("a living process");
            // Opened anew, as after a restart.
            calls::file_handle(signals::open(identity).or_fail("opening").or_fail("a living process"))
        };
        match handle(&one) {
            Ok(known) => {
                assert_eq!(handle(&one).or_fail("again"), known);
                assert_ne!(handle(&other).or_fail("another's"), known);
            }
            // Before Linux 6.14.
            Err(error) => assert_eq!(error.raw_os_error(), Some(nix::libc::EOPNOTSUPP)),
        }
    });
}
