//! The part of a look that is about the administrator's rules and `[protect]`. Reads only.
//!
//! The two err in opposite directions. That a rule is about something has to be proven, by the directory's
//! descriptor and the file's identity. That something is protected needs only a sign of it: a name that
//! says so is enough, and what cannot be told counts as protected.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::blocks::Careful;
use super::message::Query;
use crate::kernel::backing::{self, Named};
use crate::kernel::claimed::MountPoints;
use crate::kernel::{directories, loops};
use crate::model::{
    Criterion, DeviceNumber, Gap, LoopDevice, LoopIdentity, Match, Mount, ResourceIdentity, Snapshot,
};

/// A bound loop device and what sysfs calls its file.
struct Backed {
    identity: LoopIdentity,
    hint: PathBuf,
    /// Its file was proven to lie below a claimed directory.
    is_claimed: bool,
    /// What that leads to, when that is the device's file; `Err` when it cannot be told.
    file: Result<Option<Named>, String>,
}

/// Reads into a snapshot that has its loop devices and mounts already.
pub(super) fn read(
    query: &Query,
    points: &MountPoints<'_>,
    careful: &mut Careful<'_>,
    snapshot: &mut Snapshot,
) {
    let mut all = query.criteria.iter().chain(&query.protected);
    let wants_files = all.any(|criterion| matches!(criterion, Criterion::Loop { .. }));
    let backed = if wants_files { backed(careful, snapshot) } else { Vec::new() };
    for criterion in &query.criteria {
        match find(criterion, &backed, points, careful, &mut snapshot.gaps) {
            Ok(found) => {
                let matched = |what| Match { criterion: criterion.clone(), what };
                snapshot.matches.extend(found.into_iter().map(matched));
            }
            Err(cause) => {
                let sentence = format!("what a rule is about ({criterion}) could not be told: {cause}");
                snapshot.gaps.push(Gap::Criterion(sentence));
            }
        }
    }
    for criterion in &query.protected {
        protect(criterion, &backed, points, careful, snapshot);
    }
}

fn backed(careful: &mut Careful<'_>, snapshot: &Snapshot) -> Vec<Backed> {
    let identities = snapshot.loops.iter().filter_map(LoopDevice::identity);
    let of_device = |identity: LoopIdentity| {
        let number = identity.number;
        let Some(hint) = loops::backing_hint(Path::new("/sys"), number) else {
            // Gone meanwhile, or its path is longer than the kernel shows.
            let file = Err("the kernel does not tell its file's path".to_owned());
            return Backed { identity, hint: PathBuf::new(), is_claimed: false, file };
        };
        let file = if careful.may_touch(Some(number), &format!("the backing file of /dev/loop{number}")) {
            backing::at(&hint).map_err(|error| error.to_string())
        } else {
            Err("looking its file up hung before".to_owned())
        };
        let file = file.map(|named| named.filter(|named| named.identity == identity.backing));
        let is_claimed = snapshot.claimed_files.iter().any(|claimed| claimed.what == identity.backing);
        Backed { identity, hint, is_claimed, file }
    };
    identities.map(of_device).collect()
}

/// What is proven to be what a rule asks for.
fn find(
    criterion: &Criterion,
    backed: &[Backed],
    points: &MountPoints<'_>,
    careful: &mut Careful<'_>,
    gaps: &mut Vec<Gap>,
) -> Result<Vec<ResourceIdentity>, String> {
    let text = |error: io::Error| error.to_string();
    let mut open = |path: &Path| {
        if careful.may_touch(None, &format!("the directory of {criterion}")) {
            backing::open_directory(path).map_err(text)
        } else {
            Err("opening it hung before".to_owned())
        }
    };
    let mut found = Vec::new();
    match criterion {
        Criterion::Loop { backing_under, uid } => {
            let directory = match backing_under {
                Some(path) => match open(path)? {
                    Some(directory) => Some(directory),
                    None => return Ok(found),
                },
                None => None,
            };
            for device in backed {
                match is_about(device, directory.as_ref(), *uid) {
                    Ok(true) => found.push(ResourceIdentity::Loop(device.identity)),
                    Ok(false) => {}
                    Err(cause) => {
                        let number = device.identity.number;
                        gaps.push(Gap::Criterion(format!(
                            "whether a rule ({criterion}) is about /dev/loop{number} could not be told: {cause}"
                        )));
                    }
                }
            }
        }
        Criterion::Mount { mounted_under } => {
            if let Some(directory) = open(mounted_under)? {
                let below = points.below(&directory).map_err(text)?;
                found.extend(below.into_iter().map(ResourceIdentity::Mount));
            }
        }
    }
    Ok(found)
}

