//! What was measured, as a table to paste.

use std::fmt::Write as _;
use std::time::Duration;

/// Times of one thing that was done again and again.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    times: Vec<Duration>,
}

impl Sample {
    /// Takes one more.
    pub fn push(&mut self, time: Duration) {
        let place = self.times.partition_point(|other| *other <= time);
        self.times.insert(place, time);
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.times.len()
    }

    /// The smallest time that so many of a hundred are not above; zero without times.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.times.len() * percent).div_ceil(100);
        self.times.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }

    /// The one in the middle.
    #[must_use]
    pub fn median(&self) -> Duration {
        self.percentile(50)
    }
}

/// What a measured number is held against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// The ratio is at most this.
    AtMost(f64),
    /// What it is compared with takes at least so many times as long.
    TimesFaster(f64),
    /// At most this many times as long, and so much longer.
    AtMostAnd(f64, Duration),
    /// A number, and not a ratio, is at most this.
    Number(f64),
    /// It is only told.
    None,
}

/// A line of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What was done.
    pub what: String,
    /// Hostler's number, with its unit.
    pub own: String,
    /// What it was compared with, with its number.
    pub other: String,
    /// The ratio.
    pub ratio: String,
    /// The goal.
    pub goal: String,
    /// Whether it is met; `None` without a goal.
    pub met: Option<bool>,
}

impl Row {
    /// Two times of one run, held against each other.
    #[must_use]
    pub fn times(what: &str, own: Duration, against: &str, other: Duration, goal: Goal) -> Self {
        let ratio = own.as_secs_f64() / other.as_secs_f64();
        let (shown, goal, met) = match goal {
            Goal::AtMost(limit) => (format!("{ratio:.2} ×"), format!("≤ {limit:?} ×"), Some(ratio <= limit)),
            Goal::TimesFaster(limit) => {
                let faster = 1.0 / ratio;
                (format!("{faster:.1} × faster"), format!("≥ {limit:.0} × faster"), Some(faster >= limit))
            }
            Goal::AtMostAnd(limit, more) => {
                let above = own.as_secs_f64() - other.as_secs_f64() * limit;
                let shown = format!("{ratio:.2} ×; {limit:.1} × {:+.1} ms", above * 1e3);
                let goal = format!("≤ {limit:.1} × + {} ms", more.as_millis());
                (shown, goal, Some(above <= more.as_secs_f64()))
            }
            Goal::Number(_) | Goal::None => (format!("{ratio:.2} ×"), "–".to_owned(), None),
        };
        let other = format!("{against}: {}", show(other));
        Self { what: what.to_owned(), own: show(own), other, ratio: shown, goal, met }
    }

    /// A number by itself.
    #[must_use]
    pub fn number(what: &str, value: f64, unit: &str, goal: Goal) -> Self {
        let (goal, met) = match goal {
            Goal::Number(limit) => (format!("≤ {limit} {unit}"), Some(value <= limit)),
            _ => ("–".to_owned(), None),
        };
        let own = format!("{value:.1} {unit}");
        Self { what: what.to_owned(), own, other: "–".to_owned(), ratio: "–".to_owned(), goal, met }
    }
}

/// A time with three digits, in the unit that fits.
#[must_use]
pub fn show(time: Duration) -> String {
    let millis = time.as_secs_f64() * 1e3;
    match millis {
        1000.0.. => format!("{:.2} s", millis / 1e3),
        100.0.. => format!("{millis:.0} ms"),
        10.0.. => format!("{millis:.1} ms"),
        _ => format!("{millis:.2} ms"),
    }
}

/// One measurement: its lines, and what else it found out.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// Its heading.
    pub title: String,
    /// What was done, how often.
    pub how: String,
    /// The lines.
    pub rows: Vec<Row>,
    /// More, as Markdown.
    pub notes: Vec<String>,
}

impl Section {
    /// As Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = format!("## {}\n\n{}\n\n", self.title, self.how);
        text.push_str("| | Hostler | compared with | ratio | goal | met |\n|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let met = match row.met {
                Some(true) => "yes",
                Some(false) => "**no**",
                None => "–",
            };
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {met} |",
                row.what, row.own, row.other, row.ratio, row.goal
            );
        }
        for note in &self.notes {
            let _ = write!(text, "\n{note}\n");
        }
        text
    }
}

/// The machine in general words: what the numbers depend on, and nothing that tells whose it is.
#[must_use]
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let release = read("/proc/sys/kernel/osrelease");
    // What a distribution or a host adds to the kernel's version is not the kernel's.
    let version: String =
        release.chars().take_while(|character| character.is_ascii_digit() || *character == '.').collect();
    let memory: u64 = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    format!("{cores} cores, {} GiB of memory, Linux {version}", memory.div_ceil(1024 * 1024))
}

/// How busy the machine is, besides what is measured or not.
#[must_use]
pub fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let mut sample = Sample::default();
        assert_eq!(sample.median(), Duration::ZERO);
        for time in (1..=200).rev() {
            sample.push(millis(time));
        }
        assert_eq!((sample.median(), sample.percentile(99)), (millis(100), millis(198)));
    }

    #[test]
    fn a_goal_is_met_up_to_its_limit() {
        let met = |own, other, goal| Row::times("", millis(own), "", millis(other), goal).met;
        assert_eq!(met(12, 10, Goal::AtMost(1.2)), Some(true));
        assert_eq!(met(13, 10, Goal::AtMost(1.2)), Some(false));
        assert_eq!(met(1, 20, Goal::TimesFaster(20.0)), Some(true));
        assert_eq!(met(1, 19, Goal::TimesFaster(20.0)), Some(false));
        assert_eq!(met(16, 10, Goal::AtMostAnd(1.2, millis(5))), Some(true));
        assert_eq!(met(18, 10, Goal::AtMostAnd(1.2, millis(5))), Some(false));
        assert_eq!(met(1, 1, Goal::None), None);
        assert_eq!(Row::number("", 8.0, "MiB", Goal::Number(8.0)).met, Some(true));
    }

    #[test]
    fn a_section_is_a_table_to_paste() {
        let section = Section {
            title: "One".to_owned(),
            how: "Twice.".to_owned(),
            rows: vec![Row::times("it", millis(15), "bare", millis(10), Goal::AtMost(1.2))],
            notes: vec!["A note.".to_owned()],
        };
        let text = "## One\n\nTwice.\n\n| | Hostler | compared with | ratio | goal | met |\n\
            |---|---|---|---|---|---|\n| it | 15.0 ms | bare: 10.0 ms | 1.50 × | ≤ 1.2 × | **no** |\n\nA note.\n";
        assert_eq!(section.markdown(), text);
    }
}
