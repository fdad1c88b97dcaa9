//! Worker processes: all that may hang happens in one of them.
//!
//! A worker is this same program, started as `hostlerd worker` with a socket as its standard
//! input. It takes a request, looks or acts, tells what it touches before it touches it, and
//! answers. When it stays silent for too long, the daemon kills it, knows from its last word what
//! hung, and starts another. A worker decides nothing and keeps nothing between requests.

mod act;
mod blocks;
mod child;
mod claims;
mod criteria;
mod examine;
mod glance;
mod message;
mod observe;
mod observe_mounts;
mod pool;
mod recheck;
mod release;

pub use child::serve;
pub use message::{ClaimQuery, Extent, LeaseQuery, Query, Request, Response};
pub use observe::{look, look_while};
pub use pool::{Examined, Pool, WorkerError};
