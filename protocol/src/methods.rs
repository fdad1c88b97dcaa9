//! Arguments and results of each method, and the errors.
//!
//! A field that names a file descriptor is its index among those sent beside the message.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::lease::{Epoch, LeaseId, LeaseView, Report, Tracking};
use crate::resource::ResourceView;
use crate::why::Held;

/// A method of the daemon's interface: its name, arguments and results belong together.
pub trait Method: Serialize + for<'de> Deserialize<'de> {
    /// The method's name without its interface.
    const NAME: &'static str;
    /// What it answers.
    type Output: Serialize + for<'de> Deserialize<'de>;
}

macro_rules! methods {
    ($($(#[$outer:meta])* $arguments:ident => $output:ty;)*) => {
        $(impl Method for $arguments {
            const NAME: &'static str = stringify!($arguments);
            type Output = $output;
        })*

        /// Every method's name, in the order of the description.
        pub const NAMES: &[&str] = &[$(stringify!($arguments)),*];
    };
}

methods! {
    OpenLease => LeaseOpened;
    Adopt => Nothing;
    ClaimDirectory => Nothing;
    RegisterLoop => Nothing;
    ReportBuild => Nothing;
    CloseLease => LeaseClosed;
    Status => HostStatus;
    Why => Explanation;
    Plan => Planned;
    Reclaim => Reclaimed;
}

/// No results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nothing {}

/// Opens a lease for the process that connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenLease {
    /// What to call it in lists: at most 200 bytes.
    pub name: String,
    /// The owner's pidfd, for a client that opens a lease for another process of its user; absent
    /// means the process that connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<u32>,
    /// Seconds after which the lease ends even if the owner lives; absent means never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_seconds: Option<u64>,
}

/// A lease was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseOpened {
    /// Its number.
    pub lease: LeaseId,
    /// To be named in every request that changes it.
    pub epoch: Epoch,
    /// How its processes are known.
    pub tracking: Tracking,
}

/// Puts a process, with all that it will start, under a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adopt {
    /// The lease.
    pub lease: LeaseId,
    /// Its epoch.
    pub epoch: Epoch,
    /// A pidfd of the process.
    pub process: u32,
}

/// Claims a directory: loop devices and mounts that come to lie below it belong to the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimDirectory {
    /// The lease.
    pub lease: LeaseId,
    /// Its epoch.
    pub epoch: Epoch,
    /// A descriptor of the directory, opened for reading (`O_RDONLY`, not `O_PATH`).
    pub directory: u32,
    /// Remove it with all it holds when the lease ends.
    pub scratch: bool,
}

/// Puts a loop device under a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterLoop {
    /// The lease.
    pub lease: LeaseId,
    /// Its epoch.
    pub epoch: Epoch,
    /// A descriptor of the device.
    pub device: u32,
}

/// How a build ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BuildResult {
    /// The guest proved success and every check passed.
    Succeeded,
    /// It failed.
    Failed,
    /// Somebody stopped it.
    Cancelled,
}

impl BuildResult {
    /// Every result.
    pub const ALL: [Self; 3] = [Self::Succeeded, Self::Failed, Self::Cancelled];

    /// The word for it in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Tells how a build under a lease ended, for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportBuild {
    /// The lease.
    pub lease: LeaseId,
    /// Its epoch.
    pub epoch: Epoch,
    /// How it ended.
    pub result: BuildResult,
    /// How long it took.
    pub seconds: f64,
    /// Bytes that came from upstream.
    pub upstream_bytes: u64,
    /// Bytes that came out of the cache.
    pub cached_bytes: u64,
    /// Files that came from upstream: misses of the cache.
    #[serde(default)]
    pub upstream_files: u64,
    /// Files that came out of the cache: its hits.
    #[serde(default)]
    pub cached_files: u64,
    /// What upstreams did wrong: lies, breaks, refusals.
    #[serde(default)]
    pub upstream_failures: u64,
}

/// Ends a lease, and waits until what it left has been taken back or cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloseLease {
    /// The lease.
    pub lease: LeaseId,
    /// Its epoch.
    pub epoch: Epoch,
}

/// A lease was closed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeaseClosed {
    /// What became of what it left.
    pub report: Report,
}

/// Asks for leases and resources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {}

/// Leases and resources of the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The daemon's version.
    pub version: String,
    /// Loop devices in use.
    pub loops_in_use: u64,
    /// How many loop devices the host can have; absent when the kernel sets no limit.
    pub loops_limit: Option<u64>,
    /// Leases that are not ended, and the last ones that are.
    pub leases: Vec<LeaseView>,
    /// Loop devices, and mounts of loop devices, that no lease has.
    pub others: Vec<ResourceView>,
    /// qemu processes that belong to no lease. They are listed and never acted on.
    #[serde(default)]
    pub stray_qemu: Vec<StrayQemu>,
    /// What could not be read.
    pub gaps: Vec<String>,
}

/// A qemu process that belongs to no lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StrayQemu {
    /// Its number.
    pub pid: u32,
    /// Whose it is.
    pub uid: u32,
    /// Its program's name, fit to be printed.
    pub program: String,
    /// Who started it, fit to be printed: the parent while that is known, else the control group.
    pub started_by: String,
    /// Files of at least 1 MiB and block devices that it has open, fit to be printed.
    pub disks: Vec<String>,
    /// Seconds since it started.
    pub age_seconds: f64,
}

