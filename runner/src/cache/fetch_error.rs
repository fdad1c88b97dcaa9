//! What can go wrong with a download: each way has its own name.

use std::time::Duration;

use crate::beside::BesideError;
use crate::stop::Stopped;

use super::digest::Digest;
use super::store::StoreError;
use super::upstream::LeastPace;

/// Metadata has no digest to compare a size with; Debian's is 0.15 MB.
pub(super) const METADATA_LIMIT: usize = 32 << 20;

/// What is read into memory as a whole. The largest index that an archive has is a fifth of that.
pub(super) const INDEX_LIMIT: u64 = 512 << 20;

/// Why a file cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The HTTP client cannot be set up.
    #[error("cannot set up downloads: check the proxy settings")]
    Client {
        /// What the library said.
        #[source]
        source: reqwest::Error,
    },
    /// The runtime cannot be started.
    #[error("cannot start the threads for downloads")]
    Runtime {
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No address is known.
    #[error("no upstream is known for {name}: name one in the sources")]
    NoUpstream {
        /// The file.
        name: String,
    },
    /// Upstream refuses.
    #[error(
        "upstream answered {status} for {name}: it does not have the file (is the mirror complete and up to date?)"
    )]
    Status {
        /// The file.
        name: String,
        /// The status code.
        status: u16,
    },
    /// Upstream cannot be reached.
    #[error("cannot reach upstream for {name}: check the network, the proxy and the mirror")]
    Connect {
        /// The file.
        name: String,
        /// What the library said.
        #[source]
        source: reqwest::Error,
    },
    /// Upstream's certificate is not accepted.
    #[error(
        "the certificate of the upstream of {name} is not accepted: if a CA of your own signed it, install that with update-ca-certificates or name its file in SSL_CERT_FILE; if not, somebody is in between"
    )]
    Untrusted {
        /// The file.
        name: String,
        /// What is wrong with it.
        #[source]
        source: rustls::Error,
    },
    /// Upstream says nothing any more.
    #[error("upstream sent nothing of {name} for {} s: it is too slow or hangs", idle.as_secs())]
    Silent {
        /// The file.
        name: String,
        /// How long was waited.
        idle: Duration,
    },
    /// Upstream sends too little.
    #[error(
        "upstream sends {name} at less than {} in {} s: it is too slow",
        bytesize::ByteSize(least.bytes),
        least.within.as_secs_f32()
    )]
    Slow {
        /// The file.
        name: String,
        /// What it should send at least.
        least: LeastPace,
    },
    /// Upstream has a file of another size.
    #[error(
        "upstream offers {offered} bytes for {name}, which has {expected}: it has another file under this name"
    )]
    OtherSize {
        /// The file.
        name: String,
        /// Bytes that upstream offers.
        offered: u64,
        /// Bytes that signed metadata promises.
        expected: u64,
    },
    /// Several upstreams failed, each in its way.
    #[error("no upstream gives {name} ({}; {upstream} as follows)", others.join("; "))]
    Everywhere {
        /// The file.
        name: String,
        /// The other upstreams, and how they failed.
        others: Vec<String>,
        /// The one whose failure tells most.
        upstream: String,
        /// Whether any of them may have it a moment later.
        may_do_better: bool,
        /// How it failed.
        #[source]
        source: Box<FetchError>,
    },
    /// The file ends too early.
    #[error("upstream truncated {name}: {received} of {expected} bytes came")]
    Truncated {
        /// The file.
        name: String,
        /// Bytes that came.
        received: u64,
        /// Bytes that signed metadata promises.
        expected: u64,
    },
    /// The file is longer than it should be.
    #[error("upstream sent more than the {expected} bytes that {name} has: the file was replaced")]
    TooLong {
        /// The file.
        name: String,
        /// Bytes that signed metadata promises.
        expected: u64,
    },
    /// The file has another digest.
    #[error("upstream sent an altered {name}: its digest is {found} where signed metadata says {wanted}")]
    Altered {
        /// The file.
        name: String,
        /// What signed metadata says.
        wanted: Digest,
        /// What came.
        found: Digest,
    },
    /// Metadata too large to be any.
    #[error("upstream sent more than {METADATA_LIMIT} bytes for {name}: that is no such file")]
    Oversized {
        /// The file.
        name: String,
    },
    /// It is to be read into memory and is too large for that.
    #[error("{name} has {}, and an index may have {} at most: the archive is damaged, tell its maintainers", bytesize::ByteSize(*size), bytesize::ByteSize(INDEX_LIMIT))]
    Bulky {
        /// The file.
        name: String,
        /// Its bytes.
        size: u64,
    },
    /// The cache fails.
    #[error("cannot keep {name}")]
    Store {
        /// The file.
        name: String,
        /// What is wrong.
        #[source]
        source: StoreError,
    },
    /// The lock does not have it.
    #[error("the lock does not have {name} ({digest}): build without --locked to make a new lock")]
    NotLocked {
        /// The file.
        name: String,
        /// Its digest.
        digest: Digest,
    },
    /// The lock has nothing of this name that nobody vouches for.
    #[error("the lock does not have {name}: build without --locked to make a new lock")]
    NameNotLocked {
        /// The file.
        name: String,
    },
    /// It is no address.
    #[error("{address:?} is no address that {name} could be had from")]
    Address {
        /// The file.
        name: String,
        /// What was written.
        address: String,
    },
    /// It would have to be downloaded, and must not be.
    #[error(
        "{name} is not in the cache, and --offline asks no upstream: build once without it, or bring it with `hostler cache import`"
    )]
    Offline {
        /// The file.
        name: String,
    },
    /// A guest has had all that may be brought for it.
    #[error(
        "the guest asked for {name} beyond the {} that may be downloaded for it: raise [image] size if the build needs so much",
        bytesize::ByteSize(*limit)
    )]
    Spent {
        /// The file.
        name: String,
        /// Bytes that may be downloaded for it in all.
        limit: u64,
    },
    /// Nobody waits for it any more.
    #[error("the download of {name} was given up")]
    Stopped {
        /// The file, or what was being fetched.
        name: String,
        /// Why.
        #[source]
        source: Stopped,
    },
    /// A download was broken off from inside.
    #[error("the download of {name} was broken off")]
    BrokenOff {
        /// The file.
        name: String,
    },
    /// A file of this host cannot be read.
    #[error("cannot have {name}")]
    Local {
        /// The file.
        name: String,
        /// Why.
        #[source]
        source: BesideError,
    },
    /// A file of this host is not what its index vouches for.
    #[error(
        "{name} is not the file that its index vouches for: is its folder damaged, or just being changed?"
    )]
    Changed {
        /// The file.
        name: String,
    },
}

