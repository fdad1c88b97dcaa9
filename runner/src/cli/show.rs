//! `hostler why` and `hostler plan`.

use std::time::Duration;

use hostler_protocol::methods::{Explanation, Plan, Planned, Why};
use hostler_protocol::text::without_controls;
use hostler_protocol::why::Held;

use super::arguments::Global;
use super::exit::Exit;
use super::{Failure, print, print_json};
use hostler_runner::watchdog::Watchdog;

pub(crate) fn why(global: &Global, target: &str) -> Result<Exit, Failure> {
    let explanation = Watchdog::connect(&global.socket)?.call(&Why { target: target.to_owned() })?;
    if global.json {
        return print_json(&explanation);
    }
    print(&why_text(&explanation))
}

fn why_text(explanation: &Explanation) -> String {
    let mut text = format!("{}\n", thing(&explanation.tree));
    if explanation.tree.holders.is_empty() {
        text.push_str("  nothing that can be seen holds it\n");
    }
    tree(&explanation.tree, "", &mut text);
    for gap in &explanation.gaps {
        text.push_str(&format!("note: {}\n", without_controls(gap)));
    }
    text
}

fn thing(held: &Held) -> String {
    let whose = if held.whose.is_empty() { String::new() } else { format!(" [{}]", held.whose) };
    without_controls(&format!("{}{whose}", held.what))
}

fn tree(held: &Held, indent: &str, text: &mut String) {
    let last = held.holders.len().saturating_sub(1);
    for (index, holder) in held.holders.iter().enumerate() {
        let (branch, below) = if index == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        text.push_str(&format!("{indent}{branch}{}: {}\n", holder.reason.name(), thing(&holder.by)));
        let deeper = format!("{indent}{below}");
        // What frees only this one: of no use while something holds the holder in turn.
        if !holder.remedy.is_empty() && holder.by.holders.is_empty() {
            text.push_str(&format!("{deeper}   to end this: {}\n", without_controls(&holder.remedy)));
        }
        tree(&holder.by, &deeper, text);
    }
}

pub(crate) fn plan(global: &Global) -> Result<Exit, Failure> {
    let planned = Watchdog::connect(&global.socket)?.call(&Plan {})?;
    if global.json {
        return print_json(&planned);
    }
    print(&plan_text(&planned))
}

fn plan_text(planned: &Planned) -> String {
    if planned.steps.is_empty() && planned.by_policy.is_empty() {
        return "nothing to do: no lease is over that left anything, and no rule takes anything for leaked\n"
            .to_owned();
    }
    let of_leases = planned.steps.iter().map(|step| {
        let when =
            if step.in_seconds > 0.0 { format!(", {}", later(step.in_seconds)) } else { String::new() };
        format!("lease {}{when}: {}", step.lease, step.does)
    });
    let by_policy = planned
        .by_policy
        .iter()
        .map(|step| format!("rule {}, {}: {}", step.policy, later(step.in_seconds), step.does));
    of_leases.chain(by_policy).map(|line| format!("{}\n", without_controls(&line))).collect()
}

/// In whole seconds, never too soon: "in 1m 5s".
fn later(seconds: f64) -> String {
    format!("in {}", humantime::format_duration(Duration::from_secs(seconds.max(0.0).ceil() as u64)))
}

#[cfg(test)]
mod tests {
    use hostler_protocol::lease::LeaseId;
    use hostler_protocol::methods::{PlannedStep, PolicyStep};
    use hostler_protocol::why::{Holder, Reason};
    use serde_json::Value;

    use super::*;

    #[test]
    fn a_plan_says_for_what_and_when() {
        let step = |in_seconds| PlannedStep {
            lease: LeaseId(4),
            does: "unmount /a\u{1b}".to_owned(),
            in_seconds,
            step: Value::Null,
        };
        let by_policy = PolicyStep {
            policy: "stale loops".to_owned(),
            does: "detach /dev/loop3".to_owned(),
            in_seconds: 64.2,
            step: Value::Null,
        };
        let planned = Planned { steps: vec![step(0.0), step(2.1)], by_policy: vec![by_policy] };
        assert_eq!(
            plan_text(&planned),
            "lease 4: unmount /a\\u{1b}\nlease 4, in 3s: unmount /a\\u{1b}\n\
             rule stale loops, in 1m 5s: detach /dev/loop3\n"
        );
        assert!(plan_text(&Planned::default()).starts_with("nothing to do"));
    }

    fn held(what: &str, whose: &str, holders: Vec<Holder>) -> Held {
        Held { what: what.to_owned(), whose: whose.to_owned(), holders }
    }

    #[test]
    fn draws_the_chain_and_offers_a_way_out_at_its_end() {
        let process = Holder {
            reason: Reason::CwdOrRoot,
            remedy: "kill 9".to_owned(),
            by: held("process 9 (sleep, uid 0)", "", Vec::new()),
        };
        let mount = Holder {
            reason: Reason::Mounted,
            remedy: "umount /mnt/a".to_owned(),
            by: held("mount /mnt/a (ext4)", "lease 4", vec![process]),
        };
        let explanation = Explanation {
            tree: held("loop device /dev/loop2 (backing file /a.img)", "lease 4", vec![mount]),
            gaps: vec!["what process 1 holds could not be read: denied".to_owned()],
        };
        assert_eq!(
            why_text(&explanation),
            "loop device /dev/loop2 (backing file /a.img) [lease 4]\n\
             └─ mounted: mount /mnt/a (ext4) [lease 4]\n   \
                └─ cwd_or_root: process 9 (sleep, uid 0)\n         \
                      to end this: kill 9\n\
             note: what process 1 holds could not be read: denied\n"
        );
    }
}
