//! Does one step of a plan. Checks the identity, makes the calls, says how they went, chooses
//! nothing.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use super::message::ClaimQuery;
use super::{hold, release};
use crate::kernel::unmount::{self, Unmounted};
use crate::kernel::{Acted, Found, cgroups, directories, fuse, loops, maps, mounts, nbd, signals, swaps};
use crate::model::{
    CgroupIdentity, DirectoryIdentity, ProcessIdentity, ResourceIdentity, Step, StepResult, SwapIdentity,
};

/// How long killed processes have to be gone. A process in uninterruptible sleep takes as long as
/// it takes; the second look reports it.
const KILL_WAIT: Duration = Duration::from_secs(3);
const SYS: &str = "/sys";
const PROC: &str = "/proc";

pub(super) fn act(step: &Step, claim: Option<&ClaimQuery>, passed: &[OwnedFd]) -> StepResult {
    let result = match step {
        Step::EndProcesses { processes, cgroup, term_timeout_ms } => {
            end_processes(processes, cgroup.as_ref(), Duration::from_millis(*term_timeout_ms))
        }
        Step::Unmount { mount, short_number, point, apart_from, how, .. } => apart_from
            .map_or(Ok(()), |parent| unmount::part_from_peers(&parent))
            .and_then(|()| unmount::unmount(mount, *short_number, point, *how))
            .map(unmounted),
        Step::AbortFuse { mount } => {
            fuse::abort(Path::new(SYS), mount.device, || unmount::is_mounted(mount)).map(acted)
        }
        Step::SwapOff { swap, path, on } => swap_off(*swap, path, on.as_deref()),
        Step::ReleaseFilesystem { kind, device, resource, swap_files } => {
            release::release(kind, *device, resource, swap_files)
        }
        Step::RemoveMap { map, .. } => maps::remove(Path::new(SYS), map).map(acted),
        Step::DisconnectNbd { nbd } => nbd::disconnect(Path::new(SYS), Path::new(PROC), nbd).map(acted),
        Step::DetachLoop { identity, partitions } => loops::detach(identity, partitions).map(acted),
        Step::RemoveDirectory { directory, .. } => remove_directory(*directory, claim, passed),
        Step::RemoveCgroup { cgroup, path } => remove_cgroup(*cgroup, Path::new(path)),
    };
    result.unwrap_or_else(|error| StepResult::Failed { cause: error.to_string() })
}

/// Stops swapping to an area while what it lies on is held.
fn swap_off(swap: SwapIdentity, path: &[u8], on: Option<&ResourceIdentity>) -> io::Result<StepResult> {
    let device = match swap {
        SwapIdentity::Device(device) => Some(device),
        SwapIdentity::File(_) | SwapIdentity::Unreachable(_) => None,
    };
    let _held = match on.map(|disk| hold::hold(Path::new(SYS), Path::new(PROC), device, disk)).transpose()? {
        None => None,
        Some(Found::It(held)) => Some(held),
        Some(Found::Gone) => return Ok(StepResult::Gone),
        Some(Found::Replaced) => return Ok(StepResult::Replaced),
    };
    swaps::off(Path::new(PROC), swap, path).map(acted)
}

fn acted(acted: Acted) -> StepResult {
    match acted {
        Acted::Done => StepResult::Done,
        Acted::Gone => StepResult::Gone,
        Acted::Replaced => StepResult::Replaced,
    }
}

fn unmounted(unmounted: Unmounted) -> StepResult {
    match unmounted {
        Unmounted::Done => StepResult::Done,
        Unmounted::Gone => StepResult::Gone,
        Unmounted::Locked => StepResult::Locked,
        Unmounted::OtherOnTop => StepResult::Failed {
            cause: "something else is mounted above it, or its mount point was moved".to_owned(),
        },
    }
}

fn end_processes(
    processes: &[ProcessIdentity],
    cgroup: Option<&(CgroupIdentity, String)>,
    term_timeout: Duration,
) -> io::Result<StepResult> {
    let mut pidfds = Vec::new();
    // One that cannot be opened or signalled does not spare the others; what it was is told at the end.
    let mut failure = None;
    for process in processes {
        match signals::open(*process) {
            Ok(pidfd) => pidfds.extend(pidfd),
            Err(error) => failure = Some(error),
        }
    }
    if pidfds.is_empty() && cgroup.is_none() && failure.is_none() {
        return Ok(StepResult::Gone);
    }
    for pidfd in &pidfds {
        // A stopped process acts on SIGTERM only once it goes on.
        for signal in [Signal::TERM, Signal::CONT] {
            failure = signals::send(pidfd, signal).err().or(failure);
        }
    }
    let stubborn = signals::wait_for_all(pidfds.iter().collect(), term_timeout)?;
    for pidfd in &stubborn {
        failure = signals::send(pidfd, Signal::KILL).err().or(failure);
    }
    if let Some((identity, path)) = cgroup {
        let path = Path::new(path);
        if cgroups::identity(path).is_ok_and(|now| now == *identity) {
            match cgroups::kill(path) {
                Ok(()) => {}
                // Version 1 and kernels before 5.14 have no such file: the next round finds what
                // was born meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => failure = Some(error),
            }
        }
    }
    let left = signals::wait_for_all(stubborn, KILL_WAIT)?;
    if let Some(failure) = failure {
        Err(failure)
    } else if left.is_empty() {
        Ok(StepResult::Done)
    } else {
        Ok(StepResult::Failed { cause: format!("{} processes did not end on SIGKILL in time", left.len()) })
    }
}

fn remove_directory(
    directory: DirectoryIdentity,
    claim: Option<&ClaimQuery>,
    passed: &[OwnedFd],
) -> io::Result<StepResult> {
    let claim = claim
        .filter(|query| query.claim.directory == directory)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the step's claim was not passed"))?;
    let reopened;
    let descriptor = match claim.descriptor.and_then(|index| passed.get(index)) {
        Some(descriptor) => descriptor,
        None => {
            let (_, mounts) = mounts::own()?;
            match directories::reopen(&claim.claim, &mounts.iter().collect::<Vec<_>>()) {
                Ok(found) => reopened = found,
                Err(error) if matches!(error.raw_os_error(), Some(libc::ESTALE | libc::ENOENT)) => {
                    return Ok(StepResult::Gone);
                }
                Err(error) => return Err(error),
            }
            &reopened
        }
    };
    if directories::identity(descriptor)? != directory || directories::is_removed(descriptor)? {
        return Ok(StepResult::Gone);
    }
    directories::remove(descriptor)?;
    Ok(StepResult::Done)
}

fn remove_cgroup(cgroup: CgroupIdentity, path: &Path) -> io::Result<StepResult> {
    match cgroups::identity(path) {
        Ok(identity) if identity == cgroup => {}
        Ok(_) => return Ok(StepResult::Replaced),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(StepResult::Gone),
        Err(error) => return Err(error),
    }
    cgroups::remove(path)?;
    Ok(StepResult::Done)
}
