//! The qemu processes that belong to no lease: listed, and never acted on.

use std::collections::BTreeSet;

use hostler_protocol::methods::StrayQemu;
use hostler_protocol::text::printable;

use crate::decide::Ownership;
use crate::model::{Lease, ProcessIdentity, Qemu, ResourceIdentity, Snapshot};

/// Those of a look. One that owns a lease belongs to that.
pub(super) fn strays<'a>(
    snapshot: &Snapshot,
    ownership: &Ownership,
    leases: impl Iterator<Item = &'a Lease>,
) -> Vec<StrayQemu> {
    let owners: BTreeSet<ProcessIdentity> = leases.map(|lease| lease.owner).collect();
    let is_stray = |qemu: &&Qemu| {
        let identity = ResourceIdentity::Process(qemu.process);
        !ownership.owners.contains_key(&identity)
            && !ownership.doubtful.contains(&identity)
            && !owners.contains(&qemu.process)
    };
    snapshot.qemus.iter().flatten().filter(is_stray).filter_map(|qemu| show(qemu, snapshot)).collect()
}

fn show(qemu: &Qemu, snapshot: &Snapshot) -> Option<StrayQemu> {
    let process = snapshot.processes.iter().find(|process| process.identity == qemu.process)?;
    Some(StrayQemu {
        pid: qemu.process.pid,
        uid: process.uid,
        program: printable(&qemu.program),
        started_by: started_by(qemu, process.parent, snapshot),
        disks: qemu.disks.iter().map(|path| printable(path)).collect(),
        age_seconds: qemu.age_ms as f64 / 1000.0,
    })
}

/// The parent, and the control group. One that lost its parent is the first process's, or a service
/// manager's, which tells nothing: then only the group does.
fn started_by(qemu: &Qemu, parent: u32, snapshot: &Snapshot) -> String {
    // A number that was given again since is no parent: it would have started later.
    let is_parent = |other: &&crate::model::Process| {
        other.identity.pid == parent && other.identity.start <= qemu.process.start && parent != 1
    };
    let parent = snapshot.processes.iter().find(is_parent);
    let parent =
        parent.map(|parent| format!("process {} ({})", parent.identity.pid, printable(&parent.name)));
    let group = Some(&qemu.unit).filter(|unit| !unit.is_empty()).map(|unit| format!("control group {unit}"));
    let known: Vec<String> = parent.into_iter().chain(group).collect();
    known.join(", ")
}

#[cfg(test)]
mod tests {
    use hostler_protocol::lease::LeaseId;

    use super::*;
    use crate::model::fixture::{self, process_identity as identity};
    use crate::model::{BootId, Opener, Process, Taking};

    fn process(pid: u32, parent: u32, name: &str) -> Process {
        Process { name: name.as_bytes().to_vec(), ..fixture::process(pid, parent) }
    }

    fn qemu(pid: u32, unit: &str) -> Qemu {
        Qemu {
            process: identity(pid),
            program: b"qemu-system-x86_64".to_vec(),
            unit: unit.to_owned(),
            disks: vec![b"/a\x1b[2J".to_vec()],
            age_ms: 1500,
        }
    }

    #[test]
    fn only_what_no_lease_has_is_stray_and_tells_who_started_it() {
        let snapshot = Snapshot {
            processes: vec![
                process(1, 0, "init"),
                process(5, 1, "kiwi\n"),
                process(10, 5, "q"),
                process(11, 1, "q"),
                process(12, 5, "q"),
                process(13, 99, "q"),
            ],
            qemus: Some(vec![qemu(10, "/ci.slice"), qemu(11, "/ci.slice"), qemu(12, ""), qemu(13, "")]),
            ..Snapshot::default()
        };
        let mut ownership = Ownership::default();
        ownership.owners.insert(ResourceIdentity::Process(identity(12)), LeaseId(1));
        let taking =
            Taking { rule: None, name: String::new(), opener: Opener::Administrator, what: BTreeSet::new() };
        let owned = taking.lease(LeaseId(1), identity(13), &BootId(String::new()), 0);
        let found = strays(&snapshot, &ownership, [&owned].into_iter());
        let told: Vec<(u32, &str)> = found.iter().map(|one| (one.pid, one.started_by.as_str())).collect();
        assert_eq!(
            told,
            [(10, "process 5 (kiwi\\n), control group /ci.slice"), (11, "control group /ci.slice")]
        );
        assert_eq!((found[0].uid, found[0].age_seconds), (1000, 1.5));
        assert_eq!(found[0].disks, ["/a\\u{1b}[2J"]);
    }
}
