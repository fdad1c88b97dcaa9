//! One look at the host. Reads only.

use std::collections::BTreeSet;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use super::blocks::{self, Careful};
use super::message::{ClaimQuery, LeaseQuery, Query};
use crate::kernel::{cgroups, directories, loops, mounts, processes};
use crate::model::{
    Gap, LoopState, Mount, MountNamespace, ProcessIdentity, Snapshot, SnapshotDepth, UnderClaim,
};

/// Looks. `touching` is told each loop device before it is asked, and all else that may hang; `skip` is
/// what it was told of at a look that did hang.
pub(super) fn observe(
    query: &Query,
    skip: &[String],
    passed: &[OwnedFd],
    touching: &mut dyn FnMut(Option<u32>, &str),
) -> Snapshot {
    let mut snapshot = Snapshot::default();
    read_loops(query, touching, &mut snapshot);
    blocks::read(Careful { avoid: &query.avoid, skip, touching }, &mut snapshot);
    match mounts::own() {
        Ok((namespace, mounts)) => {
            snapshot.namespace = Some(namespace);
            snapshot.mounts = mounts;
        }
        Err(error) => snapshot.gaps.push(Gap::Mounts(error.to_string())),
    }
    touching(None, "processes");
    match processes::list(Path::new("/proc"), query.depth) {
        Ok((processes, unreadable)) => {
            snapshot.processes = processes;
            let gaps = unreadable.into_iter().map(|(pid, cause)| Gap::Process(pid, cause));
            snapshot.gaps.extend(gaps);
        }
        Err(error) => snapshot.gaps.push(Gap::Processes(error.to_string())),
    }
    match query.depth {
        SnapshotDepth::Ownership => {}
        SnapshotDepth::Holders => read_other_namespaces(&mut snapshot),
    }
    for lease in &query.leases {
        read_lease(lease, passed, touching, &mut snapshot);
    }
    snapshot
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

/// The mounts of loop devices in the namespaces of other processes. Each namespace is read once,
/// through one of its processes, and its file is closed at once.
fn read_other_namespaces(snapshot: &mut Snapshot) {
    let mut seen: BTreeSet<MountNamespace> = snapshot.namespace.into_iter().collect();
    for process in snapshot.processes.iter().filter(|process| !process.ended) {
        let Some(namespace) = process.namespace else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        match mounts::of_process(process.identity.pid, namespace) {
            Ok(mounts) => {
                let of_loops = mounts.into_iter().filter(|mount: &Mount| {
                    snapshot.loops.iter().any(|device| device.has_device(mount.device()))
                });
                let of_loops: Vec<Mount> = of_loops.collect();
                snapshot.mounts.extend(of_loops);
            }
            // The process went; another one of the same namespace may follow.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::EINVAL)) => {
                seen.remove(&namespace);
            }
            Err(error) => snapshot.gaps.push(Gap::Namespace(namespace, error.to_string())),
        }
    }
}

fn read_lease(
    lease: &LeaseQuery,
    passed: &[OwnedFd],
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
    for query in &lease.claims {
        touching(None, "a claimed directory");
        if let Err(error) = read_claim(lease, query, passed, snapshot) {
            snapshot.gaps.push(Gap::Claim(lease.lease, error.to_string()));
        }
    }
}

fn read_claim(
    lease: &LeaseQuery,
    query: &ClaimQuery,
    passed: &[OwnedFd],
    snapshot: &mut Snapshot,
) -> std::io::Result<()> {
    let reopened;
    let directory: BorrowedFd<'_> = match query.descriptor.and_then(|index| passed.get(index)) {
        Some(descriptor) => std::os::fd::AsFd::as_fd(descriptor),
        None => match directories::reopen(&query.claim, &snapshot.mounts) {
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
    for mount in directories::mounts_below(directory, &snapshot.mounts)? {
        snapshot.claimed_mounts.push(UnderClaim { lease: lease.lease, what: mount });
    }
    Ok(())
}
