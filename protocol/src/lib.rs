//! The trust boundary that both programs share: what may be said over `hostlerd`'s socket.
//!
//! Messages are [Varlink](https://varlink.org): one JSON object, ended by a NUL byte, file
//! descriptors passed beside the message that names them by index. The interface description is
//! [`INTERFACE_DESCRIPTION`], so any Varlink client in any language can talk to the daemon.
//!
//! Deliberately absent: sockets, files, clocks, and anything that knows the kernel. A message says
//! nothing about who sent it; the receiver learns that from the socket.

pub mod frame;
pub mod lease;
pub mod message;
pub mod methods;
pub mod resource;
pub mod text;
pub mod why;

/// Name of the daemon's interface.
pub const INTERFACE: &str = "org.hostler.Watchdog";

/// The interface in Varlink's own description language, as `GetInterfaceDescription` returns it.
pub const INTERFACE_DESCRIPTION: &str = include_str!("org.hostler.Watchdog.varlink");

/// Where the daemon listens when nobody says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/hostler/hostler.sock";
