//! Metalinks and mirror lists: where a repository can be had, and what its `repomd.xml` is.

use super::xml::{self, Piece, attribute};
use super::{File, MetadataError, sha256};

/// What a metalink says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metalink {
    /// What `repodata/repomd.xml` is now.
    pub repomd: File,
    /// Roots of mirrors, the preferred ones first, without a slash at the end.
    pub mirrors: Vec<String>,
}

/// Parses a metalink for `repomd.xml`.
///
/// # Errors
/// The text cannot be used.
pub fn parse(text: &str) -> Result<Metalink, MetadataError> {
    let mut mirrors: Vec<(u32, String)> = Vec::new();
    let (mut digest, mut size, mut preference) = (None, None, 0);
    let (mut taken, mut algorithm) = (String::new(), String::new());
    // Besides the file as it is, there are those that it was lately.
    let mut alternates = 0;
    xml::read(text.as_bytes(), |piece| {
        match piece {
            Piece::Open(name, attributes) => {
                match name.as_str() {
                    "alternates" => alternates += 1,
                    "hash" => algorithm = attribute(&attributes, "type").unwrap_or_default(),
                    "url" => {
                        preference = attribute(&attributes, "preference")
                            .and_then(|value| value.parse().ok())
                            .unwrap_or(0);
                    }
                    _ => {}
                }
                taken.clear();
            }
            Piece::Text(text) => taken.push_str(&text),
            Piece::Close(name) => {
                match name.as_str() {
                    "alternates" => alternates -= 1,
                    "hash" if alternates == 0 && algorithm == "sha256" => {
                        digest = Some(sha256(&algorithm, &taken)?);
                    }
                    "size" if alternates == 0 => size = taken.trim().parse().ok(),
                    "url" => {
                        let url = taken.trim();
                        let is_http = url.starts_with("http://") || url.starts_with("https://");
                        if let Some(root) = url.strip_suffix("/repodata/repomd.xml").filter(|_| is_http) {
                            mirrors.push((preference, root.to_owned()));
                        }
                    }
                    _ => {}
                }
                taken.clear();
            }
        }
        Ok(())
    })?;
    let digest = digest.ok_or(MetadataError::Unusable("sha256 hash"))?;
    if mirrors.is_empty() {
        return Err(MetadataError::Unusable("mirror"));
    }
    mirrors.sort_by_key(|(preference, _)| std::cmp::Reverse(*preference));
    let repomd = File { path: "repodata/repomd.xml".to_owned(), digest, size };
    Ok(Metalink { repomd, mirrors: mirrors.into_iter().map(|(_, root)| root).collect() })
}

/// The roots that a plain mirror list has, one a line.
#[must_use]
pub fn mirror_list(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim);
    let roots = lines.filter(|line| line.starts_with("http://") || line.starts_with("https://"));
    roots.map(|root| root.trim_end_matches('/').to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Digest;

    #[test]
    fn the_present_file_and_the_preferred_mirrors_are_found() {
        let (now, before) = (Digest::of(b"now"), Digest::of(b"before"));
        let text = format!(
            "<metalink xmlns:mm0=\"m\"><files><file name=\"repomd.xml\"><mm0:timestamp>1</mm0:timestamp><size>5</size>\
             <verification><hash type=\"md5\">00</hash><hash type=\"sha256\">{now}</hash></verification>\
             <mm0:alternates><mm0:alternate><size>4</size><verification><hash type=\"sha256\">{before}</hash>\
             </verification></mm0:alternate></mm0:alternates><resources>\
             <url protocol=\"rsync\" preference=\"100\">rsync://a/repodata/repomd.xml</url>\
             <url preference=\"90\">http://b.test/f/repodata/repomd.xml</url>\
             <url preference=\"99\">https://c.test/f/repodata/repomd.xml</url></resources></file></files></metalink>"
        );
        let found = parse(&text).expect("valid");
        assert_eq!((found.repomd.digest, found.repomd.size), (now, Some(5)));
        assert_eq!(found.mirrors, ["https://c.test/f", "http://b.test/f"]);
        assert!(parse(&text.replace("sha256", "sha1")).is_err());
    }

    #[test]
    fn a_list_has_a_mirror_a_line() {
        assert_eq!(
            mirror_list("# x\nhttp://a.test/f/\nftp://b\nhttps://c.test\n"),
            ["http://a.test/f", "https://c.test"]
        );
    }
}
