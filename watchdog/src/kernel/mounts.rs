//! The mount tables of this and other mount namespaces.
//!
//! A table is read until it holds still: which mount is on which decides in what order they can go.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use linux_raw_sys::general::{FUSE_SUPER_MAGIC, NSFS_MAGIC, OVERLAYFS_SUPER_MAGIC};
use rustix::fs::{AtFlags, StatxFlags, statx};

use super::statmount::{self, Basics};
use super::visit::Visit;
use super::{budget, mountinfo, namespace_calls};
use crate::model::{DeviceNumber, Mount, MountIdentity, MountNamespace, MountNumber};

/// `STATX_MNT_ID_UNIQUE` (Linux 6.8), which rustix has no name for.
const MOUNT_NUMBER_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// The namespace that a process is in; without one the caller's.
///
/// # Errors
/// `ENOENT` when the process is gone, `EACCES` when it may not be looked at.
pub fn namespace_of(pid: Option<u32>) -> io::Result<MountNamespace> {
    let path = match pid {
        Some(pid) => format!("/proc/{pid}/ns/mnt"),
        None => "/proc/thread-self/ns/mnt".to_owned(),
    };
    // The link's text is `mnt:[INODE]`. Reading it opens nothing, so it pins nothing.
    let text = std::fs::read_link(path)?;
    let inode = text.to_str().and_then(|text| text.strip_prefix("mnt:[")?.strip_suffix(']')?.parse().ok());
    inode
        .map(MountNamespace)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a namespace link"))
}

/// How often a table is read again when it changes meanwhile.
const READ_LIMIT: u32 = 8;

/// Whoever starts a container makes dozens of mounts in a few milliseconds: each time a little more
/// patience than before, a quarter of a second in all.
fn wait_for_stillness(reads: u32) {
    std::thread::sleep(Duration::from_millis(1 << reads));
}

fn never_still() -> io::Error {
    io::Error::new(io::ErrorKind::WouldBlock, "the mount table changed at each of several reads")
}

/// All mounts of the caller's own namespace, in mountinfo's order but for this: a mount comes after the
/// one it is on. (Since Linux 6.8 the kernel orders them by age, and a mount can be moved onto a younger
/// one.)
///
/// # Errors
/// What reading or parsing mountinfo says, and `WouldBlock` when the table does not hold still.
pub fn own() -> io::Result<(MountNamespace, Vec<Mount>)> {
    let home = Visit::at_home()?;
    Ok((home.namespace(), table(&home)?))
}

/// All mounts of the namespace that is visited, in the same order.
///
/// Mountinfo tells all but the unique numbers, which are asked for beside it. Asking the kernel for each
/// mount as a whole instead takes as long as both with the parsing (5,000 mounts on Linux 6.18: 2.0 ms,
/// 1.4 ms and 1.2 ms, against 4.4 ms), and does not tell everything before 6.13.
///
/// # Errors
/// As [`own`].
pub fn table(visit: &Visit) -> io::Result<Vec<Mount>> {
    for reads in 0..READ_LIMIT {
        let mut table = visit.table()?;
        let numbers = match unique_numbers() {
            Ok(numbers) => numbers,
            // A mount went between two calls.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                wait_for_stillness(reads);
                continue;
            }
            Err(error) => return Err(error),
        };
        let entries = mountinfo::parse(&table.read()?)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if table.has_changed()? {
            wait_for_stillness(reads);
            continue;
        }
        let mut mounts = Vec::with_capacity(entries.len());
        for (index, entry) in entries.into_iter().enumerate() {
            let number = match &numbers {
                None => MountNumber::Reusable(entry.number),
                Some(numbers) => MountNumber::Unique(unique_of(numbers, index, entry.number)?),
            };
            mounts.push(mount(entry, number, visit.namespace()));
        }
        return Ok(parents_first(mounts));
    }
    Err(never_still())
}

/// The short numbers of the caller's namespace with the unique ones behind them; `None` before Linux 6.8.
fn unique_numbers() -> io::Result<Option<Vec<(u64, u64)>>> {
    let listed = match namespace_calls::list_mounts(None, 0) {
        Ok(listed) => listed,
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut numbers = Vec::with_capacity(listed.len());
    for unique in listed {
        numbers.push((statmount::short_number(unique)?, unique));
    }
    Ok(Some(numbers))
}

/// Both lists are in the same order, as far as is known; that is only used to look there first.
fn unique_of(numbers: &[(u64, u64)], index: usize, short: u64) -> io::Result<u64> {
    let likely = numbers.get(index).filter(|(number, _)| *number == short);
    let found = likely.or_else(|| numbers.iter().find(|(number, _)| *number == short));
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "a mount has no unique number");
    found.map(|(_, unique)| *unique).ok_or_else(missing)
}

