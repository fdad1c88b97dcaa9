//! What the file system of an image will hold: every path with its kind, owner and mode.
//!
//! Pure. It alone decides where an entry of a package goes and whether it may: the tree on disk is
//! private to the builder, so what this map admits is all there ever is, and no system call is needed
//! to see that a path does not lead through a link. Packages are unpacked in parallel; whatever the
//! order in which they arrive, the same one ends up owning a path.

use std::collections::BTreeMap;

/// Directories of `/` that are links into `/usr` on a merged system. All of them are made, as Debian's
/// installer does for amd64.
pub const MERGED: [&str; 6] = ["bin", "lib", "lib32", "lib64", "libx32", "sbin"];

/// Owner and permissions as they must be in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Modification time in seconds since 1970.
    pub modified: u64,
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A file with contents of its own.
    File,
    /// A second name of the file at this path of the layout, which is of the same owner; or is to become one
    /// of its owner's, where another package's file is there until all are unpacked.
    HardLink(String),
    /// A symbolic link with this target.
    Symlink(String),
}

/// A path of the layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Owner and permissions.
    pub attributes: Attributes,
    /// Who put it there: the package's place in the build's order.
    pub owner: usize,
}

/// Why an entry is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The path is no path of an archive.
    #[error("its path {0:?} is absolute, has \"..\" or a control character, or is too long")]
    Path(String),
    /// The path leads through something that is no directory.
    #[error("its path {path} leads through {through}, which is no directory")]
    Through {
        /// The path.
        path: String,
        /// What it leads through.
        through: String,
    },
    /// Two packages have different things there.
    #[error("{path} also comes from the package with number {other}, and neither replaces the other")]
    Taken {
        /// The path.
        path: String,
        /// The other package's place in the build's order.
        other: usize,
    },
    /// A hard link to nothing.
    #[error("{path} is a hard link to {target}, which is no file of its package before it")]
    DeadLink {
        /// The path.
        path: String,
        /// The target.
        target: String,
    },
}

/// What to do with an entry that was admitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// Make it at this path.
    Make(String),
    /// Nothing: it is there, or another package's counts.
    Nothing,
    /// It must be made once all are unpacked: another package's is there, or where it links to.
    Later,
}

/// The tree.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    nodes: BTreeMap<String, Node>,
    /// Whether paths lead where they say, as in a system that has its links already.
    is_plain: bool,
}

impl Layout {
    /// One in which paths are not merged into `/usr`.
    #[must_use]
    pub fn plain() -> Self {
        Self { is_plain: true, ..Self::default() }
    }

    /// All paths, parents before children. The root is the empty path.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// What is at `path`.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// Does another package than number `owner` have its own thing at a package's `path`? What the
    /// builder itself wrote there does not count.
    #[must_use]
    pub fn is_taken_over(&self, path: &str, owner: usize) -> bool {
        let node = self.place(path).ok().and_then(|path| self.nodes.get(&path));
        node.is_some_and(|node| node.kind != Kind::Directory && node.owner != owner && node.owner != 0)
    }

