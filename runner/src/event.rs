//! What a build tells while it runs.
//!
//! One closed stream of events: the library says what happens, a [`Sink`] at the edge decides how a
//! person or a log sees it. Nothing in here prints.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::class::Class;

/// A part of a build that a person waits for, in the order in which they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Is the host fit: qemu, space, memory, user namespaces.
    Preflight,
    /// Signed metadata and package choice.
    Select,
    /// Packages into the cache.
    Fetch,
    /// Which accelerator really runs a guest.
    Canary,
    /// File tree and file system image, written on the host.
    Compose,
    /// A throwaway machine is made ready, once for all builds that use it.
    Prepare,
    /// The builder guest at work.
    Guest,
    /// A disk is written anew, so that it depends on nothing but its files.
    Rewrite,
    /// What a throwaway machine left is taken out of its disk.
    Collect,
    /// A guest looks into an image that was made elsewhere.
    Inspect,
    /// Conversion to the format that was asked for.
    Convert,
    /// The finished image boots.
    Verify,
}

impl Stage {
    /// All of them, in their order.
    pub const ALL: [Self; 12] = [
        Self::Preflight,
        Self::Select,
        Self::Fetch,
        Self::Canary,
        Self::Compose,
        Self::Prepare,
        Self::Guest,
        Self::Rewrite,
        Self::Collect,
        Self::Inspect,
        Self::Convert,
        Self::Verify,
    ];

    /// The word a log shows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Select => "select",
            Self::Fetch => "fetch",
            Self::Canary => "canary",
            Self::Compose => "compose",
            Self::Prepare => "prepare",
            Self::Guest => "guest",
            Self::Rewrite => "rewrite",
            Self::Collect => "collect",
            Self::Inspect => "inspect",
            Self::Convert => "convert",
            Self::Verify => "verify",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Something worth telling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A stage begins.
    Started(Stage),
    /// A stage ended well.
    Finished(Stage),
    /// A stage did not end well; why comes with [`Event::Failed`].
    GaveUp(Stage),
    /// How far a stage is: what it does right now, and its bytes where it counts any.
    Progress {
        /// The stage.
        stage: Stage,
        /// What it does right now, in a few words; may hold text of the guest, so a sink cleans it.
        doing: String,
        /// Bytes done so far.
        bytes: u64,
        /// Bytes there are to do, where known.
        total: Option<u64>,
    },
    /// A fact that a reader of the log wants later.
    Note(String),
    /// Something is worse than it should be, and the build goes on.
    Warning(String),
    /// The last event of a build that came to what was asked for.
    Built {
        /// What it made; an image comes first.
        files: Vec<PathBuf>,
    },
    /// The last event of a build that did not.
    Failed {
        /// The class.
        class: Class,
        /// What went wrong, with its causes, in one line; may hold text of the guest.
        message: String,
        /// The page that shows all that is known, where there is one.
        page: Option<PathBuf>,
    },
}

/// Takes events. Called from several threads; must not block.
pub trait Sink: Send + Sync {
    /// Takes one event.
    fn event(&self, event: Event);
}

/// Drops every event.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Sink for Silent {
    fn event(&self, _: Event) {}
}
