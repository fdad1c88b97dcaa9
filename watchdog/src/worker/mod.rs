//! Worker processes: all that may hang happens in one of them.
//!
//! A worker takes one request, looks or acts, tells what it touches before it touches it, answers, and ends.
//! When it stays silent for too long, the daemon kills it, knows from its last word what hung, and has
//! another try without that. A worker decides nothing.
//!
//! Starting a program takes longer than most of what a worker does. So there is an origin: this same program,
//! started once as `hostlerd worker`, that does nothing but copy itself (`fork`) when the daemon asks for a
//! worker. It touches nothing, so nothing hangs it; it dies with the daemon, and its copies with it.

mod act;
mod blocks;
mod child;
mod claims;
mod connection;
mod criteria;
mod examine;
mod fit;
mod glance;
mod hold;
mod hung;
mod message;
mod observe;
mod observe_mounts;
mod pool;
mod recheck;
mod release;

pub use child::serve;
pub use message::{ClaimQuery, Extent, LeaseQuery, NumberQuery, Query, Request, Response, Task};
pub use observe::{look, look_while};
pub use pool::{Examined, Pool, WorkerError};
