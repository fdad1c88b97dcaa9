//! What a descriptor that a client passed is of, as a worker found it: who has it, has shown that he may.

use serde::{Deserialize, Serialize};

use super::identity::{DirectoryIdentity, LoopIdentity, MountNumber, ProcessIdentity};

/// What a descriptor ought to be of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// A process (a pidfd).
    Process,
    /// A directory.
    Directory,
    /// A loop device.
    Loop,
}

/// A process that somebody has a pidfd of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvenProcess {
    /// Which.
    pub process: ProcessIdentity,
    /// Its real user.
    pub user: u32,
}

/// A directory that somebody opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvenDirectory {
    /// Which.
    pub directory: DirectoryIdentity,
    /// Whose it is.
    pub owner: u32,
    /// Where it is; fit to be printed.
    pub path: String,
    /// Anybody may make entries in it.
    pub is_everybodys: bool,
    /// It is the root directory.
    pub is_root: bool,
    /// Its file handle; absent where the file system has none. A descriptor is kept instead.
    pub handle: Option<(i32, Vec<u8>)>,
    /// The mount that it was opened on.
    pub mount: Option<MountNumber>,
}

/// A loop device that somebody opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvenLoop {
    /// Which attachment: it was held open while this was read.
    pub identity: LoopIdentity,
    /// It was opened for writing.
    pub is_writable: bool,
}

/// What a descriptor is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// A living process.
    Process(ProvenProcess),
    /// A directory.
    Directory(ProvenDirectory),
    /// A bound loop device.
    Loop(ProvenLoop),
    /// Not what was wanted, and why.
    None(String),
}
