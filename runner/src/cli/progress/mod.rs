//! How a person, a log or a program sees a build's progress.
//!
//! One stream of events, and a sink for each that listens: [`terminal`] draws one line that changes,
//! [`lines`] writes a plain log, with the groups and annotations of a CI system where it is in one,
//! [`json`] writes each event as a line, [`junit`] a report at the end. [`history`] remembers how long
//! stages took. All clean what they show: it may hold text of a guest.

mod history;
mod json;
mod junit;
mod lines;
mod terminal;

use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use hostler_runner::event::{Event, Sink, Stage};

use history::History;

/// The form of what is shown on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// What fits: a terminal's, that of the CI system that runs this, else a plain log.
    Auto,
    /// One line that changes, with an estimate of the time that is left.
    Terminal,
    /// A line for each beginning, end and step, and a sign of life every 30 s.
    Plain,
    /// One JSON object on each line.
    Json,
    /// A log with the groups and annotations of GitHub Actions.
    Github,
    /// A log with the sections of GitLab CI.
    Gitlab,
}

/// What to tell, and where.
#[derive(Clone, Debug, Args)]
pub(crate) struct Telling {
    /// How to show the progress on standard error.
    #[arg(long, value_name = "FORM", value_enum, default_value_t = Form::Auto)]
    pub(crate) progress: Form,
    /// Also write each event as a JSON object on a line of this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) events: Option<PathBuf>,
    /// Also write a JUnit report, with a test case for each stage, to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) junit: Option<PathBuf>,
}

impl Telling {
    /// The files that were asked for, opened: a path that cannot be written to is known at the start.
    pub(crate) fn open(&self) -> io::Result<Files> {
        let create = |path: &Path| {
            File::create(path)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
        };
        Ok(Files {
            events: self.events.as_deref().map(create).transpose()?,
            junit: self.junit.as_deref().map(create).transpose()?,
        })
    }
}

/// Files for those that listen beside standard error.
#[derive(Debug, Default)]
pub(crate) struct Files {
    pub(crate) events: Option<File>,
    pub(crate) junit: Option<File>,
}

impl Form {
    /// The form that fits, where none was chosen.
    pub(crate) fn settled(self) -> Self {
        match self {
            Self::Auto => fitting(io::stderr().is_terminal(), |name| std::env::var(name).ok()),
            form => form,
        }
    }

    /// A text of somebody else's, so that nothing in it acts on the CI system that shows it.
    pub(crate) fn shown(self, text: &str) -> String {
        let groups = if self.settled() == Self::Github { lines::Groups::Github } else { lines::Groups::None };
        groups.shown(text)
    }

    /// The word for it on the command line.
    pub(crate) fn word(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

fn fitting(is_terminal: bool, variable: impl Fn(&str) -> Option<String>) -> Form {
    let is_true = |name| variable(name).is_some_and(|value| value == "true");
    if is_terminal {
        Form::Terminal
    } else if is_true("GITHUB_ACTIONS") {
        Form::Github
    } else if is_true("GITLAB_CI") {
        Form::Gitlab
    } else {
        Form::Plain
    }
}

/// All that listen to the build of an image of this name; `cache` is where the times of earlier builds
/// are remembered.
pub(crate) fn sink(form: Form, files: Files, name: &str, cache: &Path) -> Arc<dyn Sink> {
    let history = History::load(cache, name);
    let shown = shown(form, history.clone());
    let mut sinks = vec![shown, Box::new(history::Recorder::new(history))];
    if let Some(events) = files.events {
        sinks.push(Box::new(json::JsonLines::new(events)));
    }
    if let Some(junit) = files.junit {
        sinks.push(Box::new(junit::Junit::new(junit, name.to_owned())));
    }
    Arc::new(All(sinks))
}

/// What fits standard error, for work that is no build.
pub(crate) fn simple() -> Arc<dyn Sink> {
    Arc::new(All(vec![shown(Form::Auto, History::default())]))
}

fn shown(form: Form, history: History) -> Box<dyn Sink> {
    match form.settled() {
        Form::Terminal => Box::new(terminal::Terminal::new(history)),
        Form::Json => Box::new(json::JsonLines::new(io::stderr())),
        Form::Github => Box::new(lines::Lines::new(lines::Groups::Github)),
        Form::Gitlab => Box::new(lines::Lines::new(lines::Groups::Gitlab)),
        Form::Plain | Form::Auto => Box::new(lines::Lines::new(lines::Groups::None)),
    }
}

struct All(Vec<Box<dyn Sink>>);

impl Sink for All {
    fn event(&self, event: Event) {
        for sink in &self.0 {
            sink.event(event.clone());
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_fits_where_it_is_seen() {
        let none = |_: &str| None;
        let of = |set: &'static str| move |name: &str| (name == set).then(|| "true".to_owned());
        assert_eq!(fitting(true, of("GITHUB_ACTIONS")), Form::Terminal);
        assert_eq!(fitting(false, of("GITHUB_ACTIONS")), Form::Github);
        assert_eq!(fitting(false, of("GITLAB_CI")), Form::Gitlab);
        assert_eq!(fitting(false, none), Form::Plain);
    }

    #[test]
    fn what_a_guest_shows_commands_no_ci_system() {
        assert_eq!(Form::Github.shown("  | ##[error]x"), "  | ## [error]x");
        assert_eq!(Form::Plain.shown("  | ##[error]x"), "  | ##[error]x");
    }

    #[test]
    fn bytes_are_told_as_what_they_are() {
        assert_eq!(doing(Stage::Fetch, "a.deb", 1024, Some(2048)), "a.deb, 1.0 KiB of 2.0 KiB");
        assert_eq!(doing(Stage::Fetch, "", 1024, Some(2048)), "1.0 KiB of 2.0 KiB");
        assert_eq!(doing(Stage::Guest, "configure", 1024, None), "configure, disk 1.0 KiB");
        assert_eq!(doing(Stage::Guest, "boo\u{1b}ting", 0, None), "booting");
    }
}
