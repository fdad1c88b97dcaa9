//! Why a build came to no image.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::beside::BesideError;
use crate::cache::{Counted, FetchError, StoreError};
use crate::class::Class;
use crate::contents::ManifestError;
use crate::debian::SelectError;
use crate::disk::{ComposeError, RewriteError, ToolsError};
use crate::event::Stage;
use crate::installer::Rejected;
use crate::lock::{InputError, LockError};
use crate::vm::argv::{Boot, Disk};
use crate::vm::canary::{CanaryError, Verdicts};
use crate::vm::outcome::Failure;
use crate::vm::run::{Report, RunError};

use super::delivery::DeliveryError;
use super::finish::FinishError;
use super::image::ImageError;
use super::machines::Logs;
use super::medium::MediumError;
use super::preflight::{Finding, Fitness};
use super::scratch::ScratchError;
use super::workspace::WorkspaceError;

/// Why a build came to no image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The host is not fit; what is wrong with it.
    #[error("this host is not fit to build on{}", listed(.0))]
    Unfit(Vec<Finding>),
    /// No accelerator runs a guest.
    #[error("no guest runs on this host: {0}; reinstall qemu-system-x86 and seabios, or try another host")]
    NoAccelerator(Verdicts),
    /// The directory for the scratch directory could not be made.
    #[error("could not make the directory {}; choose another with {option}", path.display())]
    Workspace {
        /// The option that chooses another.
        option: &'static str,
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no scratch directory, or it cannot be removed.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// The watchdog refused the scratch directory.
    #[error("could not register the scratch directory with the watchdog")]
    Claim(#[source] io::Error),
    /// The cache is not usable.
    #[error("the download cache is not usable; choose another directory with --cache")]
    Cache(#[from] StoreError),
    /// A file of the recipe's side is not the lock's.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The lock cannot be written.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Downloads cannot start, or one failed.
    #[error("could not download what the image needs")]
    Fetch(#[from] FetchError),
    /// The packages could not be chosen.
    #[error("could not choose the image's packages")]
    Select(#[from] SelectError),
    /// The builder's own kernel and tools are not to be had.
    #[error("could not get the builder's own kernel and tools")]
    Tools(#[from] ToolsError),
    /// The disk could not be written.
    #[error("could not compose the image's disk")]
    Compose(#[from] ComposeError),
    /// No canary could be tried.
    #[error("could not find out which accelerator runs a guest")]
    Canary(#[from] CanaryError),
    /// The guest's initial file system could not be made.
    #[error("could not make what the builder guest boots from")]
    Finish(#[from] FinishError),
    /// No random number.
    #[error("the kernel gave no random number")]
    Nonce(#[source] io::Error),
    /// A file in the scratch directory could not be written.
    #[error("could not write {path}; is the disk full?")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What the image says of its packages is not the whole.
    #[error("there is no list of the image's packages")]
    Manifest(#[from] ManifestError),
    /// A worker thread could not be started, or died.
    #[error("could not run the build's own threads")]
    Thread(#[source] io::Error),
    /// A machine could not be run to a verdict.
    #[error("could not run the machine of stage {stage}")]
    Run {
        /// In which stage.
        stage: Stage,
        /// Why.
        #[source]
        source: RunError,
    },
    /// A guest failed.
    #[error(transparent)]
    Guest(Box<GuestError>),
    /// An image file could not be converted.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The disk could not be written anew.
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
    /// Something beside the recipe could not be opened.
    #[error(transparent)]
    Beside(#[from] BesideError),
    /// An installer's answers would be rejected.
    #[error("{}: the installer would reject these answers", path.display())]
    Answers {
        /// The answers.
        path: PathBuf,
        /// Why.
        #[source]
        source: Rejected,
    },
    /// An installation medium is of no use.
    #[error(transparent)]
    Medium(#[from] MediumError),
    /// A cloud image is larger than the image is to be.
    #[error("the cloud image's disk has {has} bytes, and the recipe's only {wanted}: raise image.size")]
    TooSmallForImage {
        /// Bytes that it has.
        has: u64,
        /// Bytes that the recipe wants.
        wanted: u64,
    },
    /// Files could not be moved into a guest or out of it.
    #[error(transparent)]
    Exchange(#[from] WorkspaceError),
    /// A finished file could not be delivered.
    #[error(transparent)]
    Delivery(#[from] DeliveryError),
    /// The recipe's total limit was over.
    #[error(
        "the build was not done within its total limit of {}; it was in stage {stage}: raise limits.total in the recipe, or find out what is slow",
        humantime::format_duration(*limit)
    )]
    TimedOut {
        /// In which stage.
        stage: Stage,
        /// The limit.
        limit: Duration,
    },
    /// Someone wanted to stop.
    #[error("the build was told to stop; it was in stage {stage}")]
    Cancelled {
        /// In which stage.
        stage: Stage,
    },
}

/// A guest that failed, and what is known of it.
#[derive(Debug, thiserror::Error)]
#[error("{}", told(*.stage, .failure))]
pub struct GuestError {
    /// In which stage.
    pub stage: Stage,
    /// How.
    pub failure: Failure,
    /// What was seen of it.
    pub report: Report,
    /// Its logs, in the scratch directory.
    pub(super) logs: Logs,
    /// Its disks, in the scratch directory.
    pub(super) disks: Vec<Disk>,
    /// What it was booted from.
    pub(super) boot: Boot,
}

/// A build that came to nothing.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub error: Box<BuildError>,
    /// The page that shows all that is known of it, where there is one.
    pub page: Option<PathBuf>,
    /// What was downloaded until then.
    pub counted: Box<Counted>,
}

impl From<BuildError> for Failed {
    fn from(error: BuildError) -> Self {
        Self { error: Box::new(error), page: None, counted: Box::default() }
    }
}

impl BuildError {
    /// Whether it ended because someone wanted it to.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.class() == Class::Cancelled
    }

    /// The class.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Unfit(_) | Self::NoAccelerator(_) => Class::HostUnfit,
            Self::Workspace { .. } | Self::Scratch(_) | Self::Write { .. } | Self::Delivery(_) => {
                Class::HostFiles
            }
            Self::Claim(_) => Class::WatchdogRefused,
            Self::Cache(_) | Self::Lock(_) => Class::CacheUnusable,
            Self::Fetch(_) | Self::Tools(_) => Class::DownloadFailed,
            Self::Select(SelectError::Fetch(_)) => Class::DownloadFailed,
            Self::Select(_) => Class::PackagesRefused,
            Self::Compose(_) | Self::Rewrite(_) => Class::ComposeFailed,
            Self::Canary(_) | Self::Finish(_) | Self::Nonce(_) | Self::Thread(_) | Self::Run { .. } => {
                Class::MachineFailed
            }
            Self::Guest(guest) => guest.failure.class(),
            Self::Answers { .. } => Class::AnswersRejected,
            Self::Beside(_) | Self::Input(_) | Self::Medium(_) | Self::TooSmallForImage { .. } => {
                Class::RecipeFiles
            }
            Self::Exchange(WorkspaceError::Missing { .. } | WorkspaceError::Archive(_)) => Class::NoProof,
            Self::Exchange(_) => Class::HostFiles,
            Self::Image(_) | Self::Manifest(_) => Class::ImageFailed,
            Self::TimedOut { .. } => Class::Timeout,
            Self::Cancelled { .. } => Class::Cancelled,
        }
    }
}

fn told(stage: Stage, failure: &Failure) -> String {
    match (failure, stage) {
        // Nothing failed.
        (Failure::Cancelled, _) => BuildError::Cancelled { stage }.to_string(),
        (_, Stage::Verify) => format!("the boot of the finished image failed: {failure}"),
        (_, Stage::Prepare) => format!("preparing the throwaway machine failed: {failure}"),
        _ => format!("the builder guest failed: {failure}"),
    }
}

fn listed(findings: &[Finding]) -> String {
    findings
        .iter()
        .filter(|finding| finding.fitness == Fitness::Unfit)
        .map(|finding| match &finding.advice {
            Some(advice) => format!("\n  {}: {advice}", finding.found),
            None => format!("\n  {}", finding.found),
        })
        .collect()
}
