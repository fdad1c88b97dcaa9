//! What looks found out about whose things are, for as long as evidence may vanish.

use hostler_protocol::lease::LeaseId;

use super::Engine;
use crate::decide::{Ownership, forget_what_is_gone};
use crate::journal::Entry;
use crate::model::{Lease, ResourceIdentity, Snapshot};

/// How much of the host a look saw.
#[derive(Clone, Copy, Debug)]
pub(super) enum Seen<'leases> {
    /// All that is not there is gone, of what these leases had when the look began.
    Whole(&'leases [Lease]),
    /// What is not there was not looked for.
    Part,
}

impl Engine {
    /// Keeps what a look found out. Whatever is done about it is written after that, and waits for the disk.
    pub(super) fn remember(&self, snapshot: &Snapshot, ownership: &Ownership, seen: Seen<'_>) {
        let mut entries = Vec::new();
        let by_lease = ownership.by_lease();
        for record in self.shared.state.borrow_mut().records_mut() {
            let before = record.lease.clone();
            for resource in by_lease.get(&record.lease.id).into_iter().flatten().copied() {
                match resource {
                    ResourceIdentity::Loop(identity) => {
                        record.lease.loops.insert(identity);
                    }
                    ResourceIdentity::Mount(identity) => {
                        record.lease.mounts.insert(identity);
                    }
                    ResourceIdentity::Process(identity) if record.lease.cgroup.is_none() => {
                        record.lease.processes.insert(identity);
                    }
                    ResourceIdentity::Map(identity) => {
                        record.lease.maps.insert(identity);
                    }
                    ResourceIdentity::Process(_)
                    | ResourceIdentity::Nbd(_)
                    | ResourceIdentity::Swap(_)
                    | ResourceIdentity::Directory(_)
                    | ResourceIdentity::Cgroup(_) => {}
                }
            }
            let of_lease = |(_, owner): &(&u64, &LeaseId)| **owner == record.lease.id;
            let namespaces = ownership.namespaces.iter().filter(of_lease).map(|(namespace, _)| *namespace);
            record.lease.namespaces.extend(namespaces.collect::<Vec<_>>());
            match seen {
                Seen::Whole(leases) => {
                    if let Some(then) = leases.iter().find(|lease| lease.id == record.lease.id) {
                        forget_what_is_gone(&mut record.lease, then, snapshot);
                    }
                }
                Seen::Part => {}
            }
            if record.lease != before {
                entries.push(Entry::Lease { lease: Box::new(record.lease.clone()) });
            }
        }
        if !entries.is_empty() {
            tokio::task::spawn_local(self.record(entries));
        }
    }
}
