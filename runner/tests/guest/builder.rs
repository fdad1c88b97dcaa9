//! The builder guest itself, with a root file system that is nothing but busybox, dash, and stand-ins for
//! dpkg and GRUB: so its own steps take seconds.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hostler_runner::build::finish::{GuestPrograms, Task, Work, initramfs};
use hostler_runner::cancel::Cancel;
use hostler_runner::child::find_program;
use hostler_runner::class::Class;
use hostler_runner::disk::Partition;
use hostler_runner::event::{Silent, Stage};
use hostler_runner::vm::NO_TIMER_CHECK;
use hostler_runner::vm::argv::{Accelerator, Boot, CONTROL_PORT, Disk, DiskFormat, Network, VmSpec};
use hostler_runner::vm::nonce::nonce;
use hostler_runner::vm::outcome::Outcome;
use hostler_runner::vm::run::{Downloads, PowerOff, Report, Run, run};
use hostler_runner::vm::viewers::{Viewers, connect};

use super::{limits, programs, tools};

const SIZE: u64 = 32 << 20;

fn script(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A disk with a system in which every step of the builder guest ends well and does nothing.
fn disk(folder: &Path) -> PathBuf {
    let busybox = &tools().busybox;
    let root = folder.join("root");
    for name in ["bin", "usr/bin", "usr/sbin", "etc/default", "boot/grub", "dev", "proc", "sys", "run", "tmp"]
        .into_iter()
        .chain(["var/log", "var/tmp", "var/lib/dpkg", "var/lib/apt/lists", "var/cache/apt/archives"])
    {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    let listed = Command::new(busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(listed.stdout).unwrap().lines().filter(|name| *name != "busybox") {
        let folder = if applet == "env" { "usr/bin" } else { "bin" };
        if applet != "sh" && applet != "dpkg" {
            symlink("/bin/busybox", root.join(folder).join(applet)).unwrap();
        }
    }
    // busybox' own shell takes its own dpkg, whatever stands in for it.
    for file in ["/bin/dash", "/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"] {
        let copy = root.join(&file[1..]);
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(file, copy).unwrap();
    }
    symlink("dash", root.join("bin/sh")).unwrap();
    script(&root, "usr/bin/dpkg", "exit 0");
    // The real one can do more than busybox' own, and there is nothing to clean up.
    script(&root, "usr/bin/find", "exit 0");
    script(&root, "usr/sbin/grub-install", "exit 0");
    script(&root, "usr/sbin/update-grub", "echo root=UUID=1-2 >/boot/grub/grub.cfg");
    fs::write(root.join("etc/os-release"), "NAME=nothing\n").unwrap();

    let partition = Partition::whole(SIZE, 1);
    let image = folder.join("disk.raw");
    let mut file = File::create(&image).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all(&partition.boot_record()).unwrap();
    let made = Command::new(find_program("mke2fs").unwrap())
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(&root)
        .arg("-E")
        .arg(format!("offset={},root_owner=0:0", partition.offset))
        .arg(&image)
        .arg(format!("{}k", partition.length / 1024))
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    image
}

/// Boots the builder guest with these commands of a recipe.
fn build(nonce: &str, commands: &[String]) -> Report {
    boot(nonce, commands, "", None, &Cancel::new().unwrap())
}

/// The same, with more on the kernel's command line; with viewers, it is kept running when it fails.
fn boot(
    nonce: &str,
    commands: &[String],
    options: &str,
    viewers: Option<Viewers>,
    cancel: &Cancel,
) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let image = disk(folder.path());
    let work = Work {
        nonce,
        root_partition: 1,
        root_uuid: "1-2",
        sources: None,
        time: None,
        task: Task::Finish { preinst: &[], run: commands, verify: false, tell: None },
    };
    let path = folder.path().join("builder.cpio");
    let guest = GuestPrograms { busybox: &tools().busybox, modules: &tools().modules };
    initramfs(guest, &work).unwrap().write(File::create(&path).unwrap()).unwrap();
    let spec = VmSpec {
        accelerator: Accelerator::Tcg,
        processors: 1,
        memory_mib: 256,
        boot: Boot::Kernel {
            kernel: tools().kernel.clone(),
            initramfs: path,
            command_line: format!("console=ttyS0 panic=-1 mitigations=off {NO_TIMER_CHECK} {options}"),
        },
        disks: vec![Disk::new(image, DiskFormat::Raw)],
        network: Network::None,
        port_name: CONTROL_PORT,
        log_port: None,
        smbios_serial: None,
    };
    let mut asked = Run {
        programs: &programs(),
        spec: &spec,
        nonce,
        limits: limits(Duration::from_secs(60)),
        register: &|_| Ok(()),
        serve: &|_| Ok(()),
        downloads: &Downloads::default,
        holds: viewers.is_some(),
        viewers,
        installer_log: None,
        power_off: PowerOff { within: Duration::from_secs(15), is_needed: false },
        picture: None,
        cancel,
        sink: &Silent,
        stage: Stage::Guest,
    };
    run(&mut asked, File::create(folder.path().join("console.log")).unwrap()).unwrap()
}

#[test]
fn a_recipes_command_finds_neither_the_proof_nor_a_way_to_deliver_it() {
    let nonce = nonce().unwrap();
    let (one, two) = nonce.split_at(16);
    // In two halves, as what is searched for must not find itself.
    let search = format!(
        r#"printf '%s%s\n' {one} {two} >/tmp/needle
found=0
# Every file that the builder's first process has, by the way that its root leads to.
/bin/find /proc/1/root/ -xdev -type f >/tmp/files 2>/dev/null
grep -q /init /tmp/files || {{ echo "the search finds nothing at all"; exit 3; }}
while read -r file; do
    if grep -qaFf /tmp/needle "$file"; then echo "it is in $file"; found=1; fi
done </tmp/files
for file in /proc/[0-9]*/environ /proc/[0-9]*/cmdline; do
    if grep -qaFf /tmp/needle "$file" 2>/dev/null; then echo "it is in $file"; found=1; fi
done
exit $found"#
    );
    let open = r#"ports=0
for port in /dev/vport*; do
    ports=$((ports + 1))
    if (exec 4>"$port") 2>/dev/null; then echo "$port opens"; exit 1; fi
done
[ "$ports" -gt 0 ]"#;
    let report = build(&nonce, &[search, open.to_owned()]);
    assert_eq!(report.outcome, Outcome::Proven, "{}", report.screen);
    let steps: Vec<&str> = report.stages.iter().map(|(name, _)| name.as_str()).collect();
    assert!(steps.contains(&"run-1") && steps.contains(&"run-2"), "{steps:?}");
}

#[test]
fn a_command_that_fills_the_disk_is_named_as_that() {
    let command = "echo filling; dd if=/dev/zero of=/big bs=64k".to_owned();
    let report = build("5fe7", &[command]);
    let failure = super::failure(&report);
    assert_eq!(failure.class(), Class::DiskFull, "{failure}\n{}", report.screen);
    assert!(failure.to_string().contains("step run-1 in the guest failed with status 1"), "{failure}");
}

#[test]
fn a_person_looks_into_a_guest_that_failed_and_ends_it() {
    let folder = tempfile::tempdir().unwrap();
    let viewers = Viewers::open(folder.path()).unwrap();
    let mut console = connect(folder.path()).unwrap();
    console.set_read_timeout(Some(Duration::from_secs(80))).unwrap();
    let cancel = Cancel::new().unwrap();
    let mut person = || -> Result<(), String> {
        // What comes is what differs from the screen before, so it takes a terminal to read it.
        let mut terminal = vt100::Parser::new(50.try_into().unwrap(), 160.try_into().unwrap(), 0);
        let mut wait_for = |console: &mut UnixStream, text: &str| {
            let mut buffer = [0; 4096];
            while !terminal.screen().contents().contains(text) {
                match console.read(&mut buffer) {
                    Ok(0) => return Err(format!("it ended before {text:?}")),
                    Ok(length) => terminal.process(&buffer[..length]),
                    Err(error) => {
                        let screen = terminal.screen().contents();
                        return Err(format!("{error} while waiting for {text:?}: {screen}"));
                    }
                }
            }
            Ok(())
        };
        // Also while it runs, and not only once it is kept.
        wait_for(&mut console, "it works on it")?;
        let seen = Instant::now();
        wait_for(&mut console, "a shell; the system is in /target")?;
        if seen.elapsed() < Duration::from_secs(2) {
            return Err(format!("shown {:?} before it failed", seen.elapsed()));
        }
        // What is typed before the shell has set its terminal up is lost; then it asks.
        wait_for(&mut console, "/ #")?;
        console
            .write_all(b"cat /target/left; echo $((40 + 2))-times\n")
            .map_err(|error| error.to_string())?;
        wait_for(&mut console, "left behind")?;
        wait_for(&mut console, "42-times")?;
        console.write_all(b"exit\n").map_err(|error| error.to_string())
    };
    let command = "echo it works on it >/dev/console; sleep 4; echo left behind >/left; exit 7".to_owned();
    let report = std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let looked = person();
            if looked.is_err() {
                // Otherwise the machine would be kept for an hour.
                cancel.cancel();
            }
            looked
        });
        let report = boot("5fe7", &[command], "hostler.shell", Some(viewers), &cancel);
        looking.join().unwrap().unwrap();
        report
    });
    let failure = super::failure(&report);
    assert!(failure.to_string().contains("step run-1 in the guest failed with status 7"), "{failure}");
    assert!(report.screen.contains("42-times"), "{}", report.screen);
}
