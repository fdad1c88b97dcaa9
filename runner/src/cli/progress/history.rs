//! How long the stages of earlier builds took, for an estimate of what is left.
//!
//! One small file per image name in the cache. It costs nothing but the estimate when it is lost, so
//! every error in here is silent.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hostler_runner::event::{Event, Sink, Stage};

/// How many builds are remembered.
const MOST: usize = 5;

/// The seconds that each stage took in earlier builds, by its name, the latest last.
type Times = BTreeMap<String, Vec<f64>>;

#[derive(Clone, Debug, Default)]
pub(super) struct History {
    path: Option<PathBuf>,
    times: Times,
}

impl History {
    pub(super) fn load(cache: &Path, name: &str) -> Self {
        let path = cache.join("history").join(format!("{name}.json"));
        let times = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Self { path: Some(path), times: times.unwrap_or_default() }
    }

    /// What is left of a build that has been in `stage` for `elapsed`; `None` without earlier builds.
    pub(super) fn left(&self, stage: Stage, elapsed: Duration) -> Option<Duration> {
        let usual = |stage: Stage| median(self.times.get(stage.name())?);
        let own = (usual(stage)? - elapsed.as_secs_f64()).max(0.0);
        let later: f64 = Stage::ALL.into_iter().filter(|later| *later > stage).filter_map(usual).sum();
        Duration::try_from_secs_f64(own + later).ok()
    }

    fn save(&mut self, took: &[(Stage, Duration)]) {
        for (stage, took) in took {
            let times = self.times.entry(stage.name().to_owned()).or_default();
            times.push(took.as_secs_f64());
            let surplus = times.len().saturating_sub(MOST);
            times.drain(..surplus);
        }
        let write = |path: &Path| -> std::io::Result<()> {
            let folder = path.parent().unwrap_or(Path::new("."));
            fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            serde_json::to_writer(&mut file, &self.times)?;
            file.flush()?;
            file.persist(path)?;
            Ok(())
        };
        let _ = self.path.as_deref().map(write);
    }
}

fn median(times: &[f64]) -> Option<f64> {
    let mut times: Vec<f64> = times.iter().copied().filter(|time| time.is_finite()).collect();
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied()
}

/// A time as people say it.
pub(super) fn rough(time: Duration) -> String {
    match time.as_secs() {
        0..10 => "10 s".to_owned(),
        seconds @ 10..100 => format!("{} s", seconds / 10 * 10),
        seconds => format!("{} min", (seconds + 30) / 60),
    }
}

/// Remembers the times of builds that go well.
pub(super) struct Recorder(Mutex<Recorded>);

struct Recorded {
    history: History,
    running: Option<(Stage, Instant)>,
    took: Vec<(Stage, Duration)>,
}

impl Recorder {
    pub(super) fn new(history: History) -> Self {
        Self(Mutex::new(Recorded { history, running: None, took: Vec::new() }))
    }
}

impl Sink for Recorder {
    fn event(&self, event: Event) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Started(stage) => state.running = Some((stage, Instant::now())),
            Event::Finished(_) => {
                let took = state.running.take().map(|(stage, since)| (stage, since.elapsed()));
                state.took.extend(took);
            }
            Event::Built { .. } => {
                let Recorded { history, took, .. } = &mut *state;
                history.save(took);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_is_left_comes_from_the_builds_before() {
        let folder = tempfile::tempdir().unwrap();
        let mut history = History::load(folder.path(), "x");
        assert_eq!(history.left(Stage::Fetch, seconds(1)), None);
        for fetch in [10, 12, 300] {
            history.save(&[(Stage::Fetch, seconds(fetch)), (Stage::Guest, seconds(100))]);
        }
        let again = History::load(folder.path(), "x");
        assert_eq!(again.left(Stage::Fetch, seconds(2)), Some(seconds(110)));
        assert_eq!(again.left(Stage::Fetch, seconds(50)), Some(seconds(100)), "it is late already");
        assert_eq!(again.left(Stage::Guest, seconds(40)), Some(seconds(60)));
        assert_eq!(History::load(folder.path(), "y").left(Stage::Guest, seconds(1)), None);
    }

    #[test]
    fn only_the_latest_builds_count() {
        let folder = tempfile::tempdir().unwrap();
        let mut history = History::load(folder.path(), "x");
        for time in 0..20 {
            history.save(&[(Stage::Guest, seconds(time))]);
        }
        assert_eq!(history.times["guest"], [15.0, 16.0, 17.0, 18.0, 19.0]);
    }

    #[test]
    fn times_are_rough() {
        assert_eq!(
            [4, 47, 99, 100, 600].map(|time| rough(seconds(time))),
            ["10 s", "40 s", "90 s", "2 min", "10 min"]
        );
    }
}
