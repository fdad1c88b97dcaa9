//! One look at the host. Reads only.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use super::blocks::{self, Careful};
use super::message::{ClaimQuery, Extent, LeaseQuery, Query};
use super::{criteria, glance, observe_mounts};
use crate::kernel::claimed::MountPoints;
use crate::kernel::{cgroups, directories, loops, processes, qemu};
use crate::model::{Gap, LoopState, ProcessIdentity, Snapshot, SnapshotDepth, UnderClaim};

/// Looks. `touching` is told each loop device before it is asked, and all else that may hang; `skip` is
/// what it was told of at a look that did hang.
pub(super) fn observe(
    query: &Query,
    skip: &[String],
    passed: &[OwnedFd],
    touching: &mut dyn FnMut(Option<u32>, &str),
) -> Snapshot {
    if let Extent::Only { loops, mounts } = &query.extent {
        return glance::glance((loops, mounts), query, skip, passed, touching);
    }
    let mut snapshot = Snapshot::default();
    read_loops(query, touching, &mut snapshot);
    blocks::read(&mut Careful { avoid: &query.avoid, skip, touching }, &mut snapshot);
    observe_mounts::read_own(touching, &mut snapshot);
    observe_mounts::read_others(touching, &mut snapshot);
    touching(None, "processes");
    match processes::list(Path::new("/proc"), query.depth) {
        Ok((processes, unreadable)) => {
            snapshot.processes = processes;
            let gaps = unreadable.into_iter().map(|(pid, cause)| Gap::Process(pid, cause));
            snapshot.gaps.extend(gaps);
        }
        Err(error) => snapshot.gaps.push(Gap::Processes(error.to_string())),
    }
    let mounts = std::mem::take(&mut snapshot.mounts);
    let points = MountPoints::new(&mounts, snapshot.namespace);
    for lease in &query.leases {
        read_lease(lease, skip, passed, &points, touching, &mut snapshot);
    }
    criteria::read(query, &points, &mut Careful { avoid: &query.avoid, skip, touching }, &mut snapshot);
    snapshot.qemus = qemu::list(Path::new("/proc"), &snapshot.processes);
    snapshot.mounts = mounts;
    snapshot
}

/// One look on behalf of no lease, without the process around it: what the benchmarks measure. Nothing
/// gives up on what hangs, so the daemon never calls this. On kernels before 6.13 it visits mount
/// namespaces, which takes a process with one thread.
#[must_use]
pub fn look(depth: SnapshotDepth) -> Snapshot {
    let query = Query {
        extent: Extent::Host,
        depth,
        leases: Vec::new(),
        criteria: Vec::new(),
        protected: Vec::new(),
        avoid: Vec::new(),
    };
    observe(&query, &[], &[], &mut |_, _| {})
}

fn read_loops(query: &Query, touching: &mut dyn FnMut(Option<u32>, &str), snapshot: &mut Snapshot) {
    let listed = match loops::list(Path::new("/sys")) {
        Ok(listed) => listed,
        Err(error) => {
            snapshot.gaps.push(Gap::Loops(error.to_string()));
            return;
        }
    };
    for mut device in listed {
        if device.state == LoopState::Leftover {
            // There is nothing to ask it.
        } else if query.avoid.contains(&device.number) {
            let cause = "it did not answer before; its backing file's file system may be stuck";
            snapshot.gaps.push(Gap::Loop(device.number, cause.to_owned()));
        } else {
            touching(Some(device.number), "loop device");
            match loops::ask(&mut device) {
                Ok(()) => {}
                // Its node is gone with it: it was removed between the two reads.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => snapshot.gaps.push(Gap::Loop(device.number, error.to_string())),
            }
        }
        snapshot.loops.push(device);
    }
}

fn read_lease(
    lease: &LeaseQuery,
    skip: &[String],
    passed: &[OwnedFd],
    points: &MountPoints<'_>,
    touching: &mut dyn FnMut(Option<u32>, &str),
    snapshot: &mut Snapshot,
) {
    if let Some((expected, path)) = &lease.cgroup {
        let path = Path::new(path);
        match cgroups::identity(path) {
            Ok(identity) if identity == *expected => {
                snapshot.cgroups.insert(lease.lease, identity);
                match cgroups::members(path) {
                    Ok(pids) => {
                        let members = pids.into_iter().filter_map(|pid| {
                            let start = processes::start_time(pid).ok()?;
                            Some(ProcessIdentity { pid, start })
                        });
                        snapshot.members.insert(lease.lease, members.collect());
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                        snapshot.cgroups.remove(&lease.lease);
                    }
                    Err(error) => snapshot.gaps.push(Gap::Cgroup(lease.lease, error.to_string())),
                }
            }
            // Another one of that name is not ours.
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => snapshot.gaps.push(Gap::Cgroup(lease.lease, error.to_string())),
        }
    }
    read_claims(lease, skip, passed, points, touching, snapshot);
}

/// What lies below a lease's claims, of what the snapshot has.
pub(super) fn read_claims(
    lease: &LeaseQuery,
    skip: &[String],
    passed: &[OwnedFd],
    points: &MountPoints<'_>,
    touching: &mut dyn FnMut(Option<u32>, &str),
    snapshot: &mut Snapshot,
) {
    for query in &lease.claims {
        let what = format!("the directory {} that lease {} claimed", query.claim.path, lease.lease);
        if skip.contains(&what) {
            // For the others, the look goes on.
            let cause = format!("{what} did not answer before; its file system may be stuck");
            snapshot.gaps.push(Gap::Claim(lease.lease, cause));
            continue;
        }
        touching(None, &what);
        if let Err(error) = read_claim(lease, query, passed, points, snapshot) {
            snapshot.gaps.push(Gap::Claim(lease.lease, error.to_string()));
        }
    }
}

fn read_claim(
    lease: &LeaseQuery,
    query: &ClaimQuery,
    passed: &[OwnedFd],
    points: &MountPoints<'_>,
    snapshot: &mut Snapshot,
) -> std::io::Result<()> {
    let reopened;
    let directory: BorrowedFd<'_> = match query.descriptor.and_then(|index| passed.get(index)) {
        Some(descriptor) => std::os::fd::AsFd::as_fd(descriptor),
        None => match directories::reopen(&query.claim, points.mounts()) {
            Ok(descriptor) => {
                reopened = descriptor;
                std::os::fd::AsFd::as_fd(&reopened)
            }
            // Removed: then nothing lies below it.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESTALE | libc::ENOENT)) => return Ok(()),
            Err(error) => return Err(error),
        },
    };
    if directories::is_removed(directory)? {
        return Ok(());
    }
    snapshot.directories.push(UnderClaim { lease: lease.lease, what: query.claim.directory });
    for device in &snapshot.loops {
        let LoopState::Bound(backing) = device.state else { continue };
        let Some(hint) = loops::backing_hint(Path::new("/sys"), device.number) else { continue };
        if directories::file_below(directory, &hint)? == Some(backing) {
            snapshot.claimed_files.push(UnderClaim { lease: lease.lease, what: backing });
        }
    }
    for mount in points.below(directory)? {
        snapshot.claimed_mounts.push(UnderClaim { lease: lease.lease, what: mount });
    }
    Ok(())
}
