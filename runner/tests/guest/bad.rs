//! Guests, and things in the place of qemu, that do what no guest should: each ends with the right class,
//! in bounded time, memory and disk.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use hostler_runner::vm::argv::{Disk, DiskFormat};

use super::*;

/// Runs a shell script in qemu's place; its console is descriptor 100, its control port 101.
fn impostor(script: &str, no_progress: Duration) -> (Report, u64) {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("qemu");
    fs::write(&program, format!("#!/bin/bash\n{script}\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    run_one(folder.path(), &Programs { qemu: program, ..programs() }, &[], no_progress)
}

/// The report, and the size of the console's log.
fn run_one(folder: &Path, programs: &Programs, disks: &[Disk], no_progress: Duration) -> (Report, u64) {
    let spec = VmSpec {
        accelerator: Accelerator::Tcg,
        processors: 1,
        memory_mib: 256,
        boot: Boot::Disk,
        disks: disks.to_vec(),
        network: Network::None,
        port_name: CONTROL_PORT,
        log_port: None,
        smbios_serial: None,
    };
    let picture = folder.join("screen.png");
    let mut asked = Run {
        programs,
        spec: &spec,
        nonce: "5fe7",
        limits: limits(no_progress),
        register: &|_| Ok(()),
        serve: &|_| Ok(()),
        downloads: &Downloads::default,
        viewers: None,
        holds: false,
        installer_log: None,
        power_off: PowerOff { within: Duration::from_secs(15), is_needed: false },
        picture: Some(&picture),
        cancel: &Cancel::new().unwrap(),
        sink: &Silent,
        stage: Stage::Guest,
    };
    let log = folder.join("console.log");
    let report = run(&mut asked, File::create(&log).unwrap()).unwrap();
    (report, fs::metadata(&log).unwrap().len())
}

/// What this process has in memory, in bytes; proc_pid_statm(5).
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// The memory that tests at the same time take counts here too.
const MUCH: u64 = 256 << 20;

#[test]
fn a_gigabyte_on_the_console_is_a_flood_and_most_of_it_is_not_kept() {
    let before = resident();
    let started = Instant::now();
    let script = "head -c 1G /dev/zero | tr '\\0' 'x' | fold -w 200 >&100";
    let (report, logged) = impostor(script, Duration::from_secs(60));
    assert_eq!(failure(&report).class(), Class::ConsoleFlood, "{:?}", report.outcome);
    assert!(logged < (64 << 20) + 1000, "{logged} bytes were kept");
    assert!(resident() < before + MUCH, "{} after {before}", resident());
    println!("{} bytes of the flood took {:.1} s", report.console_bytes, started.elapsed().as_secs_f64());
}

#[test]
fn escape_sequences_without_end_take_no_memory_and_reach_nobody() {
    let before = resident();
    // A title, a picture and a string that never end, then text on a screen that was turned upside down.
    let script = r"printf '\033]0;' >&100; head -c 40M /dev/zero | tr '\0' 'x' >&100
printf '\033P0;1|' >&100; head -c 40M /dev/zero | tr '\0' 'y' >&100
printf '\033\\\033[2J\033[?5h\033[999;999H\033[31mthe \033]8;;http://x\033\\end\r\n' >&100
echo 'done 5fe8' >&101; sleep 5";
    let (report, _) = impostor(script, Duration::from_secs(60));
    assert_eq!(failure(&report).class(), Class::NoProof, "{:?}", report.outcome);
    assert!(resident() < before + MUCH, "{} after {before}", resident());
    let texts = std::iter::once(&report.screen).chain(&report.console_tail);
    for text in texts {
        assert!(!text.chars().any(|one| one.is_control() && one != '\n'), "{text:?}");
    }
    assert!(report.screen.contains("the end"), "{}", report.screen);
}

#[test]
fn rubbish_on_every_channel_is_a_failure_like_any_other() {
    let script =
        "for port in 100 101; do head -c 300k /dev/urandom >&$port; done; echo nonsense >&102; sleep 20";
    let (report, _) = impostor(script, Duration::from_secs(60));
    assert_eq!(failure(&report).class(), Class::QemuUnresponsive, "{:?}", report.outcome);
    let (report, _) = impostor("exit 7", Duration::from_secs(60));
    let Failure::QemuDied { said, .. } = failure(&report) else { panic!("{:?}", report.outcome) };
    assert!(said.contains("exit status: 7"), "{said}");
}

#[test]
fn a_machine_without_anything_to_boot_is_known_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty.raw");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let disk = Disk::new(path, DiskFormat::Raw);
    let (report, _) = run_one(folder.path(), &programs(), &[disk], Duration::from_secs(60));
    let failure = failure(&report);
    assert_eq!(failure.class(), Class::BootFailed, "{failure}");
    assert!(report.took < Duration::from_secs(30), "{:?}", report.took);
    assert!(failure.to_string().contains("No bootable device"), "{failure}");
    let picture = fs::read(folder.path().join("screen.png")).unwrap();
    assert!(report.has_picture && picture.starts_with(b"\x89PNG\r\n"));
}
