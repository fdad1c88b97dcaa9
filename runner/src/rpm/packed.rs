//! Indices as they come: packed.

use std::io::{self, Read as _};

/// The largest index, unpacked, in bytes.
const LIMIT: u64 = 4 << 30;

/// The text of an index, packed in whichever way its name says.
///
/// # Errors
/// It is damaged, no text, or too large.
pub fn unpack(name: &str, packed: &[u8]) -> io::Result<String> {
    let mut text = Vec::new();
    let read = match name.rsplit_once('.').map(|(_, suffix)| suffix) {
        Some("gz") => flate2::read::MultiGzDecoder::new(packed).take(LIMIT).read_to_end(&mut text),
        Some("xz") => liblzma::read::XzDecoder::new_multi_decoder(packed).take(LIMIT).read_to_end(&mut text),
        Some("zst") => match ruzstd::decoding::StreamingDecoder::new(packed) {
            Ok(decoder) => decoder.take(LIMIT).read_to_end(&mut text),
            Err(error) => Err(io::Error::other(error.to_string())),
        },
        _ => packed.take(LIMIT).read_to_end(&mut text),
    };
    if read? as u64 >= LIMIT {
        return Err(io::Error::other("it is too large to be an index"));
    }
    String::from_utf8(text).map_err(io::Error::other)
}
