//! `.treeinfo`: the images of a release tree, with their digests.

use super::{File, MetadataError, sha256};

/// The files that the section `checksums` names. Sizes are not told.
///
/// # Errors
/// A line of it cannot be understood, or a digest is not sha256.
pub fn parse(text: &str) -> Result<Vec<File>, MetadataError> {
    let mut files = Vec::new();
    let mut inside = false;
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            inside = section.trim_end_matches(']') == "checksums";
        } else if inside && !line.is_empty() && !line.starts_with(['#', ';']) {
            let (path, value) = line.split_once('=').ok_or(MetadataError::Unusable("line of [checksums]"))?;
            let (kind, digest) = value.trim().split_once(':').ok_or(MetadataError::Unusable("checksum"))?;
            files.push(File { path: path.trim().to_owned(), digest: sha256(kind, digest)?, size: None });
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Digest;

    #[test]
    fn checksums_are_read_and_nothing_else() {
        let digest = Digest::of(b"x");
        let text = format!(
            "[checksums]\nimages/boot.iso = sha256:{digest}\n\n[general]\narch = x86_64\n; a = b\n[checksums]\n# c\nrepodata/repomd.xml=sha256:{digest}\n"
        );
        let paths: Vec<String> = parse(&text).expect("valid").into_iter().map(|file| file.path).collect();
        assert_eq!(paths, ["images/boot.iso", "repodata/repomd.xml"]);
        assert!(parse(&text.replace("sha256:", "md5:")).is_err());
        assert!(parse("[checksums]\nnonsense\n").is_err());
        assert_eq!(parse(""), Ok(Vec::new()));
    }
}
