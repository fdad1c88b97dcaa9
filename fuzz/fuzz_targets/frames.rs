//! Bytes of a socket, in pieces of any size: the same messages as when they come at once, none above the
//! limit, and never much more than one held.
#![no_main]

use hostler_protocol::frame::{Decoder, FrameError};
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 64;

fn decode(bytes: &[u8], piece: usize) -> (Vec<Vec<u8>>, Option<FrameError>) {
    let mut decoder = Decoder::new(LIMIT);
    let mut messages = Vec::new();
    for piece in bytes.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    let end = decoder.finish().err();
    (messages, end)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let (messages, end) = decode(bytes, usize::from(*first).max(1));
    let mut parts: Vec<&[u8]> = bytes.split(|byte| *byte == 0).collect();
    let rest = parts.pop().unwrap_or_default();
    let whole: Vec<&[u8]> = parts.into_iter().take_while(|part| part.len() <= LIMIT).collect();
    assert_eq!(messages, whole);
    let is_too_large = bytes.split(|byte| *byte == 0).any(|part| part.len() > LIMIT);
    match end {
        Some(FrameError::TooLarge { .. }) => assert!(is_too_large),
        Some(FrameError::Truncated { received }) => assert_eq!((received, is_too_large), (rest.len(), false)),
        None => assert!(rest.is_empty() && !is_too_large),
    }
});
