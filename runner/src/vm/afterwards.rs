//! What is done with a machine once there is a verdict: it is let switch itself off, or kept for a person to look
//! into it, and its screen is pictured.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::event::Event;
use crate::passing;

use super::attend::{BEAT, Session};
use super::launch::Machine;
use super::outcome::Failure;
use super::qmp::Said;
use super::run::{Run, RunError};

/// For how long a machine that failed is kept for a person.
const HOLD: Duration = Duration::from_secs(3600);
/// How long qemu may take for a picture of the screen.
const PICTURE_DEADLINE: Duration = Duration::from_secs(5);

impl Session {
    /// Gives a machine that proved itself the time to switch itself off, and says whether it did.
    pub(super) fn let_switch_off(&mut self, run: &Run<'_>, machine: &mut Machine) -> Result<bool, RunError> {
        self.keep(run, machine, run.power_off.within)
    }

    /// Keeps a machine that failed running for a person to look into it.
    pub(super) fn hold(
        &mut self,
        run: &Run<'_>,
        machine: &mut Machine,
        failure: &Failure,
    ) -> Result<(), RunError> {
        let told = format!(
            "{failure}. The machine is kept for {}, until it is switched off, or this build is told to stop",
            humantime::format_duration(HOLD)
        );
        run.sink.event(Event::Warning(told));
        self.keep(run, machine, HOLD).map(drop)
    }

    /// Keeps a machine that is judged running until it ends, for so long at most, or until somebody wants to
    /// stop. Whether it ended.
    fn keep(&mut self, run: &Run<'_>, machine: &mut Machine, within: Duration) -> Result<bool, RunError> {
        let until = Instant::now() + within;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // The verdict stands, whatever is said now.
            let (_, ended) = self.turn(run, machine, Instant::now() + left.min(BEAT))?;
            if ended || left.is_zero() || run.cancel.is_cancelled() {
                return Ok(ended);
            }
        }
    }

    /// Has qemu write a picture of the screen. Whether there is one: a machine that is gone or hangs
    /// gives none.
    pub(super) fn picture(&mut self, machine: &mut Machine, path: &Path) -> bool {
        let Ok(file) = File::create(path) else { return false };
        let deadline = Instant::now() + PICTURE_DEADLINE;
        let mut is_taken = false;
        // An answer to an earlier question may come first, and so each is asked again until it can be.
        let (mut handed_over, mut asked) = (false, false);
        loop {
            if is_taken {
                asked = asked || self.qmp.ask_picture();
                self.talk(machine);
            } else if !handed_over && self.qmp.ask_to_take_file() {
                handed_over = true;
                let command = self.qmp.take_output();
                if passing::send_with(machine.qmp.as_fd(), &command, file.as_fd()).is_err() {
                    return false;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || passing::wait_readable(machine.qmp.as_fd(), left).is_err() {
                return false;
            }
            let mut buffer = [0; 64 * 1024];
            let said = match machine.qmp.read(&mut buffer) {
                Ok(length @ 1..) => self.qmp.push(&buffer[..length]).unwrap_or_default(),
                _ => return false,
            };
            is_taken = is_taken || said.contains(&Said::FileTaken);
            if said.contains(&Said::Picture) {
                return true;
            }
            if handed_over && said.iter().any(|said| matches!(said, Said::Refused(_))) {
                return false;
            }
        }
    }
}
