//! What a build is asked for, what it has around it, and what it comes to.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::beside::Beside;
use crate::cache::{Counted, Supply};
use crate::cancel::Cancel;
use crate::event::{Sink, Stage};
use crate::recipe::Recipe;
use crate::vm::argv::Accelerator;

use super::delivery::Delivery;
use super::preflight::Workspace;
use super::registrar::Registrar;

/// What to build, and where.
#[derive(Clone, Debug)]
pub struct Request {
    /// The recipe.
    pub recipe: Recipe,
    /// Where the scratch directory is made.
    pub workspace: Workspace,
    /// The folder of the recipe.
    pub beside: Beside,
    /// The download cache.
    pub cache: PathBuf,
    /// The root of the file system whose apt sources count.
    pub apt_root: PathBuf,
    /// What is done for a person who looks for the cause of a failure.
    pub debugging: Debugging,
    /// What the build may use.
    pub supply: Supply,
    /// Whether it delivers its lock.
    pub locks: bool,
    /// The time that a build is to have taken place at, so that the same inputs make the same files;
    /// `SOURCE_DATE_EPOCH` of the environment.
    pub time: Option<SystemTime>,
}

impl Request {
    /// The time in seconds since 1970, if one was asked for.
    pub(super) fn epoch(&self) -> Option<u64> {
        self.time.map(seconds)
    }
}

/// Seconds since 1970.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What is done for a person who looks for the cause of a failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Debugging {
    /// Keep the disks of a guest that failed beside what is known of it.
    pub keeps: bool,
    /// Keep a guest that failed running, with a shell on its console where it can have one.
    pub holds: bool,
}

/// What a build has around it.
#[derive(Clone)]
pub struct Environment {
    /// The `hostler` program, for `hostler __vm`.
    pub shim: PathBuf,
    /// The watchdog.
    pub registrar: Arc<dyn Registrar>,
    /// The wish to stop.
    pub cancel: Arc<Cancel>,
    /// Takes the progress.
    pub sink: Arc<dyn Sink>,
    /// Takes the finished files.
    pub delivery: Arc<dyn Delivery>,
}

/// A file that a build made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its SHA-256 digest in hexadecimal.
    pub sha256: String,
}

/// A finished build.
#[derive(Clone, Debug)]
pub struct Built {
    /// What was asked for; the image comes first, where there is one.
    pub files: Vec<BuiltFile>,
    /// What went in, if that was asked for.
    pub lock: Option<PathBuf>,
    /// The guests' consoles, the verified image's last.
    pub logs: Vec<PathBuf>,
    /// What executed the guests.
    pub accelerator: Accelerator,
    /// How long each stage took.
    pub stages: Vec<(Stage, Duration)>,
    /// When each of the builder guest's steps began, counted from its start.
    pub steps: Vec<(String, Duration)>,
    /// What was downloaded.
    pub counted: Counted,
    /// How many packages were chosen.
    pub packages: usize,
    /// How long it took as a whole.
    pub took: Duration,
}
