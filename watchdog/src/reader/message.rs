//! What a reader and the daemon say to each other: JSON, ended by NUL, as on the public socket.
//!
//! The daemon takes nothing in here for more than its user's wish: it knows itself whose reader it is, and
//! looks itself at what a descriptor is of.

use hostler_protocol::message::Reply;
use hostler_protocol::methods::{
    Adopt, CallError, ClaimDirectory, CloseLease, OpenLease, Plan, Reclaim, RegisterLoop, ReportBuild,
    Status, Why,
};
use serde::{Deserialize, Serialize};

/// One of a user's connections, as the daemon numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConnectionId(pub u64);

/// A call, read. Where the public message has a descriptor's index, this has the descriptor's number in
/// the reader's own table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Asked {
    /// See the protocol.
    OpenLease(OpenLease),
    /// See the protocol.
    Adopt(Adopt),
    /// See the protocol.
    ClaimDirectory(ClaimDirectory),
    /// See the protocol.
    RegisterLoop(RegisterLoop),
    /// See the protocol.
    ReportBuild(ReportBuild),
    /// See the protocol.
    CloseLease(CloseLease),
    /// See the protocol.
    Status(Status),
    /// See the protocol.
    Why(Why),
    /// See the protocol.
    Plan(Plan),
    /// See the protocol.
    Reclaim(Reclaim),
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToReader {
    /// Serve the connection whose descriptor comes beside this.
    Serve {
        /// What to call it.
        connection: ConnectionId,
        /// Only say this, and hang up.
        refuse: Option<CallError>,
    },
    /// The answer to the call that this connection waits for.
    Answer {
        /// Which.
        connection: ConnectionId,
        /// The answer.
        reply: Reply,
    },
}

/// What a reader says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromReader {
    /// It has read the last message of the daemon's that was not told of yet.
    Taken,
    /// A client asks for something, and its connection waits for the answer.
    Asked {
        /// Which.
        connection: ConnectionId,
        /// For what.
        call: Box<Asked>,
    },
    /// A connection has ended.
    Closed {
        /// Which.
        connection: ConnectionId,
        /// Why it was dropped; absent when the client ended it, or was idle.
        dropped: Option<String>,
    },
    /// Closing what clients passed hangs: this reader can do no more for them.
    Stuck,
}
