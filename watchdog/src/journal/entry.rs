//! What the journal's lines are, and what they tell when they are read back. Pure.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use hostler_protocol::lease::{LeaseId, Report};
use serde::{Deserialize, Serialize};

use crate::model::{BootId, Lease, Plan, StepResult};

/// The version of the format.
const VERSION: &str = "1";

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "entry")]
pub enum Entry {
    /// The daemon started.
    Started {
        /// On this boot of the host.
        boot: BootId,
        /// The next lease's number.
        next_lease: u64,
    },
    /// A lease is about to be opened: its number is given, and its control group may come to be.
    Opening {
        /// Which.
        lease: LeaseId,
        /// Where the control group would be.
        cgroup: PathBuf,
    },
    /// A lease, as it is from now on.
    Lease {
        /// The lease.
        lease: Box<Lease>,
    },
    /// What is going to be done.
    Planned {
        /// For which lease.
        lease: LeaseId,
        /// In which round.
        round: u32,
        /// What.
        plan: Plan,
    },
    /// How one step went, as the calls said.
    Stepped {
        /// For which lease.
        lease: LeaseId,
        /// In which round.
        round: u32,
        /// Which step of the plan, from 0.
        step: usize,
        /// How it went.
        result: StepResult,
    },
    /// What the second look said.
    Looked {
        /// For which lease.
        lease: LeaseId,
        /// What became of each resource.
        report: Report,
    },
    /// Nothing of a lease is left.
    Ended {
        /// Which.
        lease: LeaseId,
    },
}

/// What a journal tells at the daemon's start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The first number that was never given to a lease.
    pub next_lease: u64,
    /// The leases that had not ended.
    pub leases: BTreeMap<LeaseId, Lease>,
    /// Control groups of leases that were about to be opened, and never were.
    pub unopened: BTreeMap<LeaseId, PathBuf>,
    /// Lines that were torn or altered.
    pub damaged: Vec<usize>,
}

/// What the lines of a journal tell. Pure.
#[must_use]
pub fn recover(bytes: &[u8]) -> Recovered {
    let mut recovered = Recovered { next_lease: 1, ..Recovered::default() };
    let lines =
        bytes.trim_ascii_end().split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    for (index, line) in lines {
        match parse_line(line) {
            Some(Entry::Started { next_lease, .. }) => {
                recovered.next_lease = recovered.next_lease.max(next_lease);
            }
            Some(Entry::Opening { lease, cgroup }) => {
                recovered.next_lease = recovered.next_lease.max(lease.0 + 1);
                recovered.unopened.insert(lease, cgroup);
            }
            Some(Entry::Lease { lease }) => {
                recovered.next_lease = recovered.next_lease.max(lease.id.0 + 1);
                recovered.unopened.remove(&lease.id);
                recovered.leases.insert(lease.id, *lease);
            }
            Some(Entry::Ended { lease }) => {
                recovered.unopened.remove(&lease);
                recovered.leases.remove(&lease);
            }
            Some(Entry::Planned { .. } | Entry::Stepped { .. } | Entry::Looked { .. }) => {}
            None => recovered.damaged.push(index + 1),
        }
    }
    recovered
}

fn parse_line(line: &[u8]) -> Option<Entry> {
    let line = std::str::from_utf8(line).ok()?;
    let (version, rest) = line.split_once(' ')?;
    let (checksum, json) = rest.split_once(' ')?;
    let checksum = u32::from_str_radix(checksum, 16).ok()?;
    (version == VERSION && checksum == crc32fast::hash(json.as_bytes()))
        .then(|| serde_json::from_str(json).ok())
        .flatten()
}

pub(super) fn write_line(entry: &Entry, into: &mut Vec<u8>) -> io::Result<()> {
    let json = serde_json::to_string(entry)?;
    writeln!(into, "{VERSION} {:08x} {json}", crc32fast::hash(json.as_bytes()))
}
