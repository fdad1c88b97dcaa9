//! One test for each way in which a bystander holds what was leaked: it is left, named with the reason,
//! and taken back once the bystander has let go. (`foreign_namespace`, `cwd_or_root`,
//! `detached_mount_fd` are in `pinned`; what needs drivers that not every kernel has is in the guest.)

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use hostler_protocol::resource::Kind;
use hostler_protocol::why::Reason;
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::fuse::Fuse;
use hostler_tests::leak::{Leak, MOUNTED_IMAGE};
use hostler_tests::place::{Place, kill};
use hostler_tests::{program, scenario};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::mount::{OpenTreeFlags, open_tree};

const SOON: Duration = Duration::from_secs(10);

fn mounted_leak(place: &Place) -> Leak<'_> {
    let _ = place.directory("claim");
    let _ = place.image("claim/image", 16);
    Leak::start(place, MOUNTED_IMAGE)
}

#[test]
fn child_mount() {
    scenario::privileged("child", |place| {
        let _ = place.directory("claim");
        let _ = place.image("claim/image", 16);
        // Below the directory before it was claimed: an administrator's, and then moved into the image.
        let others = place.directory("claim/others");
        mount(Some("none"), &others, Some("tmpfs"), MsFlags::empty(), None::<&str>).or_fail("mounting");
        let script = format!("{MOUNTED_IMAGE}; mkdir mnt/below");
        let mut leak = Leak::start(place, &script);
        let below = leak.path("mnt/below");
        mount(Some(&others), &below, None::<&str>, MsFlags::MS_MOVE, None::<&str>).or_fail("moving");
        leak.kill();
        let pinned = leak.pinned(Kind::Mount, Reason::ChildMount);
        assert!(pinned.detail.contains("mnt/below"), "{pinned:?}");
        leak.wants_chain(&leak.node(), &[Reason::Mounted, Reason::ChildMount]);
        umount2(&below, MntFlags::UMOUNT_NOFOLLOW).or_fail("unmounting");
        leak.gone();
    });
}

#[test]
fn stacked_mount() {
    scenario::privileged("stacked-by-other", |place| {
        let _ = place.directory("claim");
        let _ = place.image("claim/image", 16);
        let others = place.directory("claim/others");
        mount(Some("none"), &others, Some("tmpfs"), MsFlags::empty(), None::<&str>).or_fail("mounting");
        let mut leak = Leak::start(place, MOUNTED_IMAGE);
        let point = leak.path("mnt");
        mount(Some(&others), &point, None::<&str>, MsFlags::MS_MOVE, None::<&str>).or_fail("moving");
        leak.kill();
        leak.pinned(Kind::Mount, Reason::StackedMount);
        umount2(&point, MntFlags::UMOUNT_NOFOLLOW).or_fail("unmounting");
        leak.gone();
    });
}

#[test]
fn open_tree_descriptor() {
    scenario::privileged("open-tree", |place| {
        let mut leak = mounted_leak(place);
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(rustix::fs::CWD, leak.path("mnt"), flags).or_fail("open_tree");
        leak.kill();
        let pinned = leak.pinned(Kind::Loop, Reason::OpenTree);
        assert!(pinned.detail.contains(&format!("process {}", std::process::id())), "{pinned:?}");
        drop(tree);
        leak.gone();
    });
}

#[test]
fn open_device_fd() {
    scenario::privileged("device-fd", |place| {
        let mut leak = mounted_leak(place);
        let device = File::open(leak.node()).or_fail("opening the device");
        leak.kill();
        let pinned = leak.pinned(Kind::Loop, Reason::OpenDeviceFd);
        assert!(
            pinned.reasons.contains(&Reason::AutoclearPending) || !pinned.detail.is_empty(),
            "{pinned:?}"
        );
        drop(device);
        leak.gone();
    });
}

