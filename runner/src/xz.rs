//! The decoder for xz, with a limit on its memory: a header may ask for a dictionary of 4 GiB.

use std::io::{self, Read};

use liblzma::read::XzDecoder;
use liblzma::stream::{CONCATENATED, Stream};

/// The largest preset of xz needs 65 MiB.
const MEMORY: u64 = 256 << 20;

/// Decodes one stream or several in a row, as parallel compressors write them.
///
/// # Errors
/// The library cannot start.
pub(crate) fn decoder<R: Read>(from: R) -> io::Result<XzDecoder<R>> {
    let stream = Stream::new_stream_decoder(MEMORY, CONCATENATED).map_err(io::Error::other)?;
    Ok(XzDecoder::new_stream(from, stream))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn read(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        decoder(packed)?.read_to_end(&mut plain)?;
        Ok(plain)
    }

    #[test]
    fn a_header_that_asks_for_all_memory_is_refused() {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
        encoder.write_all(b"text").expect("memory");
        let mut packed = encoder.finish().expect("memory");
        assert_eq!(read(&packed).expect("valid"), b"text");
        // The block's header: its length, flags, filter, length of properties, dictionary; a checksum at its end.
        let end = 12 + (usize::from(packed[12]) + 1) * 4;
        assert_eq!(packed[13..16], [0, 0x21, 1]);
        packed[16] = 40;
        let mut sum = flate2::Crc::new();
        sum.update(&packed[12..end - 4]);
        packed[end - 4..end].copy_from_slice(&sum.sum().to_le_bytes());
        assert!(read(&packed).is_err());
    }
}
