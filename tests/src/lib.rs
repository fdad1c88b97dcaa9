//! What the cross-program tests are made with.
//!
//! A test runs the real programs against the real kernel: [`scenario`] gives it a mount namespace of
//! its own, a deadline and a [`place::Place`] that removes whatever is left; [`daemon`] starts
//! `hostlerd`; [`bystander`] makes what must survive; [`builds`] builds images; [`probe`] looks at
//! the host.
//!
//! Deliberately absent: any code of the programs under test, but for what [`bench`] measures by itself.
//! What the daemon says is checked by readers of `/proc` and `/sys` that were written here, and by `loopdev-3`. Only the protocol's
//! types are shared, because they are the contract. (The tests of the watchdog's kernel modules call
//! those, and check them with what is here.)
//!
//! A test fails by panicking, so the helpers panic too, each with what it was about.

pub mod attached;
#[cfg(feature = "privileged")]
pub mod bench;
pub mod blocks;
pub mod builds;
pub mod bystander;
pub mod daemon;
pub mod failure;
pub mod fuse;
pub mod leak;
pub mod namespace;
#[cfg(feature = "privileged")]
pub mod oracle;
pub mod patience;
pub mod place;
pub mod probe;
pub mod processes;
pub mod program;
pub mod random;
pub mod scenario;
pub mod sleeper;
pub mod stack;
pub mod terminal;
pub mod wire;