#[test]
fn mapping_without_a_descriptor() {
    scenario::privileged("mapping", |place| {
        let mut leak = mounted_leak(place);
        let file = leak.path("mnt/mapped");
        std::fs::write(&file, [b'x'; 8192]).or_fail("writing a file");
        // A process that maps the file and closes it.
        let script = "import mmap, sys, os\nfd = os.open(sys.argv[1], os.O_RDWR)\nm = mmap.mmap(fd, 0)\nos.close(fd)\n[os.close(int(n)) for n in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + n) and os.readlink('/proc/self/fd/' + n) == sys.argv[1]]\nprint('mapped', flush=True)\nsys.stdin.read()";
        let mut mapper = place
            .command("python3")
            .args(["-c", script])
            .arg(&file)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .or_fail("starting python3");
        let maps = format!("/proc/{}/maps", mapper.id());
        wait_until("the mapping", SOON, || {
            std::fs::read_to_string(&maps).is_ok_and(|maps| maps.contains("mnt/mapped"))
        });
        // Python's mmap keeps a duplicate of the descriptor, which the script closes too.
        let descriptors = format!("/proc/{}/fd", mapper.id());
        wait_until("the end of the descriptor", SOON, || {
            let mut all = std::fs::read_dir(&descriptors).or_fail("the descriptors").flatten();
            all.all(|one| std::fs::read_link(one.path()).is_ok_and(|target| target != file))
        });
        leak.kill();
        let pinned = leak.pinned(Kind::Mount, Reason::Mapping);
        assert!(pinned.detail.contains(&format!("process {}", mapper.id())), "{pinned:?}");
        kill(mapper.id());
        mapper.wait().or_fail("waiting for python3");
        leak.gone();
    });
}

#[test]
fn overlay_lower() {
    scenario::privileged("overlay-lower", |place| {
        let mut leak = mounted_leak(place);
        let lower = leak.path("mnt/lower");
        std::fs::create_dir(&lower).or_fail("making the lower directory");
        let merged = place.directory("merged");
        let (upper, work) = (place.directory("upper"), place.directory("work"));
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .or_fail("mounting an overlay");
        leak.kill();
        leak.pinned(Kind::Mount, Reason::OverlayLower);
        leak.wants_chain(&leak.node(), &[Reason::Mounted, Reason::OverlayLower]);
        umount2(&merged, MntFlags::UMOUNT_NOFOLLOW).or_fail("unmounting the overlay");
        leak.gone();
    });
}

#[test]
fn frozen_is_told_while_it_is() {
    scenario::privileged("why-frozen", |place| {
        let _ = place.directory("claim");
        journalled_image(place);
        let mut leak = Leak::start(place, MOUNTED_IMAGE);
        program::succeed("fsfreeze", ["--freeze".as_ref(), leak.path("mnt").as_os_str()]);
        leak.wants_chain(&leak.node(), &[Reason::Mounted, Reason::Frozen]);
        // Lazily unmounted, nothing shows it any more, and it still holds the device.
        umount2(&leak.path("mnt"), MntFlags::UMOUNT_NOFOLLOW).or_fail("unmounting");
        leak.wants_chain(&leak.node(), &[Reason::Frozen]);
        leak.kill();
        leak.gone();
    });
}

/// ext4 with a journal, which a freeze leaves a trace in.
fn journalled_image(place: &Place) {
    let path = place.path("claim/image");
    File::create(&path).and_then(|file| file.set_len(32 << 20)).or_fail("making the image");
    let options = ["-q", "-F", "-t", "ext4", "-O", "has_journal", "-N", "128"];
    program::succeed("mke2fs", options.iter().map(std::ffi::OsStr::new).chain([path.as_os_str()]));
}

#[test]
fn swap_and_swapfile_are_told_while_they_are() {
    scenario::privileged("why-swap", |place| {
        let _ = place.directory("claim");
        let _ = place.image("claim/image", 32);
        let script = format!(
            "{MOUNTED_IMAGE}
            truncate -s 16M swap; chmod 600 swap; mkswap -q swap; area=$(losetup --find --show swap); swapon \"$area\"; echo \"$area\" >area
            dd if=/dev/zero of=mnt/swapfile bs=1M count=4 status=none; chmod 600 mnt/swapfile; mkswap -q mnt/swapfile; swapon mnt/swapfile"
        );
        let mut leak = Leak::start(place, &script);
        let area = std::fs::read_to_string(leak.path("area")).or_fail("the swap area's device");
        leak.wants_chain(area.trim(), &[Reason::Swap]);
        leak.wants_chain(&leak.node(), &[Reason::Swapfile]);
        leak.kill_and_want_gone(&[(Kind::Swap, 2), (Kind::Loop, 2), (Kind::Mount, 1)]);
        let swaps = std::fs::read_to_string("/proc/swaps").or_fail("reading /proc/swaps");
        assert!(!swaps.contains(&*place.path("claim").to_string_lossy()), "{swaps}");
    });
}

#[test]
fn nested_loop() {
    scenario::privileged("why-nested", |place| {
        let _ = place.directory("claim");
        let _ = place.image("claim/image", 32);
        let script =
            format!("{MOUNTED_IMAGE}; truncate -s 4M mnt/inner; losetup --find --show mnt/inner >inner");
        let mut leak = Leak::start(place, &script);
        leak.wants_chain(&leak.node(), &[Reason::Mounted, Reason::NestedLoop]);
        leak.kill_and_want_gone(&[(Kind::Loop, 2)]);
    });
}

