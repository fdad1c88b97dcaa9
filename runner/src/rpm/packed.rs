//! Indices as they come: packed. They are read piece by piece, so what a small file unpacks to takes no memory.

use std::io::{self, BufRead, BufReader, Read};

/// The largest index, unpacked, in bytes: larger than the list of all files of any distribution.
const LIMIT: u64 = 4 << 30;

/// The text of an index, packed in whichever way its name says. `size` is what it has to have, where that is told.
///
/// # Errors
/// It is damaged. What is found later is an error of the reader: damage, or another size.
pub fn unpack<'a>(
    name: &str,
    packed: impl Read + 'a,
    size: Option<u64>,
) -> io::Result<Box<dyn BufRead + 'a>> {
    let plain: Box<dyn Read + 'a> = match name.rsplit_once('.').map(|(_, suffix)| suffix) {
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(packed))),
        Some("xz") => Box::new(crate::xz::decoder(packed)?),
        Some("zst") => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(BufReader::new(packed));
            Box::new(decoder.map_err(|error| io::Error::other(error.to_string()))?)
        }
        _ => Box::new(packed),
    };
    let limit = size.map_or(LIMIT, |size| size.min(LIMIT));
    let measured = Measured { plain, limit, came: 0, is_exact: size.is_some() };
    Ok(Box::new(BufReader::with_capacity(1 << 17, measured)))
}

/// Text that must not have more bytes than so many, or exactly so many.
struct Measured<R> {
    plain: R,
    limit: u64,
    came: u64,
    is_exact: bool,
}

impl<R: Read> Read for Measured<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.plain.read(buffer)?;
        self.came += count as u64;
        if self.came > self.limit {
            return Err(io::Error::other("it is larger unpacked than it may be"));
        }
        if count == 0 && !buffer.is_empty() && self.is_exact && self.came < self.limit {
            return Err(io::Error::other("it is shorter unpacked than its own index says"));
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_has_the_size_that_it_is_to_have() {
        let read = |name: &str, packed: &[u8], size| {
            let mut text = String::new();
            unpack(name, packed, size)?.read_to_string(&mut text).map(|_| text)
        };
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut encoder, b"text").expect("memory");
        let packed = encoder.finish().expect("memory");
        for size in [None, Some(4)] {
            assert_eq!(read("p.gz", &packed, size).expect("right"), "text");
        }
        let error = read("p.gz", &packed, Some(5)).expect_err("it is too short");
        assert!(error.to_string().contains("shorter"), "{error}");
        let error = read("p.gz", &packed, Some(3)).expect_err("it is too long");
        assert!(error.to_string().contains("larger"), "{error}");
        assert!(read("p.gz", &packed[..packed.len() - 9], Some(4)).is_err(), "it is cut off");
    }
}