    /// Admits an entry of package number `owner`. `replaces` tells whether the first of two packages
    /// replaces the second's files.
    ///
    /// # Errors
    /// The entry must not be made.
    pub fn admit(
        &mut self,
        path: &str,
        kind: Kind,
        attributes: Attributes,
        owner: usize,
        replaces: impl Fn(usize, usize) -> bool,
    ) -> Result<Admitted, Refusal> {
        let path = self.place(path)?;
        self.check_parents(&path)?;
        let mut can_be_made = true;
        let kind = match kind {
            Kind::HardLink(target) => {
                let target = self.place(&target)?;
                can_be_made = match self.nodes.get(&target) {
                    Some(node) if node.owner == owner && node.kind == Kind::File => true,
                    // The package's own file was there, or will be, or is another's only in this place.
                    Some(Node {
                        kind: Kind::File | Kind::HardLink(_) | Kind::Symlink(_),
                        owner: other,
                        ..
                    }) if replaces(owner, *other) || replaces(*other, owner) => false,
                    _ => return Err(Refusal::DeadLink { path, target }),
                };
                Kind::HardLink(target)
            }
            other => other,
        };
        let node = Node { kind, attributes, owner };
        let Some(there) = self.nodes.get_mut(&path) else {
            self.nodes.insert(path.clone(), node);
            return Ok(if can_be_made { Admitted::Make(path) } else { Admitted::Later });
        };
        match (&there.kind, &node.kind) {
            // dpkg leaves an existing directory as it is: the first in the build's order counts.
            (Kind::Directory, Kind::Directory) => {
                if node.owner < there.owner {
                    *there = node;
                }
                Ok(Admitted::Nothing)
            }
            (Kind::Symlink(old), Kind::Symlink(new)) if old == new => Ok(Admitted::Nothing),
            (Kind::Directory, _) | (_, Kind::Directory) => Err(Refusal::Taken { path, other: there.owner }),
            _ => match wins(owner, there.owner, replaces) {
                Some(true) => Ok(Admitted::Later),
                Some(false) => Ok(Admitted::Nothing),
                None => Err(Refusal::Taken { path, other: there.owner }),
            },
        }
    }

    /// Admits an entry that was to be made later, now that all are unpacked. Where it goes, if it does.
    ///
    /// # Errors
    /// The entry must not be made.
    pub fn take_over(
        &mut self,
        path: &str,
        mut node: Node,
        replaces: impl Fn(usize, usize) -> bool,
    ) -> Result<Option<String>, Refusal> {
        let path = self.place(path)?;
        self.check_parents(&path)?;
        let taken = match self.nodes.get(&path) {
            None => Some(true),
            Some(there) if there.kind == Kind::Directory => None,
            Some(there) if there.owner == node.owner => Some(true),
            Some(there) => wins(node.owner, there.owner, replaces),
        };
        match (taken, self.nodes.get(&path)) {
            (None, Some(there)) => Err(Refusal::Taken { path, other: there.owner }),
            (Some(false), _) => Ok(None),
            _ => {
                if let Kind::HardLink(target) = &node.kind {
                    let target = self.place(target)?;
                    let is_own = |there: &Node| there.owner == node.owner && there.kind == Kind::File;
                    if target == path || !self.nodes.get(&target).is_some_and(is_own) {
                        return Err(Refusal::DeadLink { path, target });
                    }
                    node.kind = Kind::HardLink(target);
                }
                self.put(&path, node);
                Ok(Some(path))
            }
        }
    }

    /// Puts a file or symbolic link in the place of whatever non-directory is there.
    ///
    /// # Errors
    /// The entry must not be made.
    pub fn replace(&mut self, path: &str, node: Node) -> Result<String, Refusal> {
        let path = self.place(path)?;
        self.check_parents(&path)?;
        match self.nodes.get(&path) {
            Some(there) if there.kind == Kind::Directory => Err(Refusal::Taken { path, other: there.owner }),
            _ => {
                self.put(&path, node);
                Ok(path)
            }
        }
    }

    /// Puts a node at a place. If a file was there that has further names, one of these is the file now.
    fn put(&mut self, path: &str, node: Node) {
        let old = self.nodes.insert(path.to_owned(), node);
        let Some(Node { kind: Kind::File, attributes, owner }) = old else { return };
        let mut file: Option<String> = None;
        for (name, other) in &mut self.nodes {
            let is_name = matches!(&other.kind, Kind::HardLink(target) if target == path);
            if !is_name || other.owner != owner {
                continue;
            }
            match &file {
                None => {
                    *other = Node { kind: Kind::File, attributes, owner };
                    file = Some(name.clone());
                }
                Some(file) => other.kind = Kind::HardLink(file.clone()),
            }
        }
    }

