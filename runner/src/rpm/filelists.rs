//! The lists of all files: primary only has those in a few folders.

use std::collections::{HashMap, HashSet};
use std::io::BufRead;

use crate::cache::Digest;

use super::MetadataError;
use super::primary::Package;
use super::xml::{self, Piece, attribute};

/// Paths that packages need and that none provides, as far as primary tells.
#[must_use]
pub fn missing(packages: &[Package]) -> HashSet<String> {
    let provided: HashSet<&str> =
        packages.iter().flat_map(|package| &package.provides).map(String::as_str).collect();
    let needed = packages.iter().flat_map(|package| &package.requires);
    needed.filter(|need| need.starts_with('/') && !provided.contains(need.as_str())).cloned().collect()
}

/// Has packages provide those of `paths` that the lists say are theirs.
///
/// # Errors
/// The text cannot be used.
pub fn provide(
    packages: &mut [Package],
    paths: &HashSet<String>,
    text: impl BufRead,
) -> Result<(), MetadataError> {
    let places: HashMap<Digest, usize> =
        packages.iter().enumerate().map(|(place, package)| (package.file.digest, place)).collect();
    let mut current = None;
    let mut taken = String::new();
    xml::read(text, |piece| {
        match piece {
            Piece::Open(name, attributes) => {
                if name == "package" {
                    let digest = attribute(&attributes, "pkgid").and_then(|digest| digest.parse().ok());
                    current = digest.and_then(|digest: Digest| places.get(&digest).copied());
                }
                taken.clear();
            }
            Piece::Text(text) => taken.push_str(&text),
            Piece::Close(name) => {
                if let (Some(place), "file") = (current, name.as_str())
                    && paths.contains(taken.trim())
                {
                    packages[place].provides.push(taken.trim().to_owned());
                }
                taken.clear();
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpm::File;

    #[test]
    fn what_only_the_lists_tell_is_provided() {
        let package = |name: &str, requires: &[&str]| Package {
            name: name.to_owned(),
            architecture: "noarch".to_owned(),
            file: File { path: name.to_owned(), digest: Digest::of(name.as_bytes()), size: None },
            provides: Vec::new(),
            requires: requires.iter().map(|need| (*need).to_owned()).collect(),
        };
        let mut packages = [package("a", &["/opt/b", "cap"]), package("b", &[])];
        let paths = missing(&packages);
        assert_eq!(paths, HashSet::from(["/opt/b".to_owned()]));
        let text = format!(
            "<filelists><package pkgid=\"{}\" name=\"b\"><file>/opt/b</file><file type=\"dir\">/opt</file></package></filelists>",
            Digest::of(b"b")
        );
        provide(&mut packages, &paths, text.as_bytes()).expect("valid");
        assert_eq!(packages[1].provides, ["/opt/b"]);
        assert!(missing(&packages).is_empty());
    }
}
