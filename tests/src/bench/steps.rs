//! Where the daemon's time goes, by its own log: each line has a time, and one is written after each step.

use std::collections::HashMap;
use std::time::Duration;

use super::report::{Sample, show};

/// As a table: how long after the line before it the same lease has each kind of line.
#[must_use]
pub(super) fn told_by(log: &str) -> String {
    let mut last: HashMap<&str, Duration> = HashMap::new();
    let mut found: Vec<(&'static str, Sample)> = Vec::new();
    for line in log.lines() {
        let Some((time, lease, text)) = parse(line) else { continue };
        let Some(kind) = kind(text) else { continue };
        if let (Some(before), true) = (last.insert(lease, time), kind != BEGIN) {
            // Over midnight a day is missing.
            let gap = time.checked_sub(before).unwrap_or_default();
            match found.iter_mut().find(|(other, _)| *other == kind) {
                Some((_, sample)) => sample.push(gap),
                None => {
                    let mut sample = Sample::default();
                    sample.push(gap);
                    found.push((kind, sample));
                }
            }
        }
    }
    let mut text = "Where the daemon's time goes, by its log: from the line before until this one.\n\n\
        | until | how often | p50 | p99 |\n|---|---|---|---|\n"
        .to_owned();
    for (kind, sample) in &found {
        let (median, late) = (show(sample.median()), show(sample.percentile(99)));
        text.push_str(&format!("| {kind} | {} | {median} | {late} |\n", sample.count()));
    }
    text
}

const BEGIN: &str = "the owner's end is noticed";

/// `DATETIME LEVEL lease N: TEXT`.
fn parse(line: &str) -> Option<(Duration, &str, &str)> {
    let (when, rest) = line.split_once(' ')?;
    let time = when.split_once('T')?.1.trim_end_matches('Z');
    let mut fields = time.splitn(3, ':').map(|field| field.parse::<f64>().ok());
    let (hours, minutes, seconds) = (fields.next()??, fields.next()??, fields.next()??);
    let time = Duration::try_from_secs_f64((hours * 60.0 + minutes) * 60.0 + seconds).ok()?;
    let (_, rest) = rest.split_once("lease ")?;
    let (lease, text) = rest.split_once(": ")?;
    Some((time, lease, text))
}

fn kind(text: &str) -> Option<&'static str> {
    const KINDS: [(&str, &str); 8] = [
        ("its owner ended", BEGIN),
        ("end process", "processes are ended (a look, a plan, the journal)"),
        ("unmount /", "each unmount is done"),
        ("thaw and unmount /", "each unmount is done that thaws, if need be"),
        ("detach /", "the loop device is detached"),
        ("remove directory", "a scratch directory is removed"),
        ("remove control group", "the control group is removed"),
        ("ended after", "it is seen that nothing is left (looks, the journal)"),
    ];
    KINDS.iter().find(|(begin, _)| text.starts_with(begin)).map(|(_, kind)| *kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_follows_the_one_before_it_of_the_same_lease() {
        let log = "2026-11-24T00:00:01.000100Z  INFO lease 7: its owner ended\n\
            2026-11-24T00:00:01.000200Z  INFO lease 8: its owner ended\n\
            nonsense\n\
            2026-11-24T00:00:01.003100Z  INFO lease 7: unmount /x: done\n";
        let text = told_by(log);
        assert!(
            text.ends_with("|---|---|---|---|\n| each unmount is done | 1 | 3.00 ms | 3.00 ms |\n"),
            "{text}"
        );
    }
}