#[test]
fn partitions_go_with_their_device() {
    scenario::privileged("partition", |place| {
        let _ = place.directory("claim");
        let image = place.path("claim/image");
        File::create(&image).and_then(|file| file.set_len(32 << 20)).or_fail("making the image");
        // A table and an ext4 file system in its only partition, at 1 MiB.
        let inner = place.image("inner", 16);
        let mut table = vec![0u8; 512];
        // One entry: Linux, from sector 2,048, 32,768 of them.
        table[446 + 4] = 0x83;
        table[446 + 8..446 + 12].copy_from_slice(&2048u32.to_le_bytes());
        table[446 + 12..446 + 16].copy_from_slice(&32_768u32.to_le_bytes());
        table[510..].copy_from_slice(&[0x55, 0xaa]);
        std::os::unix::fs::FileExt::write_all_at(
            &File::options().write(true).open(&image).or_fail("opening the image"),
            &table,
            0,
        )
        .or_fail("writing the partition table");
        let script = format!(
            "dd if={} of=image bs=1M seek=1 conv=notrunc status=none
            device=$(losetup --find --show image); partx -a \"$device\"
            mkdir mnt; mount \"${{device}}p1\" mnt; echo \"$device\" >device",
            inner.display()
        );
        let mut leak = Leak::start(place, &script);
        leak.wants_chain(&leak.node(), &[Reason::Partition, Reason::Mounted]);
        let node = leak.node();
        leak.kill_and_want_gone(&[(Kind::Loop, 1), (Kind::Mount, 1)]);
        let name = node.trim_start_matches("/dev/");
        let left = format!("/sys/block/{name}/{name}p1");
        assert!(!std::path::Path::new(&left).exists(), "a partition was left on the detached device");
    });
}

#[test]
fn fuse_that_hangs_is_told_and_aborted_once_leaked() {
    scenario::privileged("fuse", |place| {
        let _ = place.directory("claim");
        let mut leak = Leak::start(place, "mkdir hung");
        let point = leak.path("hung");
        let fuse = Fuse::silent(&point);
        // The lease's own process hangs on it.
        let victim = place.command("stat").arg(&point).spawn();
        let mut victim = victim.or_fail("starting stat");
        leak.wants_chain(&point.to_string_lossy(), &[Reason::FuseHung]);
        leak.kill();
        leak.gone();
        let ended = victim.wait().or_fail("waiting for stat");
        assert!(!ended.success(), "stat of an aborted file system");
        drop(fuse);
    });
}

#[test]
fn locked_by_a_user_namespace() {
    scenario::privileged("locked", |place| {
        let mut leak = mounted_leak(place);
        // A bystander's sandbox that copied the mounts while the leak was there: in a user namespace of
        // its own, they are locked in it.
        let sandbox = place.command_of_user("unshare").args(["--user", "--mount", "sleep", "600"]).spawn();
        let mut sandbox = sandbox.or_fail("starting unshare");
        let pid = sandbox.id();
        let own = std::fs::read_link("/proc/thread-self/ns/mnt").or_fail("reading the namespace");
        wait_until("a namespace of its own", SOON, || {
            std::fs::read_link(format!("/proc/{pid}/ns/mnt")).is_ok_and(|other| other != own)
        });
        leak.kill();
        leak.pinned(Kind::Loop, Reason::ForeignNamespace);
        leak.wants_chain(&leak.node(), &[Reason::ForeignNamespace, Reason::MntLocked]);
        kill(pid);
        sandbox.wait().or_fail("waiting for the sandbox");
        leak.gone();
    });
}

#[test]
fn a_descriptor_in_flight_is_unknown_and_never_free() {
    scenario::privileged("in-flight", |place| {
        use nix::sys::socket::{
            AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
        };
        let mut leak = mounted_leak(place);
        let file = File::create(leak.path("mnt/file")).or_fail("making a file");
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).or_fail("a pair");
        let descriptors = [file.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&descriptors)];
        let bytes = [std::io::IoSlice::new(b"x")];
        sendmsg::<()>(ours.as_raw_fd(), &bytes, &message, MsgFlags::empty(), None).or_fail("sending it");
        drop(file);
        leak.kill();
        leak.pinned(Kind::Mount, Reason::Unknown);
        drop((ours, theirs));
        leak.gone();
    });
}
