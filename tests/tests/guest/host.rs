//! What else lives on a host that systemd runs: services with mount namespaces of their own.

use std::process::{Command, Stdio};
use std::time::Duration;

use hostler_protocol::lease::LeaseState;
use hostler_protocol::resource::{Kind, Outcome};
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{Place, kill};
use hostler_tests::stack::Shape;
use hostler_tests::{probe, program, scenario};

const SOON: Duration = Duration::from_secs(10);

/// A service that systemd starts; stopped when it is dropped.
struct Service(String);

impl Service {
    fn start(place: &Place, properties: &[&str]) -> Self {
        let unit = place.path("").file_name().or_fail("the place's name").to_string_lossy().into_owned();
        let mut command = Command::new("systemd-run");
        command.args(["--quiet", "--unit", &unit]);
        for property in properties {
            command.args(["--property", property]);
        }
        program::finish(command.args(["sleep", "600"])).succeeded();
        Self(unit)
    }

    /// The mounts that it sees, as text.
    fn mounts(&self) -> String {
        let pid = program::succeed("systemctl", ["show", "--property=MainPID", "--value", &self.0]);
        std::fs::read_to_string(format!("/proc/{}/mountinfo", pid.trim())).unwrap_or_default()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = Command::new("systemctl").args(["kill", "--signal=KILL", &self.0]).output();
        let _ = Command::new("systemctl").args(["stop", &self.0]).output();
    }
}

#[test]
fn a_service_that_started_while_the_leak_was_there_does_not_pin_it() {
    scenario::guest("service", |place| {
        let claim = place.directory("claim");
        let image = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let script = r#"
            device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt
            mkdir mnt/dev; mount --bind /dev mnt/dev
            echo $$ > shell; sleep 600
        "#;
        let mut run = daemon.run_script("build", &claim, script);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("shell"));
        // As many of Debian's services are: its namespace is a copy of the host's, which follows it.
        let service = Service::start(place, &["PrivateMounts=yes", "ProtectSystem=yes"]);
        let point = claim.join("mnt").to_string_lossy().into_owned();
        wait_until("the leak in the service's namespace", SOON, || service.mounts().contains(&point));
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        daemon.wait_for_end("build", SOON);
        assert_eq!(probe::mounts_below(&claim), []);
        assert!(!probe::loops().iter().any(|device| device.backing == image));
        assert!(!service.mounts().is_empty() && !service.mounts().contains(&point));
        bystander.assert_untouched();
    });
}

/// A recursive bind of a shared mount is undone by parting it from its peers first, or `/sys/fs/cgroup`
/// would go from the host, too. From then on its copies in the namespaces of services stay. They even
/// have them twice: systemd binds `/` and moves that over the first one, which no file of `/proc` shows
/// and no path reaches. So there is nothing to be done but to tell, and to try again.
#[test]
fn what_services_keep_of_a_recursive_bind_is_told_and_goes_with_them() {
    scenario::guest_alone("recursive", |place| {
        let claim = place.directory("claim");
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let hosts = || {
            let outside = probe::mounts().into_iter().filter(|mount| !mount.point.starts_with(place.root()));
            outside.map(|mount| (mount.number, mount.point)).collect::<Vec<_>>()
        };
        let before = hosts();
        let script = format!("{}\necho $$ > shell; sleep 600", Shape::Recursive.script("lease"));
        let mut run = daemon.run_script("build", &claim, &script);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let shell = probe::pid_from(&claim.join("shell"));
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        let (lease, _) = daemon.wait_for_state("build", LeaseState::Pinned, SOON);
        let report = lease.report.or_fail("a report");
        let of = |kind| report.resources.iter().filter(move |resource| resource.kind == kind);
        assert!(of(Kind::Mount).all(|mount| mount.outcome == Outcome::Reclaimed), "{report:?}");
        let device = of(Kind::Loop).next().or_fail("the loop device in the report");
        assert_eq!(device.outcome, Outcome::Pinned, "{report:?}");
        assert!(!device.detail.is_empty());
        assert_eq!(probe::mounts_below(&claim), []);
        assert!(!shell.runs());
        assert_eq!(hosts(), before, "the host's own mounts");

        program::succeed("systemctl", ["restart", "systemd-udevd.service"]);
        daemon.wait_for_end("build", SOON);
        assert_eq!(probe::loops_below(&claim), []);
        assert_eq!(hosts(), before, "the host's own mounts");
        bystander.assert_untouched();
    });
}
