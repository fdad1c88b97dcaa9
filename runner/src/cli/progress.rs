//! How a person or a log sees a build's progress.
//!
//! [`Terminal`] draws one line that changes; [`Lines`] writes plain lines, a beginning and an end of
//! each stage and a sign of life in between. Both clean what they show: it may hold text of a guest.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hostler_runner::event::{Event, Sink, Stage};
use indicatif::{ProgressBar, ProgressStyle};

/// The longest silence of a log.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// The sink that fits standard error.
pub(crate) fn sink() -> Arc<dyn Sink> {
    if std::io::stderr().is_terminal() { Arc::new(Terminal::new()) } else { Arc::new(Lines::new()) }
}

fn cleaned(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(300).collect()
}

/// What a stage does right now, with the bytes that it counts.
fn doing(stage: Stage, doing: &str, bytes: u64, total: Option<u64>) -> String {
    let doing = cleaned(doing);
    let amount = match (bytes, total, stage) {
        (0, None, _) => return doing,
        // A machine's bytes are a sign of life; how many there will be, nobody knows.
        (bytes, None, Stage::Prepare | Stage::Guest | Stage::Verify) => {
            format!("disk {}", bytesize::ByteSize(bytes))
        }
        (bytes, None, _) => bytesize::ByteSize(bytes).to_string(),
        (bytes, Some(total), _) => {
            format!("{} of {}", bytesize::ByteSize(bytes), bytesize::ByteSize(total))
        }
    };
    if doing.is_empty() { amount } else { format!("{doing}, {amount}") }
}

struct Terminal {
    bar: ProgressBar,
    since: Mutex<Option<Instant>>,
}

impl Terminal {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {prefix:10} {elapsed:>4}  {wide_msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        Self { bar, since: Mutex::new(None) }
    }
}

