//! One worker process of the daemon, asked directly: a look, or one step, as the daemon has them done.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::Duration;

use hostler_protocol::frame::{Decoder, REPLY_LIMIT, encode};
use hostler_tests::failure::OrFail;
use hostler_tests::place::Place;
use hostler_tests::program;
use hostler_watchdog::descriptors::send;
use hostler_watchdog::model::{
    LoopDevice, LoopIdentity, LoopState, Snapshot, SnapshotDepth, Step, StepResult,
};
use hostler_watchdog::worker::{Query, Request, Response, Task};

/// How long a look or a step may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Workers, one for each request, in the test's own mount namespace.
pub(crate) struct Worker {
    /// The process that workers are copies of.
    pub(crate) child: Child,
    origin: UnixStream,
}

impl Worker {
    pub(crate) fn start(place: &Place) -> Self {
        let (origin, theirs) = UnixStream::pair().or_fail("making a pair of sockets");
        let child = place
            .command(program::path("hostlerd"))
            .arg("worker")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .or_fail("starting workers' origin");
        Self { child, origin }
    }

    /// A worker that waits for its request, and ends with this socket.
    pub(crate) fn waiting(&self) -> UnixStream {
        let (socket, theirs) = UnixStream::pair().or_fail("making a pair of sockets");
        socket.set_read_timeout(Some(PATIENCE)).or_fail("setting a deadline");
        send(&self.origin, &[0], &[theirs.as_fd()]).or_fail("asking for a worker");
        socket
    }

    /// What the worker says in the end, and all that it said that it touches.
    fn ask(&mut self, request: &Request) -> (Response, Vec<String>) {
        let mut socket = self.waiting();
        let bytes = encode(request).or_fail("a request");
        socket.write_all(&bytes).or_fail("sending a request");
        let mut decoder = Decoder::new(REPLY_LIMIT);
        let mut touched = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            while let Some(message) = decoder.next_message().or_fail("a frame") {
                match serde_json::from_slice(&message).or_fail("a response") {
                    Response::Born => {}
                    Response::Touching { what, .. } => touched.push(what),
                    done => return (done, touched),
                }
            }
            let count = socket.read(&mut buffer).or_fail("an answer of the worker");
            assert!(count > 0, "the worker ended after it said that it touches {touched:?}");
            decoder.push(&buffer[..count]);
        }
    }

    pub(crate) fn look(&mut self, depth: SnapshotDepth) -> Snapshot {
        self.look_without(depth, &[]).0
    }

    /// A look that leaves out what an earlier one said that it touches.
    pub(crate) fn look_without(&mut self, depth: SnapshotDepth, skip: &[String]) -> (Snapshot, Vec<String>) {
        self.look_for(Query::host(depth), skip)
    }

    pub(crate) fn look_for(&mut self, query: Query, skip: &[String]) -> (Snapshot, Vec<String>) {
        let (seen, touched) = self.ask(&Request::Observe { query, skip: skip.to_vec() });
        match seen {
            Response::Seen(snapshot) => (*snapshot, touched),
            other => panic!("asked to look, the worker said {other:?}"),
        }
    }

    pub(crate) fn act(&mut self, step: Step) -> StepResult {
        match self.ask(&Request::Act(vec![Task { step, claim: None }])).0 {
            Response::Acted(result) => result,
            other => panic!("asked to act, the worker said {other:?}"),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It ends with its socket; where it hangs, this ends it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The loop device with a node, in a snapshot.
#[track_caller]
pub(crate) fn loop_at<'a>(snapshot: &'a Snapshot, node: &str) -> &'a LoopDevice {
    let is_it = |device: &&LoopDevice| format!("/dev/loop{}", device.number) == node;
    snapshot.loops.iter().find(is_it).or_fail(format_args!("{node} in the snapshot"))
}

/// Its identity, when it is bound.
#[track_caller]
pub(crate) fn identity(device: &LoopDevice) -> LoopIdentity {
    let LoopState::Bound(backing) = device.state else { panic!("{device:?} is not bound") };
    LoopIdentity { number: device.number, sequence: device.sequence.or_fail("its sequence"), backing }
}
