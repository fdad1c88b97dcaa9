//! What a start finds in the journal of the daemon before it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use hostler_protocol::lease::LeaseId;

use super::Engine;
use super::audit::Because;
use super::owner::{Owner, owner_now};
use super::record::Record;
use crate::journal::Entry;
use crate::kernel::{cgroups, directories};
use crate::model::{Claim, Lease, Phase};

impl Engine {
    /// Removes the control groups of leases that were about to be opened when the daemon was killed.
    pub async fn forget_unopened(&self, unopened: BTreeMap<LeaseId, PathBuf>) {
        for (lease, cgroup) in unopened {
            match cgroups::remove_unused(&cgroup) {
                Ok(()) => {
                    self.record(vec![Entry::Ended { lease }]).await;
                }
                Err(error) => {
                    tracing::warn!(
                        lease = lease.0,
                        "lease {lease}: the control group of this lease, which was never opened, stays until the next start: {error}"
                    );
                }
            }
        }
    }

    /// Takes up the leases of a journal again.
    pub async fn take_up(&self, leases: Vec<Lease>) {
        for mut lease in leases {
            let id = lease.id;
            let same_boot = lease.boot == self.shared.boot;
            if !same_boot {
                // Everything but what lies on a disk went with the boot.
                lease.boot = self.shared.boot.clone();
                lease.phase = Phase::Over;
                // What is mounted below a claim now, the host mounted when it came up.
                lease.evidence_closed = true;
                lease.owner_inside = false;
                lease.cgroup = None;
                lease.loops.clear();
                lease.mounts.clear();
                lease.maps.clear();
                lease.namespaces.clear();
                lease.processes.clear();
                // Nothing can find a directory again that has no handle; what was mounted below it
                // went with the boot.
                for lost in lease.claims.iter().filter(|claim| claim.handle.is_none() && claim.scratch) {
                    tracing::warn!(
                        lease = id.0,
                        path = lost.path,
                        "lease {id}: a scratch directory from before the last boot stays: its file system has no file handles to know it by: {}",
                        lost.path
                    );
                }
                lease.claims.retain(|claim| claim.scratch && claim.handle.is_some());
            } else {
                // The descriptor that it was known by went with the daemon before this one. What was found
                // below it is known all the same; and a scratch directory is told about for as long as
                // nobody knows what became of it.
                let is_lost = |claim: &Claim| !claim.scratch && !directories::can_be_found_again(claim);
                for lost in lease.claims.iter().filter(|claim| is_lost(claim)) {
                    tracing::warn!(
                        lease = id.0,
                        path = lost.path,
                        "lease {id}: what comes below this claimed directory from now on is not seen: its file system has no file handles to know it by: {}",
                        lost.path
                    );
                }
                lease.claims.retain(|claim| !is_lost(claim));
            }
            let owner = if same_boot { owner_now(&lease) } else { Owner::Ended };
            let is_over_already = lease.phase == Phase::Over;
            let is_over = is_over_already || matches!(owner, Owner::Ended);
            tracing::info!(
                lease = id.0,
                name = lease.name,
                over = is_over,
                "lease {id}: taken up again{}: {}",
                if is_over { ", and it is over" } else { "" },
                lease.name
            );
            self.shared.state.borrow_mut().insert(Record::new(lease.clone()));
            self.record(vec![Entry::Lease { lease: Box::new(lease.clone()) }]).await;
            match owner {
                Owner::Lives(pidfd) if !is_over => self.watch(&lease, pidfd),
                Owner::Unknown(error) if !is_over => self.ask_again(lease, &error),
                // When the owner ended is not known: the grace begins anew.
                Owner::Ended if !is_over_already => {
                    self.note_cause(id, Because::OwnerEnded);
                    self.end(id, self.shared.config.borrow().reclaim.grace);
                }
                Owner::Lives(_) | Owner::Unknown(_) | Owner::Ended => {
                    self.note_cause(id, Because::Restart);
                    self.end(id, Duration::ZERO);
                }
            }
        }
    }
}
