//! The part of a look that is about claimed directories: what lies below each. Reads only.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use hostler_protocol::lease::LeaseId;

use super::message::{ClaimQuery, LeaseQuery};
use crate::kernel::claimed::MountPoints;
use crate::kernel::{directories, loops};
use crate::model::{BackingFile, Gap, LoopState, Mount, Snapshot, UnderClaim};

/// What is searched for, in an order in which what lies below a directory is found without looking at all
/// else: there may be as many claims as loop devices.
pub(super) struct Search<'mounts> {
    points: MountPoints<'mounts>,
    /// By what sysfs calls them.
    files: Vec<(PathBuf, BackingFile)>,
}

impl<'mounts> Search<'mounts> {
    /// Of the loop devices of a snapshot, and of its mounts, which were taken out of it.
    pub(super) fn new(mounts: &'mounts [Mount], snapshot: &Snapshot) -> Self {
        let mut files = Vec::new();
        for device in &snapshot.loops {
            let LoopState::Bound(backing) = device.state else { continue };
            files.extend(loops::backing_hint(Path::new("/sys"), device.number).map(|hint| (hint, backing)));
        }
        files.sort();
        Self { points: MountPoints::new(mounts, snapshot.namespace), files }
    }

    pub(super) fn points(&self) -> &MountPoints<'mounts> {
        &self.points
    }

    /// Those that may be below a path. Paths are ordered by their components, so they are neighbours.
    fn files_below(&self, base: &Path) -> impl Iterator<Item = &(PathBuf, BackingFile)> {
        let begin = self.files.partition_point(|(hint, _)| hint.as_path() < base);
        self.files[begin..].iter().take_while(move |(hint, _)| hint.starts_with(base))
    }
}

/// Where claimed directories are, and whose they are.
pub(super) type Places = Vec<(PathBuf, LeaseId)>;

/// What lies below a lease's claims, of what the snapshot has.
pub(super) fn read(
    lease: &LeaseQuery,
    skip: &[String],
    passed: &[OwnedFd],
    search: &Search<'_>,
    touching: &mut dyn FnMut(Option<u32>, &str),
    places: &mut Places,
    snapshot: &mut Snapshot,
) {
    for query in &lease.claims {
        let what = query.announced(lease.lease);
        if skip.contains(&what) {
            // For the others, the look goes on.
            let cause = format!("{what} did not answer before; its file system may be stuck");
            snapshot.gaps.push(Gap::Claim(lease.lease, cause));
            continue;
        }
        touching(None, &what);
        if let Err(error) = read_claim(lease, query, passed, search, places, snapshot) {
            snapshot.gaps.push(Gap::Claim(lease.lease, error.to_string()));
        }
    }
}

fn read_claim(
    lease: &LeaseQuery,
    query: &ClaimQuery,
    passed: &[OwnedFd],
    search: &Search<'_>,
    places: &mut Places,
    snapshot: &mut Snapshot,
) -> std::io::Result<()> {
    let reopened;
    let directory: BorrowedFd<'_> = match query.descriptor.and_then(|index| passed.get(index)) {
        Some(descriptor) => descriptor.as_fd(),
        None => match directories::reopen(&query.claim, search.points.mounts()) {
            Ok(descriptor) => {
                reopened = descriptor;
                reopened.as_fd()
            }
            // Removed: then nothing lies below it.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESTALE | libc::ENOENT)) => return Ok(()),
            // Not mounted any more: nothing lies below it either. Of one that is to be removed it cannot be
            // told whether it still is there.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !query.claim.scratch => {
                return Ok(());
            }
            Err(error) => return Err(error),
        },
    };
    if directories::is_removed(directory)? {
        return Ok(());
    }
    let path = directories::path(directory)?;
    let under = |what| UnderClaim { lease: lease.lease, what };
    let mut files = Vec::new();
    for (hint, backing) in search.files_below(&path) {
        if directories::file_below(directory, hint)? == Some(*backing) {
            files.push(under(*backing));
        }
    }
    let mounts = search.points.below(directory)?;
    // All of it or nothing: a directory of which half is known looks like one with nothing else in it.
    snapshot.claimed_files.extend(files);
    snapshot.claimed_mounts.extend(mounts.into_iter().map(|what| UnderClaim { lease: lease.lease, what }));
    snapshot.directories.push(UnderClaim { lease: lease.lease, what: query.claim.directory });
    places.push((path, lease.lease));
    Ok(())
}