fn mount(entry: mountinfo::Entry, number: MountNumber, namespace: MountNamespace) -> Mount {
    Mount {
        identity: MountIdentity { number, namespace, device: entry.device },
        short_number: entry.number,
        parent: (entry.parent != entry.number).then_some(entry.parent),
        point: entry.point,
        root: entry.root,
        filesystem: entry.filesystem,
        source: entry.source,
        peers: entry.peers,
        master: entry.master,
        layers: entry.layers,
        user: entry.user,
    }
}

/// Where each of some mounts is among them, by number.
struct Places(Vec<(u64, usize)>);

impl Places {
    fn of(numbers: impl Iterator<Item = u64>) -> Self {
        let mut places: Vec<(u64, usize)> =
            numbers.enumerate().map(|(place, number)| (number, place)).collect();
        // In order already or nearly so, which is why this is quicker than a hash table.
        places.sort_unstable();
        Self(places)
    }

    fn get(&self, number: u64) -> Option<usize> {
        let found = self.0.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        Some(self.0[found].1)
    }
}

/// Pure: the same mounts, each after the one it is on, and else in the order they came.
fn parents_first(mounts: Vec<Mount>) -> Vec<Mount> {
    let places = Places::of(mounts.iter().map(|mount| mount.short_number));
    let parents: Vec<Option<usize>> = mounts.iter().map(|mount| places.get(mount.parent?)).collect();
    if parents.iter().enumerate().all(|(place, parent)| parent.is_none_or(|parent| parent < place)) {
        return mounts;
    }
    let mut left: Vec<Option<Mount>> = mounts.into_iter().map(Some).collect();
    let mut ordered = Vec::with_capacity(left.len());
    let mut above = Vec::new();
    for place in 0..left.len() {
        let mut next = Some(place);
        while let Some(current) = next.filter(|current| left[*current].is_some()) {
            above.push(current);
            // What the kernel calls a tree has no circle; text that had one would still end here.
            next = parents[current].filter(|parent| !above.contains(parent));
        }
        ordered.extend(above.drain(..).rev().filter_map(|current| left[current].take()));
    }
    ordered
}

/// Which mounts of other namespaces matter: those on a block device that somebody may have leaked, and
/// those of the kinds that keep something else in use. What is mounted on such a mount matters too.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The file systems, by the number that their mounts show.
    pub devices: HashSet<DeviceNumber>,
}

impl Wanted {
    fn by_basics(&self, basics: &Basics) -> bool {
        const KINDS: [u32; 3] = [FUSE_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, NSFS_MAGIC];
        self.devices.contains(&basics.device) || KINDS.iter().any(|kind| u64::from(*kind) == basics.magic)
    }

    fn by_mount(&self, mount: &Mount) -> bool {
        // `fusectl` is none of them.
        let kind = mount.filesystem.split('.').next().unwrap_or_default();
        self.devices.contains(&mount.device()) || matches!(kind, "fuse" | "fuseblk" | "overlay" | "nsfs")
    }
}

/// Pure: which of these mounts are wanted for themselves or are, directly or not, on one that is. Each is
/// given as its number, the number of the mount it is on, and whether it is wanted.
///
/// What is on a namespace's root does not matter for that: the root is never unmounted, and of a
/// container with an overlay as its root everything would be on it.
fn wanted_with_all_on_them(mounts: &[(u64, u64, bool)]) -> Vec<bool> {
    let places = Places::of(mounts.iter().map(|(number, ..)| *number));
    let parents: Vec<Option<usize>> =
        mounts.iter().map(|(number, on, _)| places.get(*on).filter(|_| on != number)).collect();
    let mut known: Vec<Option<bool>> = mounts.iter().map(|(.., wanted)| wanted.then_some(true)).collect();
    let mut above = Vec::new();
    for place in 0..mounts.len() {
        let mut current = place;
        let verdict = loop {
            if let Some(verdict) = known[current] {
                break verdict;
            }
            // Until it is known better: so a circle, which no kernel makes, ends too.
            known[current] = Some(false);
            above.push(current);
            match parents[current].filter(|parent| parents[*parent].is_some()) {
                Some(parent) => current = parent,
                None => break false,
            }
        };
        for passed in above.drain(..) {
            known[passed] = Some(verdict);
        }
    }
    known.into_iter().map(|wanted| wanted == Some(true)).collect()
}

