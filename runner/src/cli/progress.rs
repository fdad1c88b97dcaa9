//! How a person or a log sees a build's progress.
//!
//! [`Terminal`] draws one line that changes; [`Lines`] writes plain lines, a beginning and an end of
//! each stage and a sign of life in between. Both clean what they show: it may hold text of a guest.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hostler_runner::event::{Event, Sink, Stage};
use indicatif::{ProgressBar, ProgressStyle};

/// The longest silence of a log while progress is told.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// The sink that fits standard error.
pub(crate) fn sink() -> Arc<dyn Sink> {
    if std::io::stderr().is_terminal() { Arc::new(Terminal::new()) } else { Arc::new(Lines::default()) }
}

fn cleaned(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(300).collect()
}

fn amount(bytes: u64, total: Option<u64>) -> String {
    match (bytes, total) {
        (0, None) => String::new(),
        (bytes, None) => bytesize::ByteSize(bytes).to_string(),
        (bytes, Some(total)) => {
            format!("{} of {}", bytesize::ByteSize(bytes), bytesize::ByteSize(total))
        }
    }
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
            Event::Progress { doing, bytes, total, .. } => {
                self.bar.set_message(format!("{}  {}", cleaned(&doing), amount(bytes, total)));
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

#[derive(Default)]
struct Lines {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    since: Option<Instant>,
    told: Option<Instant>,
    doing: String,
}

impl State {
    /// The line for an event, if it is to have one.
    fn line(&mut self, now: Instant, event: Event) -> Option<String> {
        let seconds = self.since.map_or(0.0, |since| now.saturating_duration_since(since).as_secs_f64());
        let line = match event {
            Event::Started(stage) => {
                self.since = Some(now);
                self.doing.clear();
                format!("{stage}: start")
            }
            Event::Finished(stage) => format!("{stage}: done after {seconds:.1} s"),
            Event::Note(text) => cleaned(&text),
            Event::Warning(text) => format!("warning: {}", cleaned(&text)),
            Event::Progress { stage, doing, bytes, total } => {
                return self.progress(now, stage, &cleaned(&doing), &amount(bytes, total), seconds);
            }
        };
        self.told = Some(now);
        Some(line)
    }

    fn progress(
        &mut self,
        now: Instant,
        stage: Stage,
        doing: &str,
        amount: &str,
        seconds: f64,
    ) -> Option<String> {
        let silent = self.told.is_none_or(|told| now.saturating_duration_since(told) >= HEARTBEAT);
        // A guest's steps are few and long; what a download does changes with every file.
        let new = matches!(stage, Stage::Guest | Stage::Verify) && doing != self.doing;
        if !silent && !new {
            return None;
        }
        self.told = Some(now);
        doing.clone_into(&mut self.doing);
        Some(format!("{stage}: {seconds:.0} s, {doing} {amount}").trim_end().to_owned())
    }
}

impl Sink for Lines {
    fn event(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = state.line(Instant::now(), event) {
            // A log that cannot be written does not stop a build.
            let _ = writeln!(std::io::stderr(), "hostler: {line}");
        }
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
    fn each_step_of_a_guest_gets_a_line() {
        let mut state = State::default();
        let now = Instant::now();
        state.line(now, Event::Started(Stage::Guest));
        assert!(state.line(now, progress(Stage::Guest, "configure")).is_some());
        assert!(state.line(now, progress(Stage::Guest, "configure")).is_none());
        assert!(state.line(now, progress(Stage::Guest, "boot")).is_some());
    }

    #[test]
    fn escapes_do_not_reach_the_log() {
        let mut state = State::default();
        let line = state.line(Instant::now(), Event::Note("a\u{1b}[2Jb".into()));
        assert_eq!(line, Some("a[2Jb".into()));
    }
}
