//! The cache of the user that builds for root.
//!
//! Root's own cache directory has one in it for each user that has ever built: a cache that belonged
//! to whoever came first would be of no use to the next. A directory that belongs to the build user
//! already is taken as it is. What is checked and what is given away is what was opened, never a path
//! that someone could have put something else at meanwhile.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, Gid, Mode, OFlags, Uid, fchmod, fchown, fstat, mkdirat, openat};
use rustix::io::Errno;

use super::DelegateError;
use super::user::BuildUser;

/// Root's download cache where none is asked for.
const SYSTEM_CACHE: &str = "/var/cache/hostler";

/// The build user's cache directory, and its path for people.
pub(super) fn open(asked: Option<&Path>, user: BuildUser) -> Result<(OwnedFd, PathBuf), DelegateError> {
    let base = asked.map(Path::to_owned).or_else(of_environment).unwrap_or_else(|| SYSTEM_CACHE.into());
    open_below(&base, user, rustix::process::geteuid().as_raw())
}

fn of_environment() -> Option<PathBuf> {
    std::env::var_os("HOSTLER_CACHE").filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// `root` is who this process is; not 0 in tests.
fn open_below(base: &Path, user: BuildUser, root: u32) -> Result<(OwnedFd, PathBuf), DelegateError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| DelegateError::Prepare { path, source }
    };
    let of_another =
        |path: &Path, owner| Err(DelegateError::Cache { path: path.to_owned(), owner, user: user.user });
    fs::create_dir_all(base).map_err(failed(base))?;
    let directory = File::open(base).map_err(failed(base))?;
    let owner = fstat(&directory).map_err(|error| failed(base)(error.into()))?.st_uid;
    if owner == user.user {
        return Ok((directory.into(), base.to_owned()));
    }
    if owner != root {
        return of_another(base, owner);
    }
    let name = user.user.to_string();
    let path = base.join(&name);
    let own = own_directory(&directory, &name, user, root).map_err(|error| failed(&path)(error.into()))?;
    match own {
        Ok(directory) => Ok((directory, path)),
        Err(owner) => of_another(&path, owner),
    }
}

/// The directory `name` of `user`, made where it is missing; or else the number of its owner.
fn own_directory(base: &File, name: &str, user: BuildUser, root: u32) -> Result<Result<OwnedFd, u32>, Errno> {
    match mkdirat(base, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(base, name, flags, Mode::empty())?;
    let owner = fstat(&directory)?.st_uid;
    if owner == user.user {
        return Ok(Ok(directory));
    }
    // Made just now, or by a process that died before the next lines. One with something in it is
    // not to be given away.
    if owner != root || !is_empty(&directory)? {
        return Ok(Err(owner));
    }
    fchmod(&directory, Mode::from_raw_mode(0o755))?;
    fchown(&directory, Some(Uid::from_raw(user.user)), Some(Gid::from_raw(user.group)))?;
    Ok(Ok(directory))
}

fn is_empty(directory: &OwnedFd) -> Result<bool, Errno> {
    for entry in Dir::read_from(directory.as_fd())? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn me() -> BuildUser {
        BuildUser { user: rustix::process::geteuid().as_raw(), group: rustix::process::getegid().as_raw() }
    }

    #[test]
    fn a_directory_of_the_build_users_is_taken_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("a/b");
        let (_, path) = open_below(&base, me(), 4_000_000).unwrap();
        assert_eq!(path, base);
    }

    #[test]
    fn anothers_directory_is_refused_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let other = BuildUser { user: me().user + 1, group: me().group };
        let error = open_below(folder.path(), other, 4_000_000).unwrap_err().to_string();
        assert!(error.contains(&format!("belongs to user {}", me().user)), "{error}");
        assert!(error.contains("chown 0:0") && error.contains("--cache"), "{error}");
    }

    #[test]
    fn what_lies_where_the_users_own_should_be_is_not_followed_nor_given_away() {
        // In this test, root is whoever runs it; only root itself could give a directory away.
        let folder = tempfile::tempdir().unwrap();
        let other = BuildUser { user: me().user + 1, group: me().group };
        let place = folder.path().join(other.user.to_string());
        let precious = tempfile::tempdir().unwrap();
        symlink(precious.path(), &place).unwrap();
        assert!(matches!(
            open_below(folder.path(), other, me().user),
            Err(DelegateError::Prepare { source, .. }) if source.raw_os_error() == Some(20)
                || source.raw_os_error() == Some(40)
        ));
        fs::remove_file(&place).unwrap();
        fs::create_dir_all(place.join("precious")).unwrap();
        assert!(matches!(
            open_below(folder.path(), other, me().user),
            Err(DelegateError::Cache { owner, .. }) if owner == me().user
        ));
    }
}
