//! Whether a lease's owner lives, and what follows when it does not.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use hostler_protocol::lease::{LeaseId, LeaseState, Tracking};

use super::audit::Because;
use super::record::Waiting;
use super::{Engine, now_ms};
use crate::causes::chain;
use crate::kernel::{calls, cgroups, signals};
use crate::model::{Lease, SnapshotDepth};

impl Engine {
    /// Has the lease end when its owner does, and at its deadline.
    pub(super) fn watch(&self, lease: &Lease, pidfd: OwnedFd) {
        if let Err(error) = self.shared.watcher.watch_owner(lease.id, pidfd) {
            self.ask_again(lease.clone(), &error);
        }
        if let Some(deadline) = lease.deadline_ms {
            let engine = self.clone();
            let id = lease.id;
            let left = Duration::from_millis(deadline.saturating_sub(now_ms()));
            let waiting = tokio::task::spawn_local(async move {
                tokio::time::sleep(left).await;
                if engine.shared.state.borrow().get(id).is_some_and(|record| record.state == LeaseState::Open)
                {
                    tracing::info!(lease = id.0, "lease {id}: its deadline has passed");
                    engine.note_cause(id, Because::Deadline);
                    engine.end(id, Duration::ZERO);
                }
            });
            if let Some(record) = self.shared.state.borrow_mut().get_mut(lease.id) {
                record.deadline = Some(Waiting(waiting.abort_handle()));
            }
        }
        if lease.tracking == Tracking::Descent {
            self.follow_descent(lease.id);
        }
    }

    /// Looks at a lease's processes again and again while it is open, so that one whose parent
    /// ends was seen while it still had one.
    fn follow_descent(&self, id: LeaseId) {
        const INTERVAL: Duration = Duration::from_millis(500);
        let engine = self.clone();
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(INTERVAL).await;
                if engine.shared.state.borrow().get(id).is_none_or(|record| record.state != LeaseState::Open)
                {
                    return;
                }
                if let Err(error) = engine.look(SnapshotDepth::Ownership).await {
                    tracing::warn!(
                        lease = id.0,
                        "lease {id}: a look at its processes gave nothing: {}",
                        chain(&error)
                    );
                }
            }
        });
    }

    /// Lets a living owner out of its own lease, before the rest of that is ended: back to the group
    /// that it came from, which is the one above.
    pub(super) fn let_owner_out(&self, lease: &Lease) {
        let Some((_, path)) = lease.cgroup.as_ref().filter(|_| lease.owner_inside) else { return };
        if let Some(above) = std::path::Path::new(path).parent()
            && let Err(error) = cgroups::enter(above, lease.owner)
        {
            // The plan then leaves the group itself alone, and the lease is pinned until the owner
            // ends.
            tracing::warn!(
                lease = lease.id.0,
                "lease {}: its owner could not be let out of it: {error}",
                lease.id
            );
        }
    }

    /// Asks for a lease's owner until it can be told whether it lives; until then it counts as living.
    pub(super) fn ask_again(&self, lease: Lease, because: &io::Error) {
        const INTERVAL: Duration = Duration::from_secs(1);
        let id = lease.id;
        tracing::error!(
            lease = id.0,
            "lease {id}: whether its owner, process {}, lives cannot be told, so the lease stays open, and it is asked again each second: {because}",
            lease.owner.pid
        );
        let engine = self.clone();
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(INTERVAL).await;
                let is_open = engine.shared.state.borrow().get(id).map(|record| record.state);
                if is_open != Some(LeaseState::Open) {
                    return;
                }
                match owner_now(&lease) {
                    Owner::Unknown(_) => {}
                    Owner::Ended => {
                        engine.note_cause(id, Because::OwnerEnded);
                        let grace = engine.shared.config.borrow().reclaim.grace;
                        engine.end(id, grace);
                        return;
                    }
                    Owner::Lives(pidfd) => {
                        if engine.shared.watcher.watch_owner(id, pidfd).is_ok() {
                            tracing::info!(lease = id.0, "lease {id}: its owner lives, and is watched");
                            return;
                        }
                    }
                }
            }
        });
    }
}

/// What became of a lease's owner.
pub(super) enum Owner {
    Lives(OwnedFd),
    Ended,
    Unknown(io::Error),
}

/// Its number and start are known; where the kernel has a handle of it, that is what counts.
pub(super) fn owner_now(lease: &Lease) -> Owner {
    let pidfd = match signals::open(lease.owner) {
        Ok(Some(pidfd)) => pidfd,
        Ok(None) => return Owner::Ended,
        Err(error) => return Owner::Unknown(error),
    };
    match (&lease.owner_handle, calls::file_handle(&pidfd)) {
        (Some(known), Ok(now)) if now != *known => Owner::Ended,
        (Some(_) | None, _) => Owner::Lives(pidfd),
    }
}
