//! A daemon's own processes: which they are, and what they may do, as `/proc` tells.

use std::fs;

use crate::failure::OrFail;

/// A child of a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// Its number.
    pub pid: u32,
    /// Its arguments after the program.
    pub arguments: Vec<String>,
}

/// The living children of a process.
#[must_use]
pub fn children(of: u32) -> Vec<Child> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").or_fail("reading /proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Some(status) = status(pid) else { continue };
        if field(&status, "PPid") != Some(of.to_string()) {
            continue;
        }
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = words.split(|byte| *byte == 0).skip(1).filter(|word| !word.is_empty());
        let arguments: Vec<String> = words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        // One that has ended and not been waited for has none.
        if !arguments.is_empty() {
            found.push(Child { pid, arguments });
        }
    }
    found
}

/// The reader of a user's, once it is one.
#[must_use]
pub fn reader(of: u32, user: u32) -> Option<Child> {
    let is_it = |child: &Child| child.arguments.starts_with(&["reader".to_owned(), user.to_string()]);
    children(of).into_iter().find(is_it)
}

/// A line of a process's `status`, such as `Uid` or `CapEff`, with single spaces.
///
/// # Panics
/// When it has gone, or the kernel has no such line.
#[must_use]
#[track_caller]
pub fn status_of(pid: u32, name: &str) -> String {
    let status = status(pid).or_fail(format_args!("process {pid}"));
    field(&status, name).or_fail(format_args!("{name} of process {pid}"))
}

fn status(pid: u32) -> Option<String> {
    fs::read(format!("/proc/{pid}/status")).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn field(status: &str, name: &str) -> Option<String> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(value.split_whitespace().collect::<Vec<_>>().join(" "))
}
