//! Release trees of Fedora's kind: what they have and what each file must be.
//!
//! ```text
//! metalink ─► repomd.xml ─► primary ─► packages
//! .treeinfo ─► images
//! ```
//!
//! All of it is pure: text goes in, plain data comes out. Deliberately absent: fetching, and whether the
//! text can be trusted (see `mirror::rpm`).

pub mod filelists;
pub mod metalink;
mod packed;
pub mod primary;
pub mod repomd;
pub mod treeinfo;

pub use packed::unpack;

use crate::cache::Digest;

/// A file of a tree, and what it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Its path under the tree's root.
    pub path: String,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes, where they are told.
    pub size: Option<u64>,
}

/// Metadata that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// It is no XML.
    #[error("it is no XML: {0}")]
    Xml(String),
    /// It cannot be read to its end.
    #[error("it cannot be unpacked or read: {0}")]
    Unread(String),
    /// Something in it is missing or cannot be understood.
    #[error("it has no usable {0}")]
    Unusable(&'static str),
    /// Its digests are of another kind.
    #[error("its digests are {0}, and only sha256 is understood")]
    OtherDigest(String),
}

/// An element's name without its namespace, and its attributes and text as they come.
pub(crate) mod xml {
    use quick_xml::events::{BytesStart, Event};
    use quick_xml::{Reader, XmlVersion};
    use std::io::{self, BufRead, Read};

    use super::MetadataError;

    /// The largest element or text: what is read is in memory one of these at a time.
    const LARGEST_PIECE: usize = 16 << 20;

    /// A document of which so many bytes may be read.
    struct Bounded<R> {
        document: R,
        left: usize,
    }

    impl<R: BufRead> BufRead for Bounded<R> {
        fn fill_buf(&mut self) -> io::Result<&[u8]> {
            if self.left == 0 {
                return Err(io::Error::other("a piece of it is too large"));
            }
            let bytes = self.document.fill_buf()?;
            Ok(&bytes[..bytes.len().min(self.left)])
        }

        fn consume(&mut self, amount: usize) {
            self.left -= amount;
            self.document.consume(amount);
        }
    }

    impl<R: BufRead> Read for Bounded<R> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.fill_buf()?.read(buffer)?;
            self.consume(count);
            Ok(count)
        }
    }

    /// What a document has, piece by piece.
    pub(crate) enum Piece {
        /// An element begins, with its attributes.
        Open(String, Vec<(String, String)>),
        /// Text inside an element.
        Text(String),
        /// An element ends.
        Close(String),
    }

    /// Hands each piece of the document to `take`, until that fails.
    pub(crate) fn read(
        document: impl BufRead,
        mut take: impl FnMut(Piece) -> Result<(), MetadataError>,
    ) -> Result<(), MetadataError> {
        let wrong = |error: &dyn std::fmt::Display| MetadataError::Xml(error.to_string());
        let mut reader = Reader::from_reader(Bounded { document, left: LARGEST_PIECE });
        let mut piece = Vec::new();
        loop {
            piece.clear();
            reader.get_mut().left = LARGEST_PIECE;
            let event = reader.read_event_into(&mut piece).map_err(|error| match error {
                quick_xml::Error::Io(error) => MetadataError::Unread(error.to_string()),
                error => wrong(&error),
            });
            match event? {
                Event::Start(start) => take(open(&start)?)?,
                Event::Empty(start) => {
                    let name = local(start.local_name().as_ref());
                    take(open(&start)?)?;
                    take(Piece::Close(name))?;
                }
                Event::Text(text) => {
                    let text = text.decode().map_err(|error| wrong(&error))?.into_owned();
                    take(Piece::Text(text))?;
                }
                Event::GeneralRef(reference) => {
                    // An entity stands alone between two texts.
                    let name = reference.decode().map_err(|error| wrong(&error))?.into_owned();
                    let text = quick_xml::escape::unescape(&format!("&{name};"))
                        .map_err(|error| wrong(&error))?
                        .into_owned();
                    take(Piece::Text(text))?;
                }
                Event::End(end) => take(Piece::Close(local(end.local_name().as_ref())))?,
                Event::Eof => return Ok(()),
                _ => {}
            }
        }
    }

    fn open(start: &BytesStart<'_>) -> Result<Piece, MetadataError> {
        let wrong = |error: &dyn std::fmt::Display| MetadataError::Xml(error.to_string());
        let mut attributes = Vec::new();
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|error| wrong(&error))?;
            let value = attribute
                .normalized_value(XmlVersion::Implicit1_0)
                .map_err(|error| wrong(&error))?
                .into_owned();
            attributes.push((local(attribute.key.local_name().as_ref()), value));
        }
        Ok(Piece::Open(local(start.local_name().as_ref()), attributes))
    }

    fn local(name: &[u8]) -> String {
        String::from_utf8_lossy(name).into_owned()
    }

    /// The attribute of this name.
    pub(crate) fn attribute(attributes: &[(String, String)], name: &str) -> Option<String> {
        attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    }
}

/// Digests are sha256 or refused: nothing weaker vouches for anything.
pub(crate) fn sha256(kind: &str, text: &str) -> Result<Digest, MetadataError> {
    if kind != "sha256" {
        return Err(MetadataError::OtherDigest(kind.to_owned()));
    }
    text.trim().to_ascii_lowercase().parse().map_err(|_| MetadataError::Unusable("checksum"))
}

#[cfg(test)]
mod tests {
    use std::io::{self, BufReader, Read as _};

    use super::*;

    #[test]
    fn a_document_is_read_piece_by_piece_and_no_piece_is_endless() {
        let head = &b"<metadata><a>"[..];
        // Far more than one piece may have, in small ones.
        let pieces = format!("<b>{}</b>", "x".repeat(1 << 10)).repeat(20 << 10);
        let whole = head.chain(pieces.as_bytes()).chain(&b"</a></metadata>"[..]);
        assert_eq!(primary::parse(BufReader::new(whole)), Ok(Vec::new()));
        let mut rest = io::repeat(b'x').take(1 << 40);
        let endless = BufReader::new(head.chain(&mut rest));
        let error = primary::parse(endless).expect_err("endless");
        assert!(matches!(&error, MetadataError::Unread(why) if why.contains("too large")), "{error}");
        assert!(rest.limit() > (1 << 40) - (64 << 20), "it was read");
    }
}
