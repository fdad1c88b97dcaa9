//! Which mounts lie below a claimed directory, or on it.
//!
//! The mount table's text says where to look; that a mount is there is then told by its number, read
//! through the directory's descriptor. Both are done once for each mount point, however many there are.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::ResolveFlags;

use super::{directories, mounts, reach};
use crate::model::{Mount, MountIdentity, MountNamespace, MountNumber};

/// The mounts of one namespace, so that those below a directory are found without looking at all others.
#[derive(Debug)]
pub struct MountPoints<'mounts> {
    mounts: Vec<&'mounts Mount>,
    /// By where they are.
    sorted: Vec<usize>,
    by_number: HashMap<MountNumber, usize>,
    by_short_number: HashMap<u64, usize>,
}

impl<'mounts> MountPoints<'mounts> {
    /// Of the mounts in `mounts` that are in the caller's namespace, as far as that is known.
    #[must_use]
    pub fn new(mounts: &'mounts [Mount], own: Option<MountNamespace>) -> Self {
        let is_own = |mount: &&Mount| Some(mount.identity.namespace) == own;
        let mounts: Vec<&Mount> = mounts.iter().filter(is_own).collect();
        let mut sorted: Vec<usize> = (0..mounts.len()).collect();
        sorted.sort_by(|one, other| mounts[*one].point.cmp(&mounts[*other].point));
        let indices = || mounts.iter().enumerate();
        let by_number = indices().map(|(index, mount)| (mount.identity.number, index)).collect();
        let by_short_number = indices().map(|(index, mount)| (mount.short_number, index)).collect();
        Self { mounts, sorted, by_number, by_short_number }
    }

    /// The mounts themselves.
    #[must_use]
    pub fn mounts(&self) -> &[&'mounts Mount] {
        &self.mounts
    }

    /// The mounts whose mount points lie below the directory, and those that are mounted right on it.
    ///
    /// # Errors
    /// What `readlink(2)` of the directory says.
    pub fn below(&self, directory: impl AsFd) -> io::Result<Vec<MountIdentity>> {
        let path = directories::path(&directory)?;
        let base = path.as_os_str().as_bytes();
        let mut found = self.on(&directory, base)?;
        let mut last: Option<(PathBuf, OwnedFd)> = None;
        for point in self.points_below(base) {
            let relative = point.strip_prefix(base).unwrap_or(point);
            let relative = Path::new(OsStr::from_bytes(relative.strip_prefix(b"/").unwrap_or(relative)));
            let (Some(parent), Some(name)) = (relative.parent(), relative.file_name()) else { continue };
            if last.as_ref().is_none_or(|(path, _)| path != parent) {
                // What cannot be opened is another directory of the same path, which is hidden here.
                let opened = reach::open_path(&directory, parent, ResolveFlags::BENEATH);
                last = opened.ok().map(|opened| (parent.to_owned(), opened));
            }
            let Some((_, parent)) = &last else { continue };
            found.extend(self.stack(self.top(parent, name), point));
        }
        found.sort_unstable();
        found.dedup();
        Ok(found.into_iter().map(|index| self.mounts[index].identity).collect())
    }

    /// Those mounted right on the directory. They hide it, but not from its descriptor, and they are in
    /// the way of whoever wants to remove it. When the directory is the root of a mount, that mount is
    /// not on it: it was there first, and only what is mounted on its root counts. Not found where the
    /// directory above is covered too, since `..` leads onto what covers it.
    fn on(&self, directory: impl AsFd, base: &[u8]) -> io::Result<Vec<usize>> {
        let Some(name) = Path::new(OsStr::from_bytes(base)).file_name() else { return Ok(Vec::new()) };
        let Some(own) = self.top(&directory, OsStr::new("")) else { return Ok(Vec::new()) };
        if !self.is_point(base) {
            return Ok(Vec::new());
        }
        let Ok(parent) = reach::open_path(&directory, Path::new(".."), ResolveFlags::empty()) else {
            return Ok(Vec::new());
        };
        let stack = self.stack(self.top(&parent, name), base);
        // Whose stack it is, is told by where it ends.
        let is_own = |index: usize| index == own;
        let below = stack.iter().position(|index| is_own(*index));
        let ends_on_own = stack.last().and_then(|last| self.parent(*last)).is_some_and(is_own);
        Ok(match below {
            Some(below) => stack[..below].to_vec(),
            None if ends_on_own => stack,
            None => Vec::new(),
        })
    }

