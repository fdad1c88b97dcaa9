//! The primary metadata: packages, and what they need and provide.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::BufRead;

use super::xml::{self, Piece, attribute};
use super::{File, MetadataError, sha256};

/// A package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its architecture.
    pub architecture: String,
    /// Its file.
    pub file: File,
    /// What it provides, beside its name: capabilities and files.
    pub provides: Vec<String>,
    /// What it needs.
    pub requires: Vec<String>,
}

#[derive(Default)]
struct Draft {
    name: String,
    architecture: String,
    checksum: Option<crate::cache::Digest>,
    size: Option<u64>,
    path: Option<String>,
    provides: Vec<String>,
    requires: Vec<String>,
}

/// The packages of a repository.
///
/// # Errors
/// The text cannot be used.
pub fn parse(text: impl BufRead) -> Result<Vec<Package>, MetadataError> {
    let mut packages = Vec::new();
    let mut draft = Draft::default();
    let mut stack: Vec<String> = Vec::new();
    let (mut taken, mut algorithm) = (String::new(), String::new());
    xml::read(text, |piece| {
        match piece {
            Piece::Open(name, attributes) => {
                let within = stack.last().map_or("", String::as_str);
                match (within, name.as_str()) {
                    (_, "package") => draft = Draft::default(),
                    (_, "checksum") => algorithm = attribute(&attributes, "type").unwrap_or_default(),
                    (_, "size") => {
                        draft.size = attribute(&attributes, "package").and_then(|size| size.parse().ok());
                    }
                    (_, "location") => draft.path = attribute(&attributes, "href"),
                    ("provides", "entry") => draft.provides.extend(attribute(&attributes, "name")),
                    ("requires", "entry") => draft.requires.extend(attribute(&attributes, "name")),
                    _ => {}
                }
                stack.push(name);
                taken.clear();
            }
            Piece::Text(text) => taken.push_str(&text),
            Piece::Close(name) => {
                stack.pop();
                let within = stack.last().map_or("", String::as_str);
                match (within, name.as_str()) {
                    ("package", "name") => taken.trim().clone_into(&mut draft.name),
                    ("package", "arch") => taken.trim().clone_into(&mut draft.architecture),
                    ("package", "checksum") => draft.checksum = Some(sha256(&algorithm, &taken)?),
                    (_, "file") => draft.provides.push(taken.trim().to_owned()),
                    (_, "package") => packages.push(finished(std::mem::take(&mut draft))?),
                    _ => {}
                }
                taken.clear();
            }
        }
        Ok(())
    })?;
    Ok(packages)
}

fn finished(draft: Draft) -> Result<Package, MetadataError> {
    let Draft { name, architecture, checksum, size, path, provides, requires } = draft;
    if name.is_empty() {
        return Err(MetadataError::Unusable("name of a package"));
    }
    let digest = checksum.ok_or(MetadataError::Unusable("checksum of a package"))?;
    let path = path.ok_or(MetadataError::Unusable("location of a package"))?;
    Ok(Package { name, architecture, file: File { path, digest, size }, provides, requires })
}

/// The places of the packages called so and of all that they need, in every version and from every
/// provider: which of them is installed is the installer's choice.
///
/// # Errors
/// The first name that there is no package of.
pub fn closure(packages: &[Package], names: &[String]) -> Result<BTreeSet<usize>, String> {
    let mut providers: HashMap<&str, Vec<usize>> = HashMap::new();
    for (place, package) in packages.iter().enumerate() {
        let provided = package.provides.iter().map(String::as_str);
        for capability in std::iter::once(package.name.as_str()).chain(provided) {
            providers.entry(capability).or_default().push(place);
        }
    }
    let mut taken = BTreeSet::new();
    let mut queue = VecDeque::new();
    for name in names {
        let named: Vec<usize> = (0..packages.len()).filter(|place| packages[*place].name == *name).collect();
        if named.is_empty() {
            return Err(name.clone());
        }
        queue.extend(named);
    }
    while let Some(place) = queue.pop_front() {
        if !taken.insert(place) {
            continue;
        }
        for need in packages[place].requires.iter().flat_map(|need| capabilities(need)) {
            queue.extend(providers.get(need).into_iter().flatten());
        }
    }
    Ok(taken)
}

/// The capabilities that a need names: itself, or where it is a rich one, `(a if b)`, all in it.
fn capabilities(need: &str) -> Vec<&str> {
    if !need.starts_with('(') {
        return vec![need];
    }
    let is_word = |word: &&str| {
        !matches!(
            *word,
            "" | "if" | "or" | "and" | "else" | "unless" | "with" | "without" | "=" | "<" | ">" | "<=" | ">="
        )
    };
    need.split([' ', '(', ')']).filter(is_word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Digest;

    fn package(name: &str, provides: &[&str], requires: &[&str]) -> Package {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Package {
            name: name.to_owned(),
            architecture: "noarch".to_owned(),
            file: File { path: format!("{name}.rpm"), digest: Digest::of(name.as_bytes()), size: None },
            provides: owned(provides),
            requires: owned(requires),
        }
    }

    #[test]
    fn a_package_is_read() {
        let digest = Digest::of(b"x");
        let text = format!(
            "<metadata xmlns:rpm=\"r\"><package type=\"rpm\"><name>a</name><arch>x86_64</arch>\
             <version epoch=\"0\" ver=\"1\" rel=\"1\"/><checksum type=\"sha256\" pkgid=\"YES\">{digest}</checksum>\
             <summary>a &lt;b&gt; c</summary><size package=\"5\" installed=\"9\"/><location href=\"Packages/a.rpm\"/>\
             <format><rpm:provides><rpm:entry name=\"cap(a)\"/></rpm:provides><rpm:requires>\
             <rpm:entry name=\"/bin/sh\"/></rpm:requires><file>/usr/bin/a</file></format></package></metadata>"
        );
        let package = Package {
            file: File { path: "Packages/a.rpm".to_owned(), digest, size: Some(5) },
            architecture: "x86_64".to_owned(),
            ..package("a", &["cap(a)", "/usr/bin/a"], &["/bin/sh"])
        };
        assert_eq!(parse(text.as_bytes()), Ok(vec![package]));
        assert!(parse(text.replace("<name>a</name>", "").as_bytes()).is_err());
    }

    #[test]
    fn a_closure_has_every_provider_and_nothing_else() {
        let packages = [
            package("a", &[], &["cap", "(d if e)", "nothing-provides-this"]),
            package("b", &["cap"], &["/bin/sh"]),
            package("c", &["cap"], &[]),
            package("d", &[], &["a"]),
            package("sh", &["/bin/sh"], &[]),
            package("alone", &[], &[]),
        ];
        let found = closure(&packages, &["a".to_owned()]).expect("there");
        assert_eq!(found, BTreeSet::from([0, 1, 2, 3, 4]));
        assert_eq!(closure(&packages, &["z".to_owned()]), Err("z".to_owned()));
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "(<package>|</package>|<name>|</name>|<checksum type=\"sha256\">|</checksum>|<file>|x|&lt;|<){0,30}") {
            let _ = parse(text.as_bytes());
            let _ = capabilities(&text);
        }
    }
}
