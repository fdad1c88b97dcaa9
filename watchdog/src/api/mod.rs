//! The socket that clients use: Varlink, served by a loop of our own.
//!
//! One task per connection. A message is at most 64 KiB, must be whole within seconds of its first
//! byte, and is answered before the next is read. A client that sends what is no message, or does
//! not read its answers, is dropped and harms nobody else. Who calls is taken from the socket.

mod connection;
mod dispatch;

pub use connection::serve;