    /// Puts one of the links of a merged `/usr` in place, which no package's path can name.
    pub(super) fn insert_merged(&mut self, path: &str, node: Node) {
        self.nodes.insert(path.to_owned(), node);
    }

    /// The place of a package's path.
    ///
    /// # Errors
    /// It is no path of an archive.
    pub fn place(&self, path: &str) -> Result<String, Refusal> {
        if self.is_plain { inside(path) } else { place(path) }
    }

    fn check_parents(&self, path: &str) -> Result<(), Refusal> {
        for (index, _) in path.match_indices('/') {
            let parent = &path[..index];
            match self.nodes.get(parent) {
                Some(node) if node.kind == Kind::Directory => {}
                _ => {
                    return Err(Refusal::Through { path: path.to_owned(), through: parent.to_owned() });
                }
            }
        }
        Ok(())
    }
}

/// Which of two packages that have the same path has it in the end: whether it is the first, if it is one.
fn wins(one: usize, other: usize, replaces: impl Fn(usize, usize) -> bool) -> Option<bool> {
    match (replaces(one, other), replaces(other, one)) {
        (true, true) => Some(one > other),
        (true, false) => Some(true),
        (false, true) => Some(false),
        (false, false) => None,
    }
}

/// The place of an archive's path: without `./` and trailing slashes, merged into `usr`.
///
/// # Errors
/// It is no path of an archive.
pub fn place(path: &str) -> Result<String, Refusal> {
    let place = inside(path)?;
    let first = place.split('/').next().unwrap_or("");
    Ok(if MERGED.contains(&first) { format!("usr/{place}") } else { place })
}

