//! Finds the host's programs and learns their versions.
//!
//! Programs are looked up once, by name, in `PATH` and then where Debian keeps those of the
//! administrator; children get a cleared environment, so nothing is looked up again later.
//! Deliberately absent: any judgement about versions.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{Access, access};

use crate::child::{self, ChildError};

/// How long a program may take to tell its version.
const DEADLINE: Duration = Duration::from_secs(30);

/// Finds a program by its name.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let search = std::env::var_os("PATH").unwrap_or_default();
    find_in(name, &search)
}

fn find_in(name: &str, search: &OsStr) -> Option<PathBuf> {
    let administrators = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(search)
        .filter(|folder| folder.is_absolute())
        .chain(administrators)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file() && access(path, Access::EXEC_OK).is_ok())
}

/// The version that `program --version` tells, or `None` when it tells none.
///
/// # Errors
/// When the program cannot be run.
pub fn version(program: &Path) -> Result<Option<String>, ChildError> {
    let mut command = child::command(program);
    command.arg("--version").stdin(Stdio::null());
    let output = child::output(command, DEADLINE, None)?;
    Ok(parse_version(&output.stdout))
}

/// The text after `version` on the first line: `7.2.22 (Debian 1:7.2+dfsg-7)`.
fn parse_version(text: &str) -> Option<String> {
    let line = text.lines().next()?;
    let (_, version) = line.split_once("version ")?;
    let version: String = version.chars().filter(|character| !character.is_control()).take(120).collect();
    Some(version.trim().to_owned()).filter(|version| !version.is_empty())
}

/// The processor's name, as the kernel tells it; part of what an acceleration verdict depends on.
///
/// # Errors
/// When `/proc/cpuinfo` cannot be read.
pub fn processor() -> io::Result<String> {
    Ok(parse_processor(&std::fs::read_to_string("/proc/cpuinfo")?))
}

fn parse_processor(text: &str) -> String {
    text.lines()
        .find_map(|line| line.strip_prefix("model name"))
        .and_then(|rest| rest.split_once(':'))
        .map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_what_follows_the_word() {
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright\n"),
            Some("7.2.22 (Debian 1:7.2+dfsg-7)".into())
        );
        assert_eq!(
            parse_version("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7)\n"),
            Some("7.2.22 (Debian 1:7.2+dfsg-7)".into())
        );
        assert_eq!(parse_version("hello\n"), None);
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn relative_folders_in_the_search_path_are_passed_over() {
        let found = find_in("sh", OsStr::new(".:bin:/nonexistent")).unwrap();
        assert!(found.is_absolute());
        assert_eq!(find_in("no such program", OsStr::new("/bin")), None);
    }

    #[test]
    fn the_first_processor_gives_the_name() {
        assert_eq!(
            parse_processor("processor\t: 0\nmodel name\t: Some CPU\nmodel name\t: Other\n"),
            "Some CPU"
        );
        assert_eq!(parse_processor(""), "unknown");
    }
}
