//! One look at the host. Reads only.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use super::blocks::{self, Careful};
use super::claims::{self, Places, Search};
use super::message::{Extent, LeaseQuery, Query};
use super::recheck::recheck;
use super::{criteria, glance, observe_mounts};
use crate::decide::nested_claims;
use crate::kernel::{cgroups, loops, processes, qemu};
use crate::model::{Gap, LoopState, ProcessIdentity, Snapshot, SnapshotDepth};

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
    blocks::read(&query.numbers, &mut Careful { avoid: &query.avoid, skip, touching }, &mut snapshot);
    observe_mounts::read_own(touching, &mut snapshot);
    observe_mounts::read_others(&mut Careful { avoid: &query.avoid, skip, touching }, &mut snapshot);
    match list_processes(query.depth, skip, touching) {
        Ok((processes, unreadable)) => {
            snapshot.processes = processes;
            let gaps = unreadable.into_iter().map(|(pid, cause)| Gap::Process(pid, cause));
            snapshot.gaps.extend(gaps);
        }
        Err(error) => snapshot.gaps.push(Gap::Processes(error.to_string())),
    }
    let mounts = std::mem::take(&mut snapshot.mounts);
    let search = Search::new(&mounts, &snapshot);
    let mut places = Places::new();
    for lease in &query.leases {
        read_lease(lease, skip, passed, &search, touching, &mut places, &mut snapshot);
    }
    snapshot.inner_claims = nested_claims(&places);
    criteria::read(
        query,
        search.points(),
        &mut Careful { avoid: &query.avoid, skip, touching },
        &mut snapshot,
    );
    snapshot.qemus =
        (query.depth == SnapshotDepth::Status).then(|| qemu::list(Path::new("/proc"), &snapshot.processes));
    snapshot.mounts = mounts;
    recheck(&mut snapshot);
    snapshot
}

/// Lists the processes. That one of them hangs is rare, and to tell of each before it is looked into costs
/// as much as to look: so that is done only once some did.
fn list_processes(
    depth: SnapshotDepth,
    skip: &[String],
    touching: &mut dyn FnMut(Option<u32>, &str),
) -> io::Result<processes::Listed> {
    let mut careful = Careful { avoid: &[], skip, touching };
    let one_by_one = !careful.may_touch(None, "processes");
    processes::list(Path::new("/proc"), depth, &mut |pid| {
        !one_by_one || careful.may_touch(None, &format!("what process {pid} holds"))
    })
}

/// One look on behalf of no lease, without the process around it: what the benchmarks measure. Nothing
/// gives up on what hangs, so the daemon never calls this. On kernels before 6.13 it visits mount
/// namespaces, which takes a process with one thread.
#[must_use]
pub fn look(depth: SnapshotDepth) -> Snapshot {
    look_while(depth, &mut |_, _| {})
}

/// The same, telling what is about to be touched: tests change the host in that very moment.
#[must_use]
pub fn look_while(depth: SnapshotDepth, touching: &mut dyn FnMut(Option<u32>, &str)) -> Snapshot {
    observe(&Query::host(depth), &[], &[], touching)
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
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
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
    search: &Search<'_>,
    touching: &mut dyn FnMut(Option<u32>, &str),
    places: &mut Places,
    snapshot: &mut Snapshot,
) {
    if let Some((expected, path)) = &lease.cgroup {
        let path = Path::new(path);
        match cgroups::identity(path) {
            Ok(identity) if identity == *expected => {
                snapshot.cgroups.insert(lease.lease, identity);
                match cgroups::members(path) {
                    Ok(pids) => {
                        let mut members = Vec::new();
                        for pid in pids {
                            match processes::start_time(pid) {
                                Ok(start) => members.push(ProcessIdentity { pid, start }),
                                Err(error) if processes::is_gone(&error) => {}
                                Err(error) => {
                                    let cause = format!("what its process {pid} is: {error}");
                                    snapshot.gaps.push(Gap::Cgroup(lease.lease, cause));
                                }
                            }
                        }
                        snapshot.members.insert(lease.lease, members);
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        snapshot.cgroups.remove(&lease.lease);
                    }
                    Err(error) => snapshot.gaps.push(Gap::Cgroup(lease.lease, error.to_string())),
                }
            }
            // Another one of that name is not ours.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => snapshot.gaps.push(Gap::Cgroup(lease.lease, error.to_string())),
        }
    }
    claims::read(lease, skip, passed, search, touching, places, snapshot);
}
