//! Finds programs of the host by their names.
//!
//! In `PATH`, as people expect, and then where Debian keeps its own: an ordinary user's `PATH` often
//! lacks the `sbin` directories. What a program is told to run later is looked up nowhere.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// Where Debian keeps its programs, and what the tools themselves get as their `PATH`.
pub(super) const DIRECTORIES: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds a program by its name.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let search = std::env::var_os("PATH").unwrap_or_default();
    find_in(name, &search)
}

fn find_in(name: &str, search: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(search)
        // What a relative one means depends on where the user happens to be.
        .filter(|folder| folder.is_absolute())
        .chain(std::env::split_paths(DIRECTORIES))
        .map(|folder| folder.join(name))
        .find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_folders_in_the_search_path_are_passed_over() {
        let found = find_in("sh", OsStr::new(".:bin:/nonexistent")).unwrap();
        assert!(found.is_absolute());
        assert_eq!(find_in("no such program", OsStr::new("/bin")), None);
    }

    #[test]
    fn the_users_path_comes_first_and_what_cannot_be_executed_is_no_program() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("sh");
        std::fs::write(&own, "").unwrap();
        assert_ne!(find_in("sh", folder.path().as_os_str()), Some(own.clone()));
        std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find_in("sh", folder.path().as_os_str()), Some(own));
    }
}
