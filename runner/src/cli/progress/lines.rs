//! A log: a beginning and an end of each stage, each step of a guest, and a sign of life in between.
//!
//! In a CI system the stages are its groups, and failures and warnings its annotations. A guest's text
//! cannot act there: every line starts with a word of ours, and GitHub's older commands, which may be
//! anywhere in a line, are broken up.

use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use hostler_runner::event::{Event, Sink, Stage};

use super::{cleaned, doing};

/// The longest silence of a log.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// Whose groups and annotations a log has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Groups {
    /// Nobody's.
    #[default]
    None,
    /// GitHub Actions'.
    Github,
    /// GitLab CI's.
    Gitlab,
}

impl Groups {
    fn begin(self, stage: Stage) -> Option<String> {
        match self {
            Self::None => None,
            Self::Github => Some(format!("::group::{stage}")),
            Self::Gitlab => {
                Some(format!("\u{1b}[0Ksection_start:{}:hostler_{stage}\r\u{1b}[0K{stage}", unix_time()))
            }
        }
    }

    fn end(self, stage: Stage) -> Option<String> {
        match self {
            Self::None => None,
            Self::Github => Some("::endgroup::".to_owned()),
            Self::Gitlab => Some(format!("\u{1b}[0Ksection_end:{}:hostler_{stage}\r\u{1b}[0K", unix_time())),
        }
    }

    /// An annotation, where there are any.
    fn annotation(self, level: &str, title: &str, text: &str) -> Option<String> {
        (self == Self::Github).then(|| format!("::{level} title={title}::{}", escaped(text)))
    }

    pub(super) fn shown(self, text: &str) -> String {
        if self == Self::Github { text.replace("##[", "## [") } else { text.to_owned() }
    }
}

/// The value of a workflow command, as GitHub reads it.
fn escaped(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

pub(super) struct Lines {
    state: Arc<Mutex<State>>,
}

impl Lines {
    pub(super) fn new(groups: Groups) -> Self {
        let state = Arc::new(Mutex::new(State { groups, ..State::default() }));
        let beaten = Arc::downgrade(&state);
        // Some stages do one long thing, such as converting the image, and have nothing to tell of it.
        // Without this thread, the log would be silent meanwhile and nothing else.
        let _ = thread::Builder::new().name("heartbeat".to_owned()).spawn(move || {
            while let Some(state) = beaten.upgrade() {
                let mut locked = locked(&state);
                let line = locked.heartbeat(Instant::now());
                write(line.map(|line| locked.said(&line)));
                drop(locked);
                drop(state);
                thread::sleep(Duration::from_secs(1));
            }
        });
        Self { state }
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write(lines: impl IntoIterator<Item = String>) {
    for line in lines {
        // A log that cannot be written does not stop a build.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

#[derive(Default)]
struct State {
    groups: Groups,
    running: Option<(Stage, Instant)>,
    told: Option<Instant>,
    /// The step of a guest that was told last.
    step: String,
    /// What is being done, with its bytes.
    doing: String,
}

impl State {
    fn said(&self, line: &str) -> String {
        format!("hostler: {}", self.groups.shown(line))
    }

    /// All that is written for an event.
    fn lines(&mut self, now: Instant, event: Event) -> Vec<String> {
        let (before, after) = match &event {
            Event::Started(stage) => (self.groups.begin(*stage), None),
            Event::Finished(stage) | Event::GaveUp(stage) => (None, self.groups.end(*stage)),
            Event::Warning(text) => (self.groups.annotation("warning", "hostler", &cleaned(text)), None),
            Event::Failed { class, message, .. } => {
                let text = format!("{}\nWhat to do: {}", cleaned(message), class.advice());
                (self.groups.annotation("error", &format!("hostler {class}"), &text), None)
            }
            _ => (None, None),
        };
        let line = self.line(now, event).map(|line| self.said(&line));
        before.into_iter().chain(line).chain(after).collect()
    }

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
            Event::GaveUp(stage) => {
                let since = self.running.take().map_or(now, |(_, since)| since);
                let seconds = now.saturating_duration_since(since).as_secs_f64();
                format!("{stage}: failed after {seconds:.1} s")
            }
            // The program's last words tell of these.
            Event::Built { .. } | Event::Failed { .. } => return None,
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
        write(state.lines(Instant::now(), event));
    }
}

#[cfg(test)]
mod tests {
    use hostler_runner::class::Class;

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
    fn escapes_do_not_reach_the_log() {
        let mut state = State::default();
        let line = state.line(Instant::now(), Event::Note("a\u{1b}[2Jb".into()));
        assert_eq!(line, Some("a[2Jb".into()));
    }

    #[test]
    fn githubs_groups_and_annotations_are_around_the_lines() {
        let mut state = State { groups: Groups::Github, ..State::default() };
        let now = Instant::now();
        assert_eq!(
            state.lines(now, Event::Started(Stage::Guest)),
            ["::group::guest", "hostler: guest: start"]
        );
        assert_eq!(state.lines(now, Event::Note("##[add-mask]x".into())), ["hostler: ## [add-mask]x"]);
        assert_eq!(
            state.lines(now, Event::GaveUp(Stage::Guest)),
            ["hostler: guest: failed after 0.0 s", "::endgroup::"]
        );
        let failed = Event::Failed { class: Class::Stalled, message: "100%\n::x::".into(), page: None };
        let lines = state.lines(now, failed);
        assert_eq!(lines.len(), 1);
        assert!(
            lines[0].starts_with("::error title=hostler stalled::100%25::x::%0AWhat to do: "),
            "{lines:?}"
        );
    }

    #[test]
    fn gitlabs_sections_have_a_beginning_and_an_end_of_one_name() {
        let mut state = State { groups: Groups::Gitlab, ..State::default() };
        let now = Instant::now();
        let begin = state.lines(now, Event::Started(Stage::Guest));
        let end = state.lines(now, Event::Finished(Stage::Guest));
        let name = |line: &str| line.split(':').next_back().map(str::to_owned);
        assert!(begin[0].starts_with("\u{1b}[0Ksection_start:"), "{begin:?}");
        assert!(end[1].starts_with("\u{1b}[0Ksection_end:"), "{end:?}");
        assert_eq!(name(&begin[0]).unwrap(), "hostler_guest\r\u{1b}[0Kguest");
        assert_eq!(name(&end[1]).unwrap(), "hostler_guest\r\u{1b}[0K");
    }
}
