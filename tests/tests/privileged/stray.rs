//! qemu processes that belong to no lease are listed, with what a person needs to find out whose they are.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use hostler_protocol::methods::StrayQemu;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_for};
use hostler_tests::place::{Place, kill};
use hostler_tests::probe::ProcessSeen;
use hostler_tests::{probe, program, scenario};

const SOON: Duration = Duration::from_secs(10);

/// Those with a disk below a directory: others on this host run qemu, too.
fn with_disk_below(daemon: &Daemon<'_>, directory: &Path) -> Vec<StrayQemu> {
    let is_below = |qemu: &StrayQemu| qemu.disks.iter().any(|disk| Path::new(disk).starts_with(directory));
    daemon.status().stray_qemu.into_iter().filter(is_below).collect()
}

fn end(mut child: Child) {
    kill(child.id());
    child.wait().or_fail("waiting for a process of the test");
}

fn disk(place: &Place, name: &str) -> std::path::PathBuf {
    let path = place.path(name);
    std::fs::write(&path, vec![0u8; 1024 * 1024]).or_fail("making a disk");
    path
}

#[test]
fn a_stray_qemu_is_listed_with_who_started_it_and_its_disks() {
    scenario::privileged("stray", |place| {
        let daemon = Daemon::start(place, &Settings { metrics: true, ..Settings::default() });
        // Named like it: what it is called in a list is no proof, its program's file is.
        let qemu = place.path("qemu-system-x86_64");
        std::fs::copy("/bin/sleep", &qemu).or_fail("copying sleep");
        let image = disk(place, "a disk");
        let script = r#"exec 3<"$1"; "$0" 600 & echo $! > pid; wait"#;
        let mut shell = place.command("/bin/sh");
        shell.args(["-c", script]).arg(&qemu).arg(&image).current_dir(place.path(""));
        let shell = shell.spawn().or_fail("starting a shell");
        let process = probe::pid_from(&place.path("pid"));
        let (found, _) = wait_for("the stray", SOON, || {
            Some(with_disk_below(&daemon, &place.path(""))).filter(|found| !found.is_empty())
        });
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].pid, found[0].uid), (process.pid, 0));
        assert_eq!(found[0].program, "qemu-system-x86_64");
        assert_eq!(found[0].disks, [image.to_string_lossy()]);
        let parent = format!("process {} (sh)", shell.id());
        assert!(found[0].started_by.starts_with(&parent), "{found:?}");
        assert!(found[0].started_by.contains("control group /"), "{found:?}");
        assert!((0.0..60.0).contains(&found[0].age_seconds), "{found:?}");
        let told = daemon.ask(&["status"]).succeeded();
        let line = format!("  process {} (qemu-system-x86_64, uid 0) for ", process.pid);
        assert!(told.contains("qemu of no lease, left alone:") && told.contains(&line), "{told}");
        let metrics = crate::metrics::get(daemon.metrics(), "/metrics").or_fail("the metrics");
        let count = metrics.lines().find_map(|line| line.strip_prefix("hostler_stray_qemu ")?.parse().ok());
        assert!(count >= Some(1.0), "{metrics}");
        assert!(process.runs());
        kill(process.pid);
        end(shell);
    });
}

#[test]
fn a_real_qemu_is_listed_and_that_of_a_lease_is_not() {
    scenario::privileged("stray-real", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let (own, stray) = (disk(place, "own.raw"), disk(place, "stray.raw"));
        let arguments = |disk: &Path| {
            let drive = format!("file={},format=raw,if=none,id=disk", disk.display());
            ["-S", "-display", "none", "-nodefaults", "-machine", "none", "-drive", &drive].map(str::to_owned)
        };
        // Whoever starts it is gone: it is the first process's child then.
        let mut launcher = place.command("/bin/sh");
        launcher.args(["-c", "\"$@\" >/dev/null 2>&1 & echo $! > pid", "sh", "qemu-system-x86_64"]);
        launcher.args(arguments(&stray)).current_dir(place.path("")).stdin(Stdio::null());
        program::finish(&mut launcher);
        let process = probe::pid_from(&place.path("pid"));
        let mut run = daemon.hostler(&["run", "--name", "machine", "--", "qemu-system-x86_64"]);
        let run = run.args(arguments(&own)).stdin(Stdio::null()).spawn().or_fail("starting hostler");
        wait_for("both machines", SOON, || {
            let of_lease = daemon.lease("machine")?.resources;
            let is_there = with_disk_below(&daemon, &stray).len() == 1;
            let runs = of_lease.iter().any(|one| one.detail.starts_with("qemu-system"));
            (is_there && runs).then_some(())
        });
        let found = with_disk_below(&daemon, &place.path(""));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].pid, process.pid);
        assert_eq!(found[0].disks, [stray.to_string_lossy()]);
        assert!(found[0].started_by.contains("control group /"), "{found:?}");
        end(run);
        daemon.wait_for_end("machine", SOON);
        assert!(ProcessSeen::of(process.pid).runs(), "it is listed only");
        kill(process.pid);
        hostler_tests::place::wait_for_end(&[process], SOON);
    });
}
