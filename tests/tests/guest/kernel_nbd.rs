//! Network block devices: one whose server stays, and one that was connected over netlink.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use hostler_tests::failure::{OrFail, wait_for, wait_until};
use hostler_tests::place::Place;
use hostler_tests::{program, scenario};
use hostler_watchdog::kernel::{block, block_calls};
use hostler_watchdog::model::{
    Nbd, NbdIdentity, ProcessIdentity, Snapshot, SnapshotDepth, StartTime, Step, StepResult,
};

use crate::worker::Worker;

const SOON: Duration = Duration::from_secs(20);

fn nbd(snapshot: &Snapshot, number: u32) -> Option<&Nbd> {
    snapshot.nbds.iter().find(|nbd| nbd.number == number)
}

/// A server of an image. It ends when this is dropped.
struct Server(Child);

impl Server {
    fn start(place: &Place, arguments: &[&str]) -> Self {
        let image = place.path("image");
        fs::File::create(&image).and_then(|file| file.set_len(16 << 20)).or_fail("making an image");
        let mut command = place.command("qemu-nbd");
        command.args(["--format=raw", "--persistent"]).args(arguments).arg(image).stdin(Stdio::null());
        Self(command.spawn().or_fail("starting qemu-nbd"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_device_is_disconnected_when_its_server_is_that_server() {
    scenario::guest_apart("qemu-nbd", |place| {
        program::succeed("modprobe", ["nbd"]);
        // Being verbose it stays what was started, and makes no process of its own.
        let mut server = Server::start(place, &["--connect=/dev/nbd3", "--verbose"]);
        let mut worker = Worker::start(place);
        let (seen, _) = wait_for("a connected device with a server", SOON, || {
            nbd(&worker.look(SnapshotDepth::Ownership), 3).and_then(|nbd| nbd.identity)
        });
        // The number is the process's, not that of the thread in it that connected the device.
        assert_eq!(seen.server.pid, server.0.id());
        program::succeed("udevadm", ["settle"]);

        let later = ProcessIdentity { start: StartTime(seen.server.start.0 + 1), ..seen.server };
        let step = Step::DisconnectNbd { nbd: NbdIdentity { server: later, ..seen } };
        assert_eq!(worker.act(step), StepResult::Replaced);
        assert!(nbd(&worker.look(SnapshotDepth::Ownership), 3).is_some());

        assert_eq!(worker.act(Step::DisconnectNbd { nbd: seen }), StepResult::Done);
        wait_until("the device to be free", SOON, || {
            nbd(&worker.look(SnapshotDepth::Ownership), 3).is_none()
        });
        wait_until("the server's end", SOON, || matches!(server.0.try_wait(), Ok(Some(_))));
        assert_eq!(worker.act(Step::DisconnectNbd { nbd: seen }), StepResult::Gone);
    });
}

#[test]
fn a_device_that_was_connected_over_netlink_has_no_server_to_know_it_by() {
    scenario::guest_apart("nbd-client", |place| {
        program::succeed("modprobe", ["nbd"]);
        let socket = place.path("socket");
        let socket = socket.to_str().or_fail("a path that is text");
        let _server = Server::start(place, &[&format!("--socket={socket}"), "--shared=2"]);
        wait_until("the server", SOON, || Path::new(socket).exists());
        program::succeed("nbd-client", ["-unix", socket, "/dev/nbd4"]);
        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let seen = nbd(&snapshot, 4).or_fail("the device in the snapshot");
        assert_eq!(seen.identity, None, "{seen:?}");

        // What the daemon relies on where it does know the server: these two free either kind.
        let node = block::open_node(Path::new("/sys"), seen.device).or_fail("opening the device");
        block_calls::nbd_disconnect(&node).or_fail("NBD_DISCONNECT");
        block_calls::nbd_clear_socket(&node).or_fail("NBD_CLEAR_SOCK");
        drop(node);
        wait_until("the device to be free", SOON, || {
            nbd(&worker.look(SnapshotDepth::Ownership), 4).is_none()
        });
    });
}
