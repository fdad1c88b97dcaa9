//! The download cache: content under its digest, fetched once, served to guests only when checked.
//!
//! `store` keeps files, `fetch` brings them from upstream, `serve` is the mirror that a guest sees.
//! What a digest ought to be always comes from the caller, who has it from signed metadata.

mod allowance;
mod answer;
mod archive;
mod audit;
mod brought;
mod connection;
mod digest;
mod download;
mod evict;
mod exclusion;
mod failures;
mod fetch;
mod fetch_error;
mod flight;
mod local;
mod metadata;
pub mod offer;
mod partial;
mod proxy;
mod remembered;
mod remote;
mod rounds;
mod serve;
mod settings;
mod store;
mod transfer;
mod unvouched;
mod upstream;
mod uses;
mod writer;

pub use archive::{ArchiveError, Carried};
pub use audit::{Audit, AuditError};
pub use digest::{Digest, Hasher, NotADigest};
pub use evict::{Content, Shrunk, choose};
pub use fetch::{Counted, FetchOptions, Fetcher, Supply, Wanted};
pub use fetch_error::FetchError;
pub use metadata::Metadata;
pub use partial::Parts;
pub use proxy::Proxies;
pub use remembered::Remembered;
pub use remote::{Exchanged, Remote, RemoteError};
pub use serve::{Clients, Failure, Mirror, MirrorError, MirrorReport, Refusal};
pub use settings::{default_directory, limit};
pub use store::{Cache, StoreError};
pub use upstream::{LeastPace, last_part, mirrors, without_user};
pub use writer::{Scratch, Writer};
