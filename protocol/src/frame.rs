//! Splits a byte stream into messages and writes messages as bytes.
//!
//! The decoder is fed by whoever reads the socket. It never holds more than one message's limit
//! plus one read, whatever the peer sends, and it looks at each byte once.

use serde::Serialize;

/// The largest message a peer may send to the daemon, in bytes, without its final NUL.
pub const MESSAGE_LIMIT: usize = 64 * 1024;

/// The largest reply a client takes from the daemon, in bytes. Replies list a whole host's
/// resources, and the daemon is trusted by its clients.
pub const REPLY_LIMIT: usize = 64 * 1024 * 1024;

/// Why a stream of bytes is not a stream of messages.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// A message is larger than the receiver allows.
    #[error("message is larger than {limit} bytes; split it or send less")]
    TooLarge {
        /// The receiver's limit in bytes.
        limit: usize,
    },
    /// The stream ended inside a message.
    #[error("the stream ended after {received} bytes of an unfinished message")]
    Truncated {
        /// Bytes of the unfinished message.
        received: usize,
    },
}

/// Collects bytes and hands out whole messages.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes before this index hold no NUL.
    searched: usize,
    limit: usize,
}

impl Decoder {
    /// A decoder that refuses messages of more than `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), searched: 0, limit }
    }

    /// Takes bytes as they came from the socket.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message without its NUL, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] once a message exceeds the limit; the connection is of no use then.
    pub fn next_message(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let found = self.buffer[self.searched..].iter().position(|byte| *byte == 0);
        let Some(offset) = found else {
            self.searched = self.buffer.len();
            if self.buffer.len() > self.limit {
                return Err(FrameError::TooLarge { limit: self.limit });
            }
            return Ok(None);
        };
        let end = self.searched + offset;
        if end > self.limit {
            return Err(FrameError::TooLarge { limit: self.limit });
        }
        let rest = self.buffer.split_off(end + 1);
        let mut message = std::mem::replace(&mut self.buffer, rest);
        message.truncate(end);
        self.searched = 0;
        Ok(Some(message))
    }

    /// Whether a message has begun and is not whole yet.
    #[must_use]
    pub fn is_mid_message(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// To be called when the stream ends.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] when it ended inside a message.
    pub fn finish(&self) -> Result<(), FrameError> {
        if self.buffer.is_empty() {
            Ok(())
        } else {
            Err(FrameError::Truncated { received: self.buffer.len() })
        }
    }
}

/// A message as bytes, with its final NUL.
///
/// # Errors
/// Only when `message` has a shape that JSON cannot express, such as a map with non-text keys.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = serde_json::to_vec(message)?;
    bytes.push(0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hands_out_messages_in_order_and_keeps_the_rest() {
        let mut decoder = Decoder::new(10);
        decoder.push(b"one\0two\0thr");
        assert_eq!(decoder.next_message(), Ok(Some(b"one".to_vec())));
        assert_eq!(decoder.next_message(), Ok(Some(b"two".to_vec())));
        assert_eq!(decoder.next_message(), Ok(None));
        assert_eq!(decoder.finish(), Err(FrameError::Truncated { received: 3 }));
        decoder.push(b"ee\0");
        assert_eq!(decoder.next_message(), Ok(Some(b"three".to_vec())));
        assert_eq!(decoder.finish(), Ok(()));
    }

    #[test]
    fn takes_a_message_of_exactly_the_limit_and_refuses_one_byte_more() {
        let mut decoder = Decoder::new(3);
        decoder.push(b"abc\0");
        assert_eq!(decoder.next_message(), Ok(Some(b"abc".to_vec())));
        decoder.push(b"abcd\0");
        assert_eq!(decoder.next_message(), Err(FrameError::TooLarge { limit: 3 }));
    }

    #[test]
    fn refuses_a_message_that_never_ends_before_it_is_whole() {
        let mut decoder = Decoder::new(3);
        decoder.push(b"abcd");
        assert_eq!(decoder.next_message(), Err(FrameError::TooLarge { limit: 3 }));
    }

    proptest! {
        #[test]
        fn how_the_bytes_arrive_does_not_matter(
            messages in proptest::collection::vec("[a-z]{0,20}", 0..20),
            cuts in proptest::collection::vec(1usize..7, 1..50),
        ) {
            let mut stream = Vec::new();
            for message in &messages {
                stream.extend_from_slice(message.as_bytes());
                stream.push(0);
            }
            let mut decoder = Decoder::new(20);
            let mut received = Vec::new();
            let mut rest = stream.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.push(now);
                rest = later;
                while let Some(message) = decoder.next_message().expect("within the limit") {
                    received.push(String::from_utf8(message).expect("only letters were sent"));
                }
            }
            prop_assert_eq!(received, messages);
        }
    }
}
