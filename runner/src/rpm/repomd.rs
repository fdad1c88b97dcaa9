//! `repomd.xml`: the other metadata of a repository.

use super::xml::{self, Piece, attribute};
use super::{File, MetadataError, sha256};

/// A metadata file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Its type, such as `primary`.
    pub kind: String,
    /// The file.
    pub file: File,
    /// Bytes of its text, where they are told.
    pub plain_size: Option<u64>,
}

/// The metadata files of a repository.
///
/// # Errors
/// The text cannot be used.
pub fn parse(text: &str) -> Result<Vec<Index>, MetadataError> {
    let mut files = Vec::new();
    let mut kind = None;
    let (mut path, mut checksum, mut size, mut plain_size) = (None, None, None, None);
    let (mut inside, mut taken) = (String::new(), String::new());
    let mut algorithm = String::new();
    xml::read(text.as_bytes(), |piece| {
        match piece {
            Piece::Open(name, attributes) => {
                match name.as_str() {
                    "data" => {
                        kind = attribute(&attributes, "type");
                        (path, checksum, size, plain_size) = (None, None, None, None);
                    }
                    "location" => path = attribute(&attributes, "href"),
                    "checksum" => algorithm = attribute(&attributes, "type").unwrap_or_default(),
                    _ => {}
                }
                inside = name;
                taken.clear();
            }
            Piece::Text(text) => taken.push_str(&text),
            Piece::Close(name) => {
                match (name.as_str(), inside == name) {
                    ("checksum", true) if kind.is_some() => checksum = Some(sha256(&algorithm, &taken)?),
                    ("size", true) => size = taken.trim().parse().ok(),
                    ("open-size", true) => plain_size = taken.trim().parse().ok(),
                    ("data", _) => {
                        if let Some(kind) = kind.take() {
                            let path = path.take().ok_or(MetadataError::Unusable("location"))?;
                            let digest = checksum.take().ok_or(MetadataError::Unusable("checksum"))?;
                            let file = File { path, digest, size: size.take() };
                            files.push(Index { kind, file, plain_size: plain_size.take() });
                        }
                    }
                    _ => {}
                }
                inside.clear();
            }
        }
        Ok(())
    })?;
    if files.is_empty() {
        return Err(MetadataError::Unusable("data"));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Digest;

    #[test]
    fn each_file_has_its_own_digest_and_not_that_of_its_content_unpacked() {
        let (packed, plain) = (Digest::of(b"packed"), Digest::of(b"plain"));
        let text = format!(
            "<?xml version=\"1.0\"?><repomd xmlns=\"http://x\" xmlns:rpm=\"y\"><revision>1</revision>\
             <data type=\"primary\"><checksum type=\"sha256\">{packed}</checksum>\
             <open-checksum type=\"sha256\">{plain}</open-checksum><location href=\"repodata/p.xml.gz\"/>\
             <timestamp>1</timestamp><size>7</size><open-size>9</open-size></data></repomd>"
        );
        let file = File { path: "repodata/p.xml.gz".to_owned(), digest: packed, size: Some(7) };
        let index = Index { kind: "primary".to_owned(), file, plain_size: Some(9) };
        assert_eq!(parse(&text), Ok(vec![index]));
        assert_eq!(
            parse(&text.replacen("\"sha256\"", "\"sha\"", 1)),
            Err(MetadataError::OtherDigest("sha".to_owned()))
        );
        assert_eq!(parse("<repomd/>"), Err(MetadataError::Unusable("data")));
        assert!(matches!(parse("<repomd><data"), Err(MetadataError::Xml(_))));
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "(<data type=\"a\">|</data>|<checksum type=\"sha256\">|</checksum>|<location href=\"x\"/>|[0-9a-f]|&amp;|<|>){0,30}") {
            let _ = parse(&text);
        }
    }
}