impl Sink for Terminal {
    fn event(&self, event: Event) {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Started(stage) => {
                *since = Some(Instant::now());
                self.bar.reset();
                self.bar.set_prefix(stage.name());
                self.bar.set_message("");
                self.bar.enable_steady_tick(Duration::from_millis(200));
            }
            Event::Progress { stage, doing: what, bytes, total } => {
                self.bar.set_message(doing(stage, &what, bytes, total));
            }
            Event::Finished(stage) => {
                let took = since.take().map_or(0.0, |since| since.elapsed().as_secs_f64());
                self.bar.println(format!("  {:10} {took:6.1} s", stage.name()));
            }
            Event::Note(text) => self.bar.println(format!("  {}", cleaned(&text))),
            Event::Warning(text) => self.bar.println(format!("  warning: {}", cleaned(&text))),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

struct Lines {
    state: Arc<Mutex<State>>,
}

impl Lines {
    fn new() -> Self {
        let state: Arc<Mutex<State>> = Arc::default();
        let beaten = Arc::downgrade(&state);
        // Some stages do one long thing, such as converting the image, and have nothing to tell of it.
        // Without this thread, the log would be silent meanwhile and nothing else.
        let _ = thread::Builder::new().name("heartbeat".to_owned()).spawn(move || {
            while let Some(state) = beaten.upgrade() {
                let line = locked(&state).heartbeat(Instant::now());
                drop(state);
                write(line);
                thread::sleep(Duration::from_secs(1));
            }
        });
        Self { state }
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write(line: Option<String>) {
    if let Some(line) = line {
        // A log that cannot be written does not stop a build.
        let _ = writeln!(std::io::stderr(), "hostler: {line}");
    }
}

#[derive(Default)]
struct State {
    running: Option<(Stage, Instant)>,
    told: Option<Instant>,
    /// The step of a guest that was told last.
    step: String,
    /// What is being done, with its bytes.
    doing: String,
}

impl State {
    /// The line for an event, if it is to have one.
    fn line(&mut self, now: Instant, event: Event) -> Option<String> {
        let line = match event {
            Event::Started(stage) => {
                self.running = Some((stage, now));
                self.step.clear();
                self.doing.clear();
                format!("{stage}: start")
            }
            Event::Finished(stage) => {
                let since = self.running.take().map_or(now, |(_, since)| since);
                let seconds = now.saturating_duration_since(since).as_secs_f64();
                format!("{stage}: done after {seconds:.1} s")
            }
            Event::Note(text) => cleaned(&text),
            Event::Warning(text) => format!("warning: {}", cleaned(&text)),
            Event::Progress { stage, doing: what, bytes, total } => {
                self.doing = doing(stage, &what, bytes, total);
                // A guest's steps are few and long; what a download does changes with every file.
                let is_step = matches!(stage, Stage::Prepare | Stage::Guest | Stage::Verify);
                if !is_step || what == self.step {
                    return self.heartbeat(now);
                }
                self.step = what;
                return self.alive(now);
            }
        };
        self.told = Some(now);
        Some(line)
    }

    /// A sign of life, if it is time for one.
    fn heartbeat(&mut self, now: Instant) -> Option<String> {
        let silent = self.told.is_none_or(|told| now.saturating_duration_since(told) >= HEARTBEAT);
        if silent { self.alive(now) } else { None }
    }

    fn alive(&mut self, now: Instant) -> Option<String> {
        let (stage, since) = self.running?;
        self.told = Some(now);
        let seconds = now.saturating_duration_since(since).as_secs_f64();
        let doing = if self.doing.is_empty() { String::new() } else { format!(", {}", self.doing) };
        Some(format!("{stage}: {seconds:.0} s{doing}"))
    }
}

impl Sink for Lines {
    fn event(&self, event: Event) {
        // Written while it is locked, so that lines keep their order.
        let mut state = locked(&self.state);
        write(state.line(Instant::now(), event));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(stage: Stage, doing: &str) -> Event {
        Event::Progress { stage, doing: doing.into(), bytes: 0, total: None }
    }

    #[test]
    fn a_log_gets_beginnings_ends_and_a_sign_of_life() {
        let mut state = State::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut line = |seconds, event| state.line(at(seconds), event);
        assert_eq!(line(0, Event::Started(Stage::Fetch)), Some("fetch: start".into()));
        assert_eq!(line(1, progress(Stage::Fetch, "a.deb")), None);
        assert_eq!(line(29, progress(Stage::Fetch, "b.deb")), None);
        assert_eq!(line(30, progress(Stage::Fetch, "c.deb")), Some("fetch: 30 s, c.deb".into()));
        assert_eq!(line(31, progress(Stage::Fetch, "d.deb")), None);
        assert_eq!(line(32, Event::Finished(Stage::Fetch)), Some("fetch: done after 32.0 s".into()));
    }

    #[test]
    fn a_stage_with_nothing_to_tell_gives_a_sign_of_life_as_well() {
        let mut state = State::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(state.heartbeat(at(0)), None, "nothing runs");
        state.line(at(1), Event::Started(Stage::Convert));
        assert_eq!(state.heartbeat(at(30)), None);
        assert_eq!(state.heartbeat(at(31)), Some("convert: 30 s".into()));
        assert_eq!(state.heartbeat(at(32)), None);
        state.line(at(33), Event::Finished(Stage::Convert));
        assert_eq!(state.heartbeat(at(99)), None, "nothing runs any more");
    }

    #[test]
    fn each_step_of_a_guest_gets_a_line() {
        let mut state = State::default();
        let now = Instant::now();
        state.line(now, Event::Started(Stage::Guest));
        assert!(state.line(now, progress(Stage::Guest, "configure")).is_some());
        assert!(state.line(now, progress(Stage::Guest, "configure")).is_none());
        assert!(state.line(now, progress(Stage::Guest, "boot")).is_some());
    }

    #[test]
    fn bytes_are_told_as_what_they_are() {
        assert_eq!(doing(Stage::Fetch, "a.deb", 1024, Some(2048)), "a.deb, 1.0 KiB of 2.0 KiB");
        assert_eq!(doing(Stage::Fetch, "", 1024, Some(2048)), "1.0 KiB of 2.0 KiB");
        assert_eq!(doing(Stage::Guest, "configure", 1024, None), "configure, disk 1.0 KiB");
        assert_eq!(doing(Stage::Guest, "boo\u{1b}ting", 0, None), "booting");
    }

    #[test]
    fn escapes_do_not_reach_the_log() {
        let mut state = State::default();
        let line = state.line(Instant::now(), Event::Note("a\u{1b}[2Jb".into()));
        assert_eq!(line, Some("a[2Jb".into()));
    }
}
