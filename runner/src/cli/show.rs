//! `hostler why` and `hostler plan`.

use hostler_protocol::methods::{Explanation, Plan, Why};
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
    if planned.steps.is_empty() {
        return print("nothing to do: no lease is over that left anything\n");
    }
    let lines: Vec<String> = planned
        .steps
        .iter()
        .map(|step| without_controls(&format!("lease {}: {}", step.lease, step.does)))
        .collect();
    print(&format!("{}\n", lines.join("\n")))
}

#[cfg(test)]
mod tests {
    use hostler_protocol::why::{Holder, Reason};

    use super::*;

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
