//! The download cache: content under its digest, fetched once, served to guests only when checked.
//!
//! `store` keeps files, `fetch` brings them from upstream, `serve` is the mirror that a guest sees.
//! What a digest ought to be always comes from the caller, who has it from signed metadata.

mod digest;
mod fetch;
mod proxy;

mod store;

pub use digest::{Digest, Hasher, NotADigest};
pub use fetch::{Counted, FetchError, FetchOptions, Fetcher, Metadata, Wanted};
pub use proxy::Proxies;
pub use store::{Cache, Remembered, StoreError, Writer, default_directory};
