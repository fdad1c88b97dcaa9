//! What clients put under their leases: processes, loop devices, directories. Each is proven by a descriptor.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use hostler_protocol::lease::{Epoch, LeaseId};
use hostler_protocol::methods::CallError;

use super::Engine;
use super::lifecycle::{Caller, Passed, limit_reached, refused, unavailable};
use crate::causes::chain;
use crate::journal::Entry;
use crate::kernel::cgroups;
use crate::model::{
    Claim, DiskSequence, Gap, Lease, ProcessIdentity, Proof, ProvenDirectory, ProvenLoop, ProvenProcess,
    ResourceIdentity, SnapshotDepth, Wanted,
};
use crate::worker::{Examined, WorkerError};

/// How many descriptors of claimed directories are kept, of all leases together and of one user's. All of
/// them go beside one message to a worker, which can carry 253.
const KEPT_LIMIT: usize = 200;
const KEPT_FOR_USER: usize = 32;

impl Engine {
    /// What a descriptor is of that a client passed, as a worker finds it.
    async fn examine(
        &self,
        caller: Caller,
        passed: Passed<'_>,
        wanted: Wanted,
    ) -> Result<Examined, CallError> {
        let number = i32::try_from(passed.number).map_err(|_| refused("there is no such descriptor"))?;
        let silence = self.shared.config.borrow().reclaim.step_timeout;
        let examined = self.shared.pool.examine(caller.uid, passed.reader, number, wanted, silence).await;
        match examined {
            Ok(Examined { proof: Proof::None(why), .. }) => Err(refused(why)),
            Ok(examined) => Ok(examined),
            Err(error @ (WorkerError::Hung { .. } | WorkerError::TooManyHang { .. })) => {
                Err(refused(error.to_string()))
            }
            Err(error) => Err(unavailable(chain(&error))),
        }
    }

    /// The process of a pidfd, when it is of the caller's user.
    pub(super) async fn owned_process(
        &self,
        caller: Caller,
        passed: Passed<'_>,
    ) -> Result<ProcessIdentity, CallError> {
        let examined = self.examine(caller, passed, Wanted::Process).await?;
        let Proof::Process(ProvenProcess { process, user }) = examined.proof else {
            return Err(refused("that descriptor is no pidfd"));
        };
        if caller.may_use(user) {
            Ok(process)
        } else {
            Err(refused(format!("process {} is not one of user {}", process.pid, caller.uid)))
        }
    }

    /// Puts a process under a lease.
    ///
    /// # Errors
    /// When the lease or the process is not the caller's.
    pub async fn adopt(
        &self,
        caller: Caller,
        id: LeaseId,
        epoch: Epoch,
        pidfd: Passed<'_>,
    ) -> Result<(), CallError> {
        self.room_for_a_resource(caller, id, epoch)?;
        let process = self.owned_process(caller, pidfd).await?;
        // It may have ended while that was looked at.
        let lease = self.room_for_a_resource(caller, id, epoch)?;
        if let Some((_, path)) = &lease.cgroup
            && !cgroups::enter(std::path::Path::new(path), process).map_err(unavailable)?
        {
            return Err(refused("that process has ended"));
        }
        self.change(id, |lease| {
            lease.owner_inside |= process == lease.owner;
            lease.processes.insert(process);
        })
        .await;
        self.tell_registered(caller, id, ResourceIdentity::Process(process));
        Ok(())
    }

    /// Puts a loop device under a lease.
    ///
    /// # Errors
    /// When the descriptor is of no bound loop device that the caller may open for writing.
    pub async fn register_loop(
        &self,
        caller: Caller,
        id: LeaseId,
        epoch: Epoch,
        device: Passed<'_>,
    ) -> Result<(), CallError> {
        self.room_for_a_resource(caller, id, epoch)?;
        let examined = self.examine(caller, device, Wanted::Loop).await?;
        // Whoever may only read a device must not be able to have it detached.
        let Proof::Loop(ProvenLoop { identity, is_writable: true }) = examined.proof else {
            return Err(refused("that descriptor is of no loop device that was opened for writing"));
        };
        self.room_for_a_resource(caller, id, epoch)?;
        self.change(id, |lease| {
            lease.loops.insert(identity);
        })
        .await;
        self.tell_registered(caller, id, ResourceIdentity::Loop(identity));
        Ok(())
    }

