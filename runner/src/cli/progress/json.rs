//! Each event as a JSON object on a line, for programs.
//!
//! Every object has `time` (RFC 3339, UTC), `seconds` since the start, and `event`; the others are in
//! [`document`]. Text of a guest is in there as JSON escapes it.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hostler_runner::event::{Event, Sink};
use serde_json::{Value, json};

/// How often a stage's progress is told.
const INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct JsonLines<W> {
    started: Instant,
    state: Mutex<(W, Option<Instant>)>,
}

impl<W: Write> JsonLines<W> {
    pub(super) fn new(out: W) -> Self {
        Self { started: Instant::now(), state: Mutex::new((out, None)) }
    }
}

impl<W: Write + Send> Sink for JsonLines<W> {
    fn event(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (out, told) = &mut *state;
        if matches!(event, Event::Progress { .. }) {
            if told.is_some_and(|told| told.elapsed() < INTERVAL) {
                return;
            }
            *told = Some(Instant::now());
        }
        let mut document = document(&event);
        document["time"] = json!(humantime::format_rfc3339_millis(SystemTime::now()).to_string());
        document["seconds"] = json!((self.started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0);
        // A listener that went away does not stop a build.
        let _ = writeln!(out, "{document}").and_then(|()| out.flush());
    }
}

fn document(event: &Event) -> Value {
    match event {
        Event::Started(stage) => json!({ "event": "stage_started", "stage": stage }),
        Event::Finished(stage) => json!({ "event": "stage_finished", "stage": stage }),
        Event::GaveUp(stage) => json!({ "event": "stage_failed", "stage": stage }),
        Event::Progress { stage, doing, bytes, total } => json!({
            "event": "progress", "stage": stage, "doing": doing, "bytes": bytes, "total": total
        }),
        Event::Note(text) => json!({ "event": "note", "text": text }),
        Event::Warning(text) => json!({ "event": "warning", "text": text }),
        Event::Built { files } => json!({ "event": "built", "files": files }),
        Event::Failed { class, message, page } => json!({
            "event": "failed", "class": class, "message": message, "advice": class.advice(), "page": page
        }),
    }
}

#[cfg(test)]
mod tests {
    use hostler_runner::class::Class;
    use hostler_runner::event::Stage;

    use super::*;

    #[test]
    fn each_event_is_a_line_with_a_time() {
        let lines = JsonLines::new(Vec::new());
        lines.event(Event::Started(Stage::Guest));
        for doing in ["a", "b"] {
            lines.event(Event::Progress { stage: Stage::Guest, doing: doing.into(), bytes: 1, total: None });
        }
        lines.event(Event::Failed { class: Class::Stalled, message: "x\n\u{1b}[2J".into(), page: None });
        let text = String::from_utf8(lines.state.into_inner().unwrap().0).unwrap();
        let documents: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let events: Vec<&str> = documents.iter().map(|one| one["event"].as_str().unwrap()).collect();
        assert_eq!(events, ["stage_started", "progress", "failed"]);
        assert_eq!(documents[2]["class"], "stalled");
        assert!(documents[0]["time"].as_str().unwrap().ends_with('Z') && documents[0]["seconds"].is_number());
        assert!(!text.contains('\u{1b}'));
    }
}