/// The wanted mounts of another namespace, by its unique number: nothing is entered or opened. For
/// kernels that tell of a mount all that mountinfo does; see [`statmount::tells_all`].
///
/// # Errors
/// `ENOENT` when the namespace is gone, `WouldBlock` when it does not hold still, and when it has too many;
/// see [`budget`].
pub fn of_number(unique: u64, namespace: MountNamespace, wanted: &Wanted) -> io::Result<Vec<Mount>> {
    let mut buffer = Vec::new();
    for reads in 0..READ_LIMIT {
        let listed = namespace_calls::list_mounts(Some(unique), 0)?;
        let mounts = read_listed(unique, namespace, &listed, wanted, &mut buffer)?;
        // What came or went shows in the list, and what was moved in its two readings, see there.
        match mounts {
            Some(mounts) if namespace_calls::list_mounts(Some(unique), 0)? == listed => {
                return Ok(parents_first(mounts));
            }
            Some(_) | None => wait_for_stillness(reads),
        }
    }
    Err(never_still())
}

/// `None` when something changed meanwhile.
fn read_listed(
    unique: u64,
    namespace: MountNamespace,
    listed: &[u64],
    wanted: &Wanted,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<Vec<Mount>>> {
    let mut all = Vec::with_capacity(listed.len());
    for number in listed {
        match statmount::basics(Some(unique), *number) {
            Ok(basics) => all.push(basics),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    let tree: Vec<(u64, u64, bool)> =
        all.iter().map(|basics| (basics.unique, basics.parent, wanted.by_basics(basics))).collect();
    let keep = wanted_with_all_on_them(&tree);
    let (mut mounts, mut size) = (Vec::new(), 0);
    for (basics, _) in all.iter().zip(keep).filter(|(_, keep)| *keep) {
        let whole = match statmount::whole(Some(unique), basics, buffer) {
            Ok(whole) => whole,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        };
        if whole.basics.parent != basics.parent {
            return Ok(None);
        }
        let mount = from_whole(whole, namespace);
        size += budget::size(&mount);
        if size > budget::OF_ONE {
            return Err(budget::too_much());
        }
        mounts.push(mount);
    }
    Ok(Some(mounts))
}

fn from_whole(whole: statmount::Whole, namespace: MountNamespace) -> Mount {
    let basics = whole.basics;
    Mount {
        identity: MountIdentity {
            number: MountNumber::Unique(basics.unique),
            namespace,
            device: basics.device,
        },
        short_number: basics.short,
        parent: (basics.parent != basics.unique).then_some(basics.parent_short),
        point: whole.point,
        root: whole.root,
        filesystem: whole.filesystem,
        source: whole.source.unwrap_or_default(),
        peers: basics.peers,
        master: basics.master,
        layers: whole.options,
        // Below a claim only the own namespace's are.
        user: None,
    }
}

/// Pure: those mounts of a namespace that are wanted.
#[must_use]
pub fn keep_wanted(mounts: Vec<Mount>, wanted: &Wanted) -> Vec<Mount> {
    let on = |mount: &Mount| mount.parent.unwrap_or(mount.short_number);
    let tree: Vec<(u64, u64, bool)> =
        mounts.iter().map(|mount| (mount.short_number, on(mount), wanted.by_mount(mount))).collect();
    let keep = wanted_with_all_on_them(&tree);
    mounts.into_iter().zip(keep).filter_map(|(mount, keep)| keep.then_some(mount)).collect()
}

/// One mount of the own namespace by its unique number, with everything that [`own`] tells of it; `None`
/// when it is not there. For a look at what an event told.
///
/// # Errors
/// `ENOSYS` before Linux 6.8.
pub fn one(unique: u64) -> io::Result<Option<Mount>> {
    one_of(&Visit::at_home()?, unique)
}

/// The same in the namespace that is visited.
///
/// # Errors
/// As [`one`].
pub fn one_of(visit: &Visit, unique: u64) -> io::Result<Option<Mount>> {
    let whole =
        statmount::basics(None, unique).and_then(|basics| statmount::whole(None, &basics, &mut Vec::new()));
    match whole {
        Ok(whole) if whole.source.is_some() => Ok(Some(from_whole(whole, visit.namespace()))),
        // Either nobody said what was mounted, or the kernel does not tell before Linux 6.13.
        Ok(_) => {
            let found = |mount: &Mount| mount.identity.number == MountNumber::Unique(unique);
            Ok(table(visit)?.into_iter().find(found))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The number of the mount that `path`, seen from `directory`, lies on: of its topmost mount when
/// it is a mount point. Asks no file system for anything, so it does not hang.
///
/// # Errors
/// `ENOENT` and its like.
pub fn number_at(directory: impl AsFd, path: &OsStr, unique: bool) -> io::Result<MountNumber> {
    let wanted = if unique { MOUNT_NUMBER_UNIQUE } else { StatxFlags::MNT_ID };
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let status = match statx(&directory, path, flags | AtFlags::EMPTY_PATH, wanted) {
        Err(rustix::io::Errno::ACCESS) => return number_without_looking(directory, path, unique),
        status => status?,
    };
    if StatxFlags::from_bits_retain(status.stx_mask).contains(wanted) {
        Ok(if unique {
            MountNumber::Unique(status.stx_mnt_id)
        } else {
            MountNumber::Reusable(status.stx_mnt_id)
        })
    } else {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }
}

/// The same of a user's FUSE file system, of which root is told nothing else either: a call that wants
/// nothing is answered, and its answer has the number that is given again.
fn number_without_looking(directory: impl AsFd, path: &OsStr, unique: bool) -> io::Result<MountNumber> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let short = || {
        let status = statx(&directory, path, flags | AtFlags::EMPTY_PATH, StatxFlags::empty())?;
        let is_told = StatxFlags::from_bits_retain(status.stx_mask).contains(StatxFlags::MNT_ID);
        if is_told { Ok(status.stx_mnt_id) } else { Err(io::Error::from(io::ErrorKind::PermissionDenied)) }
    };
    let number = short()?;
    if !unique {
        return Ok(MountNumber::Reusable(number));
    }
    let numbers = unique_numbers()?.ok_or(io::ErrorKind::Unsupported)?;
    let found = unique_of(&numbers, 0, number)?;
    // It had both numbers at once: it is still there, and still the one.
    if statmount::short_number(found)? == number && short()? == number {
        Ok(MountNumber::Unique(found))
    } else {
        Err(io::Error::from(io::ErrorKind::PermissionDenied))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::fixture;

    fn mount(number: u64, parent: u64) -> Mount {
        fixture::mount(number, parent, DeviceNumber { major: 0, minor: 40 }, "")
    }

    fn ordered(mounts: &[(u64, u64)]) -> Vec<u64> {
        let mounts = mounts.iter().map(|(number, parent)| mount(*number, *parent)).collect();
        parents_first(mounts).iter().map(|mount| mount.short_number).collect()
    }

    #[test]
    fn a_mount_comes_after_the_one_it_is_on() {
        assert_eq!(ordered(&[(27, 1), (22, 27), (23, 27)]), [27, 22, 23]);
        assert_eq!(ordered(&[(22, 27), (23, 22), (27, 1), (24, 28), (28, 23)]), [27, 22, 23, 28, 24]);
        // No kernel shows a circle, or two of one number.
        assert_eq!(ordered(&[(1, 2), (2, 1), (3, 1)]), [2, 1, 3]);
        assert_eq!(ordered(&[(1, 1), (1, 1)]), [1, 1]);
        assert_eq!(ordered(&[]), Vec::<u64>::new());
    }

    #[test]
    fn wants_what_is_on_something_wanted_but_not_all_that_is_on_a_root() {
        // 2 is a namespace's root and wanted, with 3 on it; 4 is wanted, with 5 and 6 on it.
        let mounts = [
            (6, 5, false),
            (2, 1, true),
            (3, 2, false),
            (4, 2, true),
            (5, 4, false),
            (7, 3, false),
            (8, 8, true),
        ];
        assert_eq!(wanted_with_all_on_them(&mounts), [true, true, false, true, true, false, true]);
        assert_eq!(wanted_with_all_on_them(&[(1, 2, false), (2, 1, false)]), [false, false]);
    }

    #[test]
    fn wants_kinds_that_keep_something_in_use() {
        let devices = HashSet::from([DeviceNumber { major: 7, minor: 1 }]);
        let wanted = Wanted { devices };
        let mut one = mount(1, 2);
        for (kind, expected) in [
            ("fuse", true),
            ("fuse.sshfs", true),
            ("fuseblk", true),
            ("overlay", true),
            ("nsfs", true),
            ("fusectl", false),
            ("tmpfs", false),
        ] {
            one.filesystem = kind.to_owned();
            assert_eq!(wanted.by_mount(&one), expected, "{kind}");
        }
        one.identity.device = DeviceNumber { major: 7, minor: 1 };
        assert!(wanted.by_mount(&one));
    }
}