    /// Claims a directory for a lease.
    ///
    /// # Errors
    /// When the lease or the directory is not the caller's, or a limit is reached.
    pub async fn claim(
        &self,
        caller: Caller,
        id: LeaseId,
        epoch: Epoch,
        directory: Passed<'_>,
        scratch: bool,
    ) -> Result<(), CallError> {
        self.room_for_a_claim(caller, id, epoch)?;
        let Examined { proof, kept } = self.examine(caller, directory, Wanted::Directory).await?;
        let Proof::Directory(proven) = proof else {
            return Err(refused("that descriptor is of no directory"));
        };
        let shown = &proven.path;
        if proven.is_root {
            return Err(refused(
                "the root directory cannot be claimed; claim the directory that the job works in",
            ));
        }
        let owner = proven.owner;
        if !caller.may_use(owner) || (owner != caller.uid && scratch) {
            return Err(refused(format!("{shown} belongs to user {owner}; claim a directory of your own")));
        }
        if scratch && proven.is_everybodys {
            return Err(refused(format!(
                "everybody may write to {shown}, so it cannot be removed with all it holds; `chmod o-w` it, or claim it without having it removed"
            )));
        }
        let lease = self.room_for_a_claim(caller, id, epoch)?;
        let is_claimed = |claim: &Claim| claim.directory == proven.directory && claim.scratch == scratch;
        if lease.claims.iter().any(is_claimed) {
            return Ok(());
        }
        let is_first = lease.claims.is_empty();
        let ProvenDirectory { directory, path, handle, mount, .. } = proven;
        let claim = Claim { directory, scratch, path, handle, mount };
        let kept = kept.filter(|_| claim.handle.is_none()).map(Rc::new);
        self.add_claim(caller, epoch, id, claim.clone(), kept, is_first).await?;
        self.tell_claimed(caller, id, &claim);
        Ok(())
    }

    /// Takes a claim into a lease, together with what lay below the directory before, which is not
    /// the lease's. Both in one step: a look that knew the claim alone would take all that for the
    /// lease's, and remember it as such.
    async fn add_claim(
        &self,
        caller: Caller,
        epoch: Epoch,
        id: LeaseId,
        claim: Claim,
        kept: Option<Rc<OwnedFd>>,
        is_first: bool,
    ) -> Result<(), CallError> {
        let snapshot = self.observe_claim(id, &claim, kept.as_ref()).await.map_err(unavailable)?;
        let unclear = snapshot.gaps.iter().find(|gap| match gap {
            Gap::Mounts(_) | Gap::Loops(_) | Gap::Unasked => true,
            Gap::Claim(lease, _) => *lease == id,
            Gap::Loop(..)
            | Gap::Blocks(_)
            | Gap::Namespaces(_)
            | Gap::Processes(_)
            | Gap::Process(..)
            | Gap::Namespace(..)
            | Gap::Cgroup(..)
            | Gap::Criterion(_) => false,
        });
        if let Some(gap) = unclear {
            return Err(unavailable(format!(
                "what lies in the directory cannot be told: {}",
                gap.sentence()
            )));
        }
        if !is_first {
            // What the lease has made below its earlier claims must be known as its own before its marks are
            // set to what is there now. This comes after the look that they are taken from, so that what is
            // made in between is later than they are.
            self.look(SnapshotDepth::Ownership).await.map_err(unavailable)?;
        }
        let below = snapshot.claimed_mounts.iter().filter(|found| found.lease == id).map(|found| found.what);
        let all_namespaces_read = !snapshot.gaps.iter().any(|gap| matches!(gap, Gap::Namespaces(_)));
        let newest = snapshot.loops.iter().filter_map(|device| device.sequence).max();
        let entry = {
            // Others may have claimed meanwhile, and the lease may be over by now.
            self.room_for_a_claim(caller, id, epoch)?;
            let mut state = self.shared.state.borrow_mut();
            if kept.is_some() && !state.may_keep(caller.uid, KEPT_FOR_USER, KEPT_LIMIT) {
                return Err(refused(format!(
                    "{} is on a file system without file handles, and {KEPT_FOR_USER} directories of such are claimed by one user already, or {KEPT_LIMIT} by all; claim one on a disk",
                    claim.path
                )));
            }
            let record = state.get_mut(id).ok_or(CallError::NoSuchLease { lease: id })?;
            if let Some(directory) = kept {
                record.descriptors.insert(record.lease.claims.len(), directory);
            }
            let lease = &mut record.lease;
            lease.claims.push(claim);
            // What it made below an earlier claim stays its own.
            lease.mounts_before.extend(below.filter(|mount| !lease.mounts.contains(mount)));
            lease.loops_before = lease.loops_before.max(newest.unwrap_or(DiskSequence(0)));
            if lease.namespaces_there.is_none() && all_namespaces_read {
                let there = snapshot.namespaces.iter().filter_map(|namespace| namespace.unique);
                lease.namespaces_there = Some(there.collect());
            }
            Entry::Lease { lease: Box::new(lease.clone()) }
        };
        self.record(vec![entry]).await;
        Ok(())
    }

    /// The same, when it can take in one more directory.
    fn room_for_a_claim(&self, caller: Caller, id: LeaseId, epoch: Epoch) -> Result<Lease, CallError> {
        let lease = self.open_lease_of(caller, id, epoch)?;
        let limit = self.shared.config.borrow().limits.claims;
        if lease.claims.len() < limit { Ok(lease) } else { Err(limit_reached("claims", limit)) }
    }

    /// The same, when it can take in one more process or loop device.
    fn room_for_a_resource(&self, caller: Caller, id: LeaseId, epoch: Epoch) -> Result<Lease, CallError> {
        let lease = self.open_lease_of(caller, id, epoch)?;
        let limit = self.shared.config.borrow().limits.resources;
        let count = lease.processes.len() + lease.loops.len();
        if count < limit { Ok(lease) } else { Err(limit_reached("resources", limit)) }
    }
}
