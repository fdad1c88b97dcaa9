//! A JUnit report: a test case for each stage, and the failure in the stage that it ended.

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hostler_runner::class::Class;
use hostler_runner::event::{Event, Sink, Stage};

pub(super) struct Junit {
    name: String,
    started: Instant,
    state: Mutex<(File, Cases)>,
}

#[derive(Default)]
struct Cases {
    done: Vec<(Stage, Duration)>,
    running: Option<(Stage, Instant)>,
    /// The stage that did not end well.
    gave_up: Option<(Stage, Duration)>,
}

impl Junit {
    pub(super) fn new(file: File, name: String) -> Self {
        Self { name, started: Instant::now(), state: Mutex::new((file, Cases::default())) }
    }
}

impl Sink for Junit {
    fn event(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, cases) = &mut *state;
        let report = match event {
            Event::Started(stage) => {
                cases.running = Some((stage, Instant::now()));
                return;
            }
            Event::Finished(stage) => {
                let took = cases.running.take().map(|(_, since)| since.elapsed());
                cases.done.push((stage, took.unwrap_or_default()));
                return;
            }
            Event::GaveUp(stage) => {
                let took = cases.running.take().map(|(_, since)| since.elapsed());
                cases.gave_up = Some((stage, took.unwrap_or_default()));
                return;
            }
            Event::Built { .. } => report(&self.name, self.started.elapsed(), cases, None),
            Event::Failed { class, message, .. } => {
                report(&self.name, self.started.elapsed(), cases, Some((class, &message)))
            }
            Event::Progress { .. } | Event::Note(_) | Event::Warning(_) => return,
        };
        // A report that cannot be written does not change what a build came to.
        let _ = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(report.as_bytes()))
            .and_then(|()| file.flush());
    }
}

fn report(name: &str, took: Duration, cases: &Cases, failure: Option<(Class, &str)>) -> String {
    let name = escaped(name);
    let mut text = String::new();
    let mut case = |stage: &str, took: Duration, inner: &str| {
        let time = took.as_secs_f64();
        let start = format!("    <testcase classname=\"hostler.{name}\" name=\"{stage}\" time=\"{time:.3}\"");
        text.push_str(&if inner.is_empty() {
            format!("{start}/>\n")
        } else {
            format!("{start}>{inner}</testcase>\n")
        });
    };
    for (stage, took) in &cases.done {
        case(stage.name(), *took, "");
    }
    let mut count = cases.done.len();
    if let Some((class, message)) = failure {
        count += 1;
        let (stage, took) = cases.gave_up.map_or(("build", took), |(stage, took)| (stage.name(), took));
        let message = escaped(message);
        // Nothing failed in a build that somebody stopped.
        let inner = if class == Class::Cancelled {
            format!("<skipped message=\"{message}\"/>")
        } else {
            let advice = escaped(class.advice());
            format!(
                "<failure type=\"{class}\" message=\"{message}\">{message}\nWhat to do: {advice}</failure>"
            )
        };
        case(stage, took, &inner);
    }
    let is_failure = failure.is_some_and(|(class, _)| class != Class::Cancelled);
    let (failures, skipped) = (usize::from(is_failure), usize::from(failure.is_some() && !is_failure));
    let counts = format!(
        "tests=\"{count}\" failures=\"{failures}\" errors=\"0\" skipped=\"{skipped}\" time=\"{:.3}\"",
        took.as_secs_f64()
    );
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites {counts}>\n  <testsuite name=\"hostler build {name}\" {counts}>\n{text}  </testsuite>\n</testsuites>\n"
    )
}

/// Text as XML has it: what XML 1.0 cannot say at all is left out.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push_str("&#10;"),
            '\u{fffe}' | '\u{ffff}' => {}
            character if character.is_control() => {}
            character => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failure_is_in_the_stage_that_it_ended() {
        let file = tempfile::tempfile().unwrap();
        let junit = Junit::new(file.try_clone().unwrap(), "debian-12".into());
        for event in [
            Event::Started(Stage::Fetch),
            Event::Finished(Stage::Fetch),
            Event::Started(Stage::Guest),
            Event::GaveUp(Stage::Guest),
            Event::Failed { class: Class::DiskFull, message: "a<b> & \"c\"\u{1b}[2J".into(), page: None },
        ] {
            junit.event(event);
        }
        let mut text = String::new();
        let mut file = file;
        file.rewind().unwrap();
        std::io::Read::read_to_string(&mut file, &mut text).unwrap();
        assert!(text.contains("tests=\"2\" failures=\"1\" errors=\"0\" skipped=\"0\""), "{text}");
        assert!(text.contains("name=\"fetch\" time=\"0.000\"/>"), "{text}");
        assert!(
            text.contains("name=\"guest\" time=\"0.000\"><failure type=\"disk_full\" message=\"a&lt;b&gt; &amp; &quot;c&quot;[2J\">"),
            "{text}"
        );
    }

    #[test]
    fn a_build_that_somebody_stopped_has_no_failure() {
        let text = report("x", Duration::ZERO, &Cases::default(), Some((Class::Cancelled, "stop")));
        assert!(
            text.contains("failures=\"0\" errors=\"0\" skipped=\"1\"") && text.contains("<skipped "),
            "{text}"
        );
    }
}