impl FetchError {
    /// The status that upstream refused with, if it did.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            Self::Everywhere { source, .. } => source.status(),
            _ => None,
        }
    }

    /// The answer by which every upstream that was asked refuses the file for good: it is not there.
    #[must_use]
    pub fn refusal(&self) -> Option<u16> {
        self.status().filter(|status| *status < 500 && !self.is_transient())
    }

    /// Is it for the upstreams that it failed, and not for this host, or for who asked?
    #[must_use]
    pub fn is_of_upstreams(&self) -> bool {
        self.is_transient()
            || matches!(
                self,
                Self::Status { .. }
                    | Self::Everywhere { .. }
                    | Self::NoUpstream { .. }
                    | Self::Untrusted { .. }
                    | Self::TooLong { .. }
                    | Self::OtherSize { .. }
                    | Self::Altered { .. }
                    | Self::Oversized { .. }
            )
    }

    /// May the same request go well a moment later?
    pub(super) fn is_transient(&self) -> bool {
        match self {
            // 206 and 416 answer a wish to continue that failed; the next try is for the whole.
            Self::Status { status, .. } => *status >= 500 || matches!(status, 206 | 408 | 416 | 425 | 429),
            Self::Connect { .. } | Self::Silent { .. } | Self::Slow { .. } | Self::Truncated { .. } => true,
            Self::Everywhere { may_do_better, .. } => *may_do_better,
            Self::Client { .. }
            | Self::Runtime { .. }
            | Self::NoUpstream { .. }
            | Self::Untrusted { .. }
            | Self::TooLong { .. }
            | Self::OtherSize { .. }
            | Self::Altered { .. }
            | Self::Oversized { .. }
            | Self::Bulky { .. }
            | Self::NotLocked { .. }
            | Self::NameNotLocked { .. }
            | Self::Address { .. }
            | Self::Offline { .. }
            | Self::Spent { .. }
            | Self::Store { .. }
            | Self::Stopped { .. }
            | Self::BrokenOff { .. }
            | Self::Local { .. }
            | Self::Changed { .. } => false,
        }
    }
}
