//! One line that changes, above it what is done.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hostler_runner::event::{Event, Sink, Stage};
use indicatif::{ProgressBar, ProgressStyle};

use super::history::{self, History};
use super::{cleaned, doing};

pub(super) struct Terminal {
    bar: ProgressBar,
    history: History,
    running: Mutex<Option<(Stage, Instant)>>,
}

impl Terminal {
    pub(super) fn new(history: History) -> Self {
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {prefix:10} {elapsed:>4}  {wide_msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        Self { bar, history, running: Mutex::default() }
    }

    fn show(&self, running: Option<(Stage, Instant)>, doing: &str) {
        let left = running.and_then(|(stage, since)| self.history.left(stage, since.elapsed()));
        let left = left.map(|left| format!("about {} left", history::rough(left)));
        let parts: Vec<String> =
            left.into_iter().chain((!doing.is_empty()).then(|| doing.to_owned())).collect();
        self.bar.set_message(parts.join(" · "));
    }
}

impl Sink for Terminal {
    fn event(&self, event: Event) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ended = |stage: Stage, word: &str| {
            let took = running.take().map_or(0.0, |(_, since)| since.elapsed().as_secs_f64());
            self.bar.println(format!("  {:10} {took:6.1} s{word}", stage.name()));
        };
        match event {
            Event::Started(stage) => {
                *running = Some((stage, Instant::now()));
                self.bar.reset();
                self.bar.set_prefix(stage.name());
                self.show(*running, "");
                self.bar.enable_steady_tick(Duration::from_millis(200));
            }
            Event::Progress { stage, doing: what, bytes, total } => {
                self.show(*running, &doing(stage, &what, bytes, total));
            }
            Event::Finished(stage) => ended(stage, ""),
            Event::GaveUp(stage) => {
                ended(stage, "  failed");
                self.bar.set_message("keeping what is known of it");
            }
            Event::Note(text) => self.bar.println(format!("  {}", cleaned(&text))),
            Event::Warning(text) => self.bar.println(format!("  warning: {}", cleaned(&text))),
            // What follows is printed below.
            Event::Built { .. } | Event::Failed { .. } => self.bar.finish_and_clear(),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