/// The same without merging.
fn inside(path: &str) -> Result<String, Refusal> {
    let refused = || Refusal::Path(path.to_owned());
    if path.starts_with('/') || path.len() > 2000 || path.contains(char::is_control) {
        return Err(refused());
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(refused()),
            part if part.len() > 255 => return Err(refused()),
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Attributes = Attributes { uid: 0, gid: 0, mode: 0o755, modified: 0 };

    fn admit(layout: &mut Layout, path: &str, kind: Kind, owner: usize) -> Result<Admitted, Refusal> {
        // Package 2 replaces package 1, and nobody else anybody.
        layout.admit(path, kind, PLAIN, owner, |left, right| (left, right) == (2, 1))
    }

    fn with(directories: &[&str]) -> Layout {
        let mut layout = Layout::default();
        for path in directories {
            admit(&mut layout, path, Kind::Directory, 0).expect("admitted");
        }
        layout
    }

    #[test]
    fn merged_directories_lead_into_usr() {
        let mut layout = with(&["./", "./usr/", "./bin/"]);
        assert_eq!(
            admit(&mut layout, "./bin/sh", Kind::File, 1),
            Ok(Admitted::Make("usr/bin/sh".to_owned()))
        );
        assert!(matches!(
            admit(&mut layout, "./usr/bin/sh", Kind::File, 3),
            Err(Refusal::Taken { other: 1, .. })
        ));
    }

    #[test]
    fn no_path_escapes() {
        let mut layout = with(&["usr"]);
        for path in ["/etc/x", "../x", "usr/../../x", "usr/x\ny"] {
            assert!(matches!(admit(&mut layout, path, Kind::File, 1), Err(Refusal::Path(_))), "{path}");
        }
        admit(&mut layout, "usr/link", Kind::Symlink("/etc".to_owned()), 1).expect("admitted");
        assert_eq!(
            admit(&mut layout, "usr/link/passwd", Kind::File, 1),
            Err(Refusal::Through { path: "usr/link/passwd".to_owned(), through: "usr/link".to_owned() })
        );
        assert!(matches!(
            admit(&mut layout, "usr/x", Kind::HardLink("usr/link".to_owned()), 1),
            Err(Refusal::DeadLink { .. })
        ));
        assert!(matches!(admit(&mut layout, "absent/x", Kind::File, 1), Err(Refusal::Through { .. })));
    }

    #[test]
    fn a_file_that_is_replaced_lives_on_under_its_other_names() {
        let mut layout = with(&["usr"]);
        let setuid = Attributes { mode: 0o4755, ..PLAIN };
        layout.admit("usr/a", Kind::File, setuid, 1, |_, _| false).expect("admitted");
        for name in ["usr/c", "usr/b"] {
            admit(&mut layout, name, Kind::HardLink("usr/a".to_owned()), 1).expect("admitted");
        }
        let other = Node { kind: Kind::File, attributes: PLAIN, owner: 2 };
        layout.replace("usr/a", other.clone()).expect("replaced");
        assert_eq!(layout.get("usr/a"), Some(&other));
        assert_eq!(layout.get("usr/b"), Some(&Node { kind: Kind::File, attributes: setuid, owner: 1 }));
        assert_eq!(layout.get("usr/c").map(|node| &node.kind), Some(&Kind::HardLink("usr/b".to_owned())));
    }

    #[test]
    fn what_takes_over_links_to_its_own_packages_files_only() {
        let mut layout = with(&["usr"]);
        for (name, owner) in [("usr/a", 1), ("usr/own", 2)] {
            admit(&mut layout, name, Kind::File, owner).expect("admitted");
        }
        let mut take = |target: &str| {
            let node = Node { kind: Kind::HardLink(target.to_owned()), attributes: PLAIN, owner: 2 };
            layout.take_over("usr/a", node, |left, right| (left, right) == (2, 1))
        };
        assert!(matches!(take("../../etc/shadow"), Err(Refusal::Path(_))));
        for target in ["usr/absent", "usr/a", "usr"] {
            assert!(matches!(take(target), Err(Refusal::DeadLink { .. })), "{target}");
        }
        assert_eq!(take("./usr/own"), Ok(Some("usr/a".to_owned())));
        // Who replaces nobody takes nothing over.
        let node = Node { kind: Kind::File, attributes: PLAIN, owner: 3 };
        assert!(matches!(layout.take_over("usr/a", node, |_, _| false), Err(Refusal::Taken { .. })));
    }

    #[test]
    fn who_replaces_wins_in_either_order() {
        let mut layout = with(&["usr"]);
        admit(&mut layout, "usr/a", Kind::File, 1).expect("admitted");
        assert_eq!(admit(&mut layout, "usr/a", Kind::File, 2), Ok(Admitted::Later));
        admit(&mut layout, "usr/b", Kind::File, 2).expect("admitted");
        assert_eq!(admit(&mut layout, "usr/b", Kind::File, 1), Ok(Admitted::Nothing));
        assert_eq!(layout.get("usr/b").expect("there").owner, 2);
    }

    #[test]
    fn the_first_package_in_order_owns_a_directory() {
        let mut layout = Layout::default();
        let sticky = Attributes { mode: 0o1777, ..PLAIN };
        admit(&mut layout, "tmp", Kind::Directory, 5).expect("admitted");
        layout.admit("tmp", Kind::Directory, sticky, 1, |_, _| false).expect("admitted");
        admit(&mut layout, "tmp", Kind::Directory, 9).expect("admitted");
        assert_eq!(layout.get("tmp").expect("there").attributes, sticky);
    }

    proptest::proptest! {
        #[test]
        fn a_place_is_always_inside(path in "[a-c./\n]{0,20}|(bin|usr|\\.\\.|/|\\.|lib64){0,6}") {
            if let Ok(place) = place(&path) {
                proptest::prop_assert!(!place.starts_with('/'));
                proptest::prop_assert!(place.split('/').all(|part| part != ".." && part != "."));
                proptest::prop_assert!(!MERGED.contains(&place.split('/').next().unwrap_or("")));
            }
        }
    }
}