fn is_about(device: &Backed, directory: Option<&OwnedFd>, uid: Option<u32>) -> Result<bool, String> {
    let Some(named) = device.file.clone()? else { return Ok(false) };
    if uid.is_some_and(|uid| uid != named.uid) {
        return Ok(false);
    }
    let Some(directory) = directory else { return Ok(true) };
    // A file with several names lies in several directories, and nobody can tell in which of them its
    // owner left it.
    if named.names != 1 {
        return Ok(false);
    }
    let below = directories::file_below(directory, &device.hint).map_err(|error| error.to_string())?;
    Ok(below == Some(device.identity.backing))
}

/// Whether `[protect]` names something.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    Yes,
    No,
    Unclear(String),
}

impl Answer {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::No, _) | (_, Self::No) => Self::No,
            (unclear @ Self::Unclear(_), _) | (_, unclear @ Self::Unclear(_)) => unclear,
            (Self::Yes, Self::Yes) => Self::Yes,
        }
    }
}

fn protect(
    criterion: &Criterion,
    backed: &[Backed],
    points: &MountPoints<'_>,
    careful: &mut Careful<'_>,
    snapshot: &mut Snapshot,
) {
    let directory = match criterion {
        Criterion::Loop { backing_under, .. } => backing_under.as_deref(),
        Criterion::Mount { mounted_under } => Some(mounted_under.as_path()),
    };
    // The name is what counts; but one that leads on to another directory means that one.
    let wrong = directory.and_then(|path| {
        if careful.may_touch(None, &format!("the protected directory of {criterion}")) {
            backing::open_directory(path).err().map(|error| error.to_string())
        } else {
            Some("opening it hung before".to_owned())
        }
    });
    if let Some(cause) = &wrong {
        let sentence =
            format!("what [protect] protects ({criterion}) could not be told, so everything is: {cause}");
        snapshot.gaps.push(Gap::Criterion(sentence));
    }
    match criterion {
        Criterion::Loop { backing_under, uid } => {
            for device in backed {
                let below = backing_under.as_deref().map_or(Answer::Yes, |path| {
                    if wrong.is_some() { Answer::Yes } else { is_named_below(device, path, points.mounts()) }
                });
                let of_user = uid.map_or(Answer::Yes, |uid| is_of(device, uid));
                let answer = below.and(of_user);
                if answer != Answer::No {
                    snapshot.protected.insert(ResourceIdentity::Loop(device.identity));
                }
                if let Answer::Unclear(cause) = answer {
                    let number = device.identity.number;
                    snapshot.gaps.push(Gap::Criterion(format!(
                        "whether [protect] ({criterion}) protects /dev/loop{number} cannot be told, so it does: {cause}"
                    )));
                }
            }
        }
        Criterion::Mount { mounted_under } => {
            let point = |mount: &Mount| Path::new(OsStr::from_bytes(&mount.point)).to_owned();
            let named = points.mounts().iter().filter(|mount| point(mount).starts_with(mounted_under));
            let all = points.mounts().iter().filter(|_| wrong.is_some());
            snapshot.protected.extend(named.chain(all).map(|mount| ResourceIdentity::Mount(mount.identity)));
        }
    }
}

fn is_named_below(device: &Backed, directory: &Path, mounts: &[&Mount]) -> Answer {
    let elsewhere = || match (place(&device.hint, mounts), place(directory, mounts)) {
        (Some((device, file)), Some((other, directory))) => device == other && file.starts_with(directory),
        (Some(_) | None, _) => false,
    };
    // A file that is not where its name leads has the name that it has in another namespace, or none. A
    // deleted one lies in no directory, and a claimed one in the claimed.
    let may_be_anywhere = || {
        let on = place(directory, mounts).map(|(device, _)| device);
        let is_deleted = device.hint.as_os_str().as_bytes().ends_with(b" (deleted)");
        !matches!(device.file, Ok(Some(_)))
            && !is_deleted
            && !device.is_claimed
            && on == Some(device.identity.backing.device)
    };
    if !device.hint.starts_with(directory) && !elsewhere() && !may_be_anywhere() {
        return Answer::No;
    }
    match &device.file {
        Ok(Some(_)) => Answer::Yes,
        Ok(None) => Answer::Unclear("its file is not where it was opened any more".to_owned()),
        Err(cause) => Answer::Unclear(cause.clone()),
    }
}

