//! The one thread that creates child processes which must not outlive this one.
//!
//! They have a parent-death signal, so that not even SIGKILL of this process leaves one running. That
//! signal follows the *thread* that made the child (prctl(2), `PR_SET_PDEATHSIG`): a child of a worker
//! thread would die with that worker, in the middle of its work. So every machine and every tool is
//! born on a thread that lives as long as the process.

use std::io;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use crate::calls::die_with_the_starter;

struct Request {
    command: Command,
    answer: Sender<io::Result<Child>>,
}

static SPAWNER: OnceLock<Option<Sender<Request>>> = OnceLock::new();

/// Spawns `command` on the permanent thread. What it starts is killed when this process dies.
pub(crate) fn spawn(command: Command) -> io::Result<Child> {
    let requests = SPAWNER
        .get_or_init(start)
        .as_ref()
        .ok_or_else(|| io::Error::other("the thread that starts processes could not be started"))?;
    let (answer, result) = channel();
    requests
        .send(Request { command, answer })
        .map_err(|_| io::Error::other("the thread that starts processes has ended"))?;
    result.recv().map_err(|_| io::Error::other("the thread that starts processes gave no answer"))?
}

fn start() -> Option<Sender<Request>> {
    let (requests, inbox) = channel::<Request>();
    thread::Builder::new()
        .name("spawner".to_owned())
        .spawn(move || {
            for mut request in inbox {
                die_with_the_starter(&mut request.command);
                // Nobody waits any more when this fails; the child's owner reaps it, so a child
                // without one is ended here.
                if let Err(unclaimed) = request.answer.send(request.command.spawn())
                    && let Ok(mut child) = unclaimed.0
                {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
        })
        .ok()
        .map(|_| requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let mut child = thread::spawn(|| {
            let mut command = Command::new("sleep");
            command.arg("30");
            spawn(command)
        })
        .join()
        .unwrap()
        .unwrap();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_missing_program_is_an_error() {
        let error = spawn(Command::new("/nonexistent/program")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