    fn is_point(&self, point: &[u8]) -> bool {
        self.sorted.binary_search_by(|index| self.mounts[*index].point.as_slice().cmp(point)).is_ok()
    }

    /// Each mount point below a path, once.
    fn points_below(&self, base: &[u8]) -> Vec<&'mounts [u8]> {
        let mut prefix = base.to_vec();
        if base != b"/" {
            prefix.push(b'/');
        }
        let begin = self.sorted.partition_point(|index| self.mounts[*index].point < prefix);
        let points = self.sorted[begin..].iter().map(|index| self.mounts[*index].point.as_slice());
        let mut points: Vec<&[u8]> = points.take_while(|point| point.starts_with(&prefix)).collect();
        points.dedup();
        points.retain(|point| point.len() > prefix.len());
        points
    }

    /// The mount that a name in a directory leads to; without a name, the one that the directory is on.
    fn top(&self, directory: impl AsFd, name: &OsStr) -> Option<usize> {
        let unique = matches!(self.mounts.first()?.identity.number, MountNumber::Unique(_));
        self.by_number.get(&mounts::number_at(directory, name, unique).ok()?).copied()
    }

    fn parent(&self, index: usize) -> Option<usize> {
        self.by_short_number.get(&self.mounts[index].parent?).copied()
    }

    /// The mounts on one point, from the one on top down.
    fn stack(&self, top: Option<usize>, point: &[u8]) -> Vec<usize> {
        let mut stack = Vec::new();
        let mut next = top;
        while let Some(index) = next.filter(|index| self.mounts[*index].point == point) {
            // Each is on the one below it, so this ends; text that went in a circle would not.
            if stack.len() == self.mounts.len() {
                break;
            }
            stack.push(index);
            next = self.parent(index);
        }
        stack
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DeviceNumber, fixture};

    fn mount(number: u64, parent: u64, point: &str) -> Mount {
        fixture::mount(number, parent, DeviceNumber { major: 0, minor: 40 }, point)
    }

    #[test]
    fn finds_points_below_a_path_and_none_beside() {
        let mut mounts = vec![
            mount(1, 0, "/"),
            mount(2, 1, "/a"),
            mount(3, 2, "/a/b"),
            mount(4, 3, "/a/b"),
            mount(5, 1, "/a-b"),
            mount(6, 1, "/a b/c"),
            mount(7, 2, "/a/b/c"),
        ];
        mounts.push(mount(8, 1, "/a/foreign"));
        mounts[7].identity.namespace = MountNamespace(2);
        let points = MountPoints::new(&mounts, Some(MountNamespace(1)));
        assert_eq!(points.points_below(b"/a"), [&b"/a/b"[..], b"/a/b/c"]);
        assert_eq!(points.points_below(b"/x"), Vec::<&[u8]>::new());
        assert_eq!(points.points_below(b"/").len(), 5);
        assert!(points.is_point(b"/a") && !points.is_point(b"/a/"));
    }

    #[test]
    fn a_stack_is_all_that_is_on_one_point() {
        let mounts =
            [mount(1, 0, "/"), mount(3, 1, "/a"), mount(4, 3, "/a"), mount(5, 4, "/a"), mount(6, 5, "/a/b")];
        let points = MountPoints::new(&mounts, Some(MountNamespace(1)));
        assert_eq!(points.stack(Some(3), b"/a"), [3, 2, 1]);
        assert_eq!(points.stack(Some(2), b"/a"), [2, 1]);
        assert_eq!(points.stack(Some(4), b"/a"), Vec::<usize>::new());
        assert_eq!(points.stack(None, b"/a"), Vec::<usize>::new());
        // No kernel shows a circle.
        let circle = [mount(1, 2, "/a"), mount(2, 1, "/a")];
        assert_eq!(MountPoints::new(&circle, Some(MountNamespace(1))).stack(Some(0), b"/a").len(), 2);
    }
}