/// Asks why something is still there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Why {
    /// A loop device (`/dev/loop3`, `loop3`), a mount point as `findmnt` shows it, or a process
    /// number.
    pub target: String,
}

/// Why something is still there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The thing, and what holds it.
    pub tree: Held,
    /// What could not be read while looking; holders may be missing because of it.
    pub gaps: Vec<String>,
}

/// Asks what the daemon would do: now for every lease that is over, at the end of its grace for one
/// that is closing, and at the next sweep for what a rule takes for leaked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {}

/// What the daemon would do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// The steps for leases, in order.
    pub steps: Vec<PlannedStep>,
    /// The steps for what rules take for leaked, in order.
    #[serde(default)]
    pub by_policy: Vec<PolicyStep>,
}

/// One step of a lease's plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// For which lease.
    pub lease: LeaseId,
    /// What would be done, for a person.
    pub does: String,
    /// Seconds until it is done: what is left of the lease's grace.
    #[serde(default)]
    pub in_seconds: f64,
    /// The step as the journal writes it once it is decided on.
    #[serde(default)]
    pub step: Value,
}

/// One step for what a rule takes for leaked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyStep {
    /// The rule's name.
    pub policy: String,
    /// What would be done, for a person.
    pub does: String,
    /// Seconds until the sweep that does it.
    pub in_seconds: f64,
    /// The step as the journal writes it once it is decided on.
    pub step: Value,
}

/// Takes something back as an administrator (root), and waits as [`CloseLease`] does: a lease, or what no
/// lease has. Exactly one of the two is named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reclaim {
    /// The lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseId>,
    /// A device or a mount point, as for [`Why`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// A lease was taken back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reclaimed {
    /// What became of what it left.
    pub report: Report,
}

/// What the daemon answers instead of results.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CallError {
    /// The caller may not do that.
    #[error("refused: {reason}")]
    Refused {
        /// Why, and what to do instead.
        reason: String,
    },
    /// There is no such lease, or it is another user's.
    #[error("there is no lease {lease} of yours; `hostler status` lists them")]
    NoSuchLease {
        /// The lease.
        lease: LeaseId,
    },
    /// The epoch is not the lease's.
    #[error("lease {lease} has been taken over since: its epoch is not {epoch:?} any more")]
    StaleEpoch {
        /// The lease.
        lease: LeaseId,
        /// The epoch that was named.
        epoch: Epoch,
    },
    /// Nothing has that name.
    #[error("nothing here is called {target}; name a loop device, a mount point or a process number")]
    NoSuchTarget {
        /// What was asked for.
        target: String,
    },
    /// A limit of the caller's user is reached.
    #[error("{limit}: the limit of {value} is reached; close a lease first, or raise it in [limits]")]
    LimitReached {
        /// Which limit, by its name in the configuration.
        limit: String,
        /// Its value.
        value: u64,
    },
    /// The daemon cannot do it now.
    #[error("the watchdog cannot do that now: {reason}")]
    Unavailable {
        /// Why, and what to do.
        reason: String,
    },
}

impl CallError {
    /// The error's name without its interface, and its details.
    #[must_use]
    pub fn on_the_wire(&self) -> (String, Value) {
        // Serde writes an enum's variant as the only key of an object: just the two parts needed.
        let written = serde_json::to_value(self).ok();
        let parts = written.and_then(|value| match value {
            Value::Object(object) => object.into_iter().next(),
            _ => None,
        });
        parts.unwrap_or_else(|| ("Unavailable".to_owned(), Value::Null))
    }

    /// The error of that name with these details; `None` when it is none of ours.
    #[must_use]
    pub fn from_the_wire(name: &str, details: Value) -> Option<Self> {
        let mut object = serde_json::Map::new();
        object.insert(name.to_owned(), details);
        serde_json::from_value(Value::Object(object)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_come_back_as_they_were_sent() {
        let errors = [
            CallError::Refused { reason: "no".to_owned() },
            CallError::NoSuchLease { lease: LeaseId(7) },
            CallError::StaleEpoch { lease: LeaseId(7), epoch: Epoch(3) },
            CallError::LimitReached { limit: "leases".to_owned(), value: 9 },
        ];
        for error in errors {
            let (name, details) = error.on_the_wire();
            assert_eq!(CallError::from_the_wire(&name, details), Some(error));
        }
        assert_eq!(CallError::from_the_wire("Other", Value::Null), None);
    }

    #[test]
    fn the_description_names_every_method_and_no_other() {
        let described: Vec<&str> = crate::INTERFACE_DESCRIPTION
            .lines()
            .filter_map(|line| line.strip_prefix("method "))
            .filter_map(|line| line.split('(').next())
            .collect();
        assert_eq!(described, NAMES);
    }

    #[test]
    fn an_unknown_argument_is_an_error() {
        let error = serde_json::from_str::<Status>(r#"{"all":true}"#).expect_err("unknown field");
        assert!(error.to_string().contains("unknown field `all`"), "{error}");
    }
}