fn is_of(device: &Backed, uid: u32) -> Answer {
    match &device.file {
        Ok(Some(named)) if named.uid == uid => Answer::Yes,
        Ok(Some(_)) => Answer::No,
        Ok(None) => Answer::Unclear("its file is not where it was opened any more".to_owned()),
        Err(cause) => Answer::Unclear(cause.clone()),
    }
}

/// Where a path lies in which file system: a directory that is bound elsewhere has several names.
fn place(path: &Path, mounts: &[&Mount]) -> Option<(DeviceNumber, PathBuf)> {
    let point = |mount: &Mount| Path::new(OsStr::from_bytes(&mount.point)).to_owned();
    // The upper of two on one point comes later.
    let above = mounts.iter().filter(|mount| path.starts_with(point(mount)));
    let mount = above.max_by_key(|mount| mount.point.len())?;
    let below = path.strip_prefix(point(mount)).ok()?;
    Some((mount.device(), Path::new(OsStr::from_bytes(&mount.root)).join(below)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BackingFile, DiskSequence, MountIdentity, MountNamespace, MountNumber};

    const DISK: DeviceNumber = DeviceNumber { major: 8, minor: 1 };

    fn mount(number: u64, point: &str, root: &str) -> Mount {
        Mount {
            identity: MountIdentity {
                number: MountNumber::Unique(number),
                namespace: MountNamespace(1),
                device: DISK,
            },
            short_number: number,
            parent: (number > 1).then_some(1),
            point: point.as_bytes().to_vec(),
            root: root.as_bytes().to_vec(),
            filesystem: "ext4".to_owned(),
            source: Vec::new(),
            peers: None,
            master: None,
            layers: Vec::new(),
            user: None,
        }
    }

    fn backed(hint: &str, file: Result<Option<u32>, &str>) -> Backed {
        let backing = BackingFile { device: DISK, inode: 5 };
        let identity = LoopIdentity { number: 3, sequence: DiskSequence(9), backing };
        let named = |uid| Named { identity: backing, uid, names: 1 };
        let file = file.map(|uid| uid.map(named)).map_err(str::to_owned);
        Backed { identity, hint: PathBuf::from(hint), is_claimed: false, file }
    }

    #[test]
    fn a_protected_directory_protects_by_each_of_its_names() {
        let (root, bind) = (mount(1, "/", "/"), mount(2, "/var/images", "/srv/vm/images"));
        let mounts = [&root, &bind];
        let answer = |hint: &str| is_named_below(&backed(hint, Ok(Some(0))), Path::new("/srv/vm"), &mounts);
        assert_eq!(answer("/srv/vm/a.img"), Answer::Yes);
        assert_eq!(answer("/var/images/a.img"), Answer::Yes);
        assert_eq!(answer("/srv/vms/a.img"), Answer::No);
        assert_eq!(answer("/var/a.img"), Answer::No);
    }

    #[test]
    fn what_may_be_protected_is_not_told_to_be_free() {
        let root = mount(1, "/", "/");
        let gone = backed("/srv/vm/a.img (deleted)", Ok(None));
        assert!(matches!(is_named_below(&gone, Path::new("/srv/vm"), &[&root]), Answer::Unclear(_)));
        assert!(matches!(is_of(&gone, 0), Answer::Unclear(_)));
        // The name that a file on the same disk has in a container, or none that the kernel tells.
        for hint in ["/mnt/a.img", ""] {
            let elsewhere = backed(hint, Ok(None));
            assert!(matches!(is_named_below(&elsewhere, Path::new("/srv/vm"), &[&root]), Answer::Unclear(_)));
            let claimed = Backed { is_claimed: true, ..elsewhere };
            assert_eq!(is_named_below(&claimed, Path::new("/srv/vm"), &[&root]), Answer::No);
        }
        let deleted = backed("/tmp/a.img (deleted)", Ok(None));
        assert_eq!(is_named_below(&deleted, Path::new("/srv/vm"), &[&root]), Answer::No);
        let unreadable = backed("/srv/vm/a.img", Err("denied"));
        assert_eq!(is_of(&unreadable, 0), Answer::Unclear("denied".to_owned()));
        assert_eq!(is_of(&backed("/a", Ok(Some(7))), 0), Answer::No);
        assert_eq!(Answer::No.and(is_of(&gone, 0)), Answer::No);
    }
}
