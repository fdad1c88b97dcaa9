//! What a release tree says about itself: `.treeinfo`, as productmd writes it. Pure.

use std::collections::BTreeMap;

/// Why a text is no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeinfoError {
    /// A section or key is missing.
    #[error(
        ".treeinfo has no {key} in section [{section}]: is it that of an x86_64 release with an installer?"
    )]
    Missing {
        /// The section.
        section: String,
        /// The key.
        key: &'static str,
    },
    /// A path that leaves the tree.
    #[error(".treeinfo names {path:?}, which is not in the tree")]
    Outside {
        /// The path.
        path: String,
    },
    /// A digest in a form that is not known.
    #[error(".treeinfo has no SHA-256 digest of {path}")]
    Digest {
        /// The path.
        path: String,
    },
}

/// A file of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeFile {
    /// Its path below the tree.
    pub path: String,
    /// Its SHA-256 digest in hexadecimal.
    pub sha256: String,
}

/// What boots a tree's installer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Treeinfo {
    /// The release's name, such as `Fedora 40`.
    pub name: String,
    /// The kernel.
    pub kernel: TreeFile,
    /// The initial file system.
    pub initrd: TreeFile,
    /// The installer itself, where it is a file of its own.
    pub stage2: Option<TreeFile>,
    /// The folders of its repositories; an empty path is the tree itself.
    pub repositories: Vec<String>,
    /// Repositories that it names and that do not lie in it.
    pub elsewhere: Vec<String>,
}

/// Reads a `.treeinfo`.
///
/// # Errors
/// It does not say what boots the installer for x86_64.
pub fn parse(text: &str) -> Result<Treeinfo, TreeinfoError> {
    let sections = sections(text);
    let get = |section: &str, key: &'static str| -> Result<&str, TreeinfoError> {
        let missing = || TreeinfoError::Missing { section: section.to_owned(), key };
        sections.get(section).and_then(|keys| keys.get(key)).copied().ok_or_else(missing)
    };
    let file = |path: &str| -> Result<TreeFile, TreeinfoError> {
        if !is_inside(path) {
            return Err(TreeinfoError::Outside { path: path.to_owned() });
        }
        let unknown = || TreeinfoError::Digest { path: path.to_owned() };
        let digest = sections.get("checksums").and_then(|keys| keys.get(path)).ok_or_else(unknown)?;
        let sha256 = digest.strip_prefix("sha256:").ok_or_else(unknown)?;
        if sha256.len() != 64 || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(unknown());
        }
        Ok(TreeFile { path: path.to_owned(), sha256: sha256.to_ascii_lowercase() })
    };
    let images = "images-x86_64";
    let (repositories, elsewhere) = repositories(&sections);
    let name = get("general", "name").or_else(|_| get("release", "name")).unwrap_or("").to_owned();
    Ok(Treeinfo {
        name,
        kernel: file(get(images, "kernel")?)?,
        initrd: file(get(images, "initrd")?)?,
        stage2: get("stage2", "mainimage").ok().map(file).transpose()?,
        repositories,
        elsewhere,
    })
}

/// Whether a path stays in its tree, in the one spelling that it has.
pub(crate) fn is_inside(path: &str) -> bool {
    path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// The repositories in the tree, and those elsewhere.
fn repositories(sections: &BTreeMap<&str, BTreeMap<&str, &str>>) -> (Vec<String>, Vec<String>) {
    let mut named: Vec<String> = sections
        .iter()
        .filter(|(section, _)| **section == "general" || section.starts_with("variant-"))
        .filter_map(|(_, keys)| keys.get("repository"))
        .map(|path| path.trim_end_matches('/').trim_start_matches("./").to_owned())
        .map(|path| if path == "." { String::new() } else { path })
        .collect();
    if named.is_empty() {
        named.push(String::new());
    }
    named.sort();
    named.dedup();
    named.into_iter().partition(|path| path.is_empty() || is_inside(path))
}

fn sections(text: &str) -> BTreeMap<&str, BTreeMap<&str, &str>> {
    let mut sections: BTreeMap<&str, BTreeMap<&str, &str>> = BTreeMap::new();
    let mut current = "";
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            current = name;
        } else if let Some((key, value)) = line.split_once('=') {
            sections.entry(current).or_default().insert(key.trim(), value.trim());
        }
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> String {
        let (a, b, c) = ("a".repeat(64), "B".repeat(64), "c".repeat(64));
        format!(
            "[checksums]\nimages/install.img = sha256:{c}\nimages/pxeboot/initrd.img = sha256:{b}\nimages/pxeboot/vmlinuz = sha256:{a}\n\n[general]\n; WARNING.0 = deprecated\nname = Fedora 40\n\n[images-x86_64]\nkernel = images/pxeboot/vmlinuz\ninitrd = images/pxeboot/initrd.img\n\n[stage2]\nmainimage = images/install.img\n"
        )
    }

    #[test]
    fn a_tree_names_what_boots_it_and_vouches_for_it() {
        let tree = parse(&text()).unwrap();
        assert_eq!(tree.name, "Fedora 40");
        assert_eq!(tree.kernel.path, "images/pxeboot/vmlinuz");
        assert_eq!(tree.kernel.sha256, "a".repeat(64));
        assert_eq!(tree.initrd.sha256, "b".repeat(64));
        assert_eq!(tree.stage2.map(|file| file.path).as_deref(), Some("images/install.img"));
    }

    #[test]
    fn what_leaves_the_tree_or_has_no_digest_is_refused() {
        let outside = text().replace("kernel = images", "kernel = ../images");
        assert!(matches!(parse(&outside), Err(TreeinfoError::Outside { .. })));
        // What the newest of Red Hat's kind have: a repository in the tree, and one beside it.
        let variants = "\n[variant-A]\nrepository = ./A/\n[variant-B]\nrepository = ../../B/os\n[variant-C]\nrepository = .\n";
        let tree = parse(&(text() + variants)).unwrap();
        assert_eq!(
            (tree.repositories, tree.elsewhere),
            (vec![String::new(), "A".into()], vec!["../../B/os".into()])
        );
        assert_eq!(parse(&text()).unwrap().repositories, [""]);
        let unvouched = text().replace("images/pxeboot/vmlinuz = sha256:", "images/pxeboot/vmlinuz = md5:");
        assert!(matches!(parse(&unvouched), Err(TreeinfoError::Digest { .. })));
        let error = parse("[general]\nname = x\n").unwrap_err().to_string();
        assert!(error.starts_with(".treeinfo has no kernel in section [images-x86_64]"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "(\\[|\\]|=|\n|general|images-x86_64|kernel|/|\\.\\.|sha256:| ){0,40}") {
            let _ = parse(&text);
        }
    }
}
