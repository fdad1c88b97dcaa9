//! What of a package is made once all are unpacked: what it takes over from another, and hard links to files
//! that are another's by now. Read out of the package a second time.

use std::collections::{BTreeSet, HashMap};
use std::io::Read;

use super::layout::{Admitted, Kind, Node};
use super::tree::{Tree, TreeError};
use super::unpack::Described;

/// A package's entries that are to be made later, and its hard links with what they link to.
#[derive(Clone, Debug, Default)]
pub(super) struct Later {
    paths: BTreeSet<String>,
    links: Vec<(String, String)>,
}

impl Later {
    /// Takes note of an entry that was admitted, as far as it has to do with this.
    pub(super) fn note(&mut self, entry: &Described, admitted: &Admitted) {
        if let Kind::HardLink(target) = &entry.kind {
            self.links.push((entry.path.clone(), target.clone()));
        }
        if *admitted == Admitted::Later {
            self.paths.insert(entry.path.clone());
        }
    }

    /// Whether there is nothing to make.
    pub(super) fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }
}

/// Makes them, as the package's entries come.
pub(super) struct Makes<'a> {
    tree: &'a Tree,
    owner: usize,
    later: &'a Later,
    /// Where the contents of a file are that is another package's in its own place.
    moved: HashMap<String, String>,
}

impl<'a> Makes<'a> {
    pub(super) fn new(tree: &'a Tree, owner: usize, later: &'a Later) -> Self {
        Self { tree, owner, later, moved: HashMap::new() }
    }

    /// Takes the package's next entry.
    pub(super) fn entry(
        &mut self,
        entry: &Described,
        replaces: impl Fn(usize, usize) -> bool,
        contents: &mut dyn Read,
    ) -> Result<(), TreeError> {
        let node = |kind| Node { kind, attributes: entry.attributes, owner: self.owner };
        let is_later = self.later.paths.contains(&entry.path);
        match &entry.kind {
            Kind::HardLink(target) if is_later => {
                let place = self.tree.layout().place(target)?;
                let target = match self.moved.get(&place) {
                    Some(path) if *path == entry.path => return Ok(()),
                    Some(path) => path,
                    None => target,
                };
                self.tree.take_over(&entry.path, node(Kind::HardLink(target.clone())), replaces, contents)?;
            }
            Kind::File => {
                if is_later && self.tree.take_over(&entry.path, node(Kind::File), &replaces, contents)? {
                    return Ok(());
                }
                let layout = self.tree.layout();
                let place = layout.place(&entry.path)?;
                if layout.get(&place).is_some_and(|there| there.owner == self.owner) {
                    return Ok(());
                }
                let links_here = |target: &str| layout.place(target).is_ok_and(|target| target == place);
                let links = self.later.links.iter().filter(|(_, target)| links_here(target));
                let names: Vec<&String> = links.map(|(name, _)| name).collect();
                // It was made, and replaced after that.
                let is_file = |name: &str| {
                    let there = layout.place(name).ok().and_then(|name| layout.get(&name));
                    there.is_some_and(|there| there.owner == self.owner && there.kind == Kind::File)
                };
                if let Some(name) = names.iter().find(|name| is_file(name)) {
                    self.moved.insert(place, (*name).clone());
                    return Ok(());
                }
                drop(layout);
                let names = names.into_iter().filter(|name| self.later.paths.contains(*name));
                for name in names {
                    if self.tree.take_over(name, node(Kind::File), &replaces, contents)? {
                        self.moved.insert(place, name.clone());
                        break;
                    }
                }
            }
            _ if is_later => {
                self.tree.take_over(&entry.path, node(entry.kind.clone()), replaces, contents)?;
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use proptest::prelude::*;

    use super::*;
    use crate::disk::layout::Attributes;

    const NAMES: [&str; 4] = ["usr/a", "usr/b", "usr/c", "usr/d"];

    /// For each name: nothing, a file, or a link to the file of an earlier name.
    fn package() -> impl Strategy<Value = Vec<(usize, Option<usize>)>> {
        let choice = prop::collection::vec(prop_oneof![Just(None), (0..9_usize).prop_map(Some)], NAMES.len());
        (choice, Just((0..NAMES.len()).collect::<Vec<_>>()).prop_shuffle()).prop_map(|(choices, order)| {
            let mut files: Vec<usize> = Vec::new();
            let mut entries = Vec::new();
            for name in order {
                match choices[name] {
                    Some(number) if number > 3 && !files.is_empty() => {
                        entries.push((name, Some(files[number % files.len()])));
                    }
                    Some(_) => {
                        files.push(name);
                        entries.push((name, None));
                    }
                    None => {}
                }
            }
            entries
        })
    }

    /// Three packages, how they rank, and whose turn it is.
    type Case = (Vec<Vec<(usize, Option<usize>)>>, Vec<usize>, Vec<usize>);

    fn case() -> impl Strategy<Value = Case> {
        let rank = Just(vec![0, 1, 2]).prop_shuffle();
        let turns: Vec<usize> = (0..3).flat_map(|package| [package; 4]).collect();
        (prop::collection::vec(package(), 3), rank, Just(turns).prop_shuffle())
    }

    fn attributes(owner: usize, name: usize) -> Attributes {
        let mode = 0o600 + u32::try_from(owner * 8 + name).unwrap();
        Attributes { uid: u32::try_from(owner).unwrap(), gid: 0, mode, modified: 0 }
    }

    fn described(owner: usize, (name, target): (usize, Option<usize>)) -> (Described, String) {
        let file = target.unwrap_or(name);
        let kind = target.map_or(Kind::File, |target| Kind::HardLink(format!("./{}", NAMES[target])));
        let path = format!("./{}", NAMES[name]);
        (Described { path, kind, attributes: attributes(owner, file) }, format!("{owner} {file}"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn whoever_comes_first_each_path_has_the_contents_of_who_replaces((packages, rank, turns) in case()) {
            let folder = tempfile::tempdir().unwrap();
            let tree = Tree::create(folder.path().join("tree"), 0).unwrap();
            let replaces = |left: usize, right: usize| left > 0 && right > 0 && rank[left - 1] > rank[right - 1];
            let mut later: BTreeMap<usize, Later> = BTreeMap::new();
            let mut next = [0; 3];
            for index in turns {
                let Some(entry) = packages[index].get(next[index]) else { continue };
                next[index] += 1;
                let (entry, contents) = described(index + 1, *entry);
                let mut contents = contents.as_bytes();
                let admitted = tree
                    .add(&entry.path, &entry.kind, entry.attributes, index + 1, replaces, &mut contents)
                    .unwrap();
                later.entry(index).or_default().note(&entry, &admitted);
            }
            for (index, later) in later.iter().filter(|(_, later)| !later.is_empty()) {
                let mut makes = Makes::new(&tree, index + 1, later);
                for entry in &packages[*index] {
                    let (entry, contents) = described(index + 1, *entry);
                    makes.entry(&entry, replaces, &mut contents.as_bytes()).unwrap();
                }
            }
            let layout = tree.layout();
            let mut inodes: BTreeMap<(usize, usize), u64> = BTreeMap::new();
            for (name, path) in NAMES.iter().enumerate() {
                let has = |index: &usize| packages[*index].iter().find(|(other, _)| *other == name).copied();
                let winner = (0..3).filter(|index| has(index).is_some()).max_by_key(|index| rank[*index]);
                let Some(winner) = winner else {
                    prop_assert!(layout.get(path).is_none());
                    continue;
                };
                let file = has(&winner).and_then(|(_, target)| target).unwrap_or(name);
                let node = layout.get(path).unwrap();
                prop_assert_eq!(node.owner, winner + 1);
                // What says whose it is in the image.
                let node = match &node.kind {
                    Kind::HardLink(target) => layout.get(target).unwrap(),
                    _ => node,
                };
                prop_assert_eq!(&node.kind, &Kind::File);
                prop_assert_eq!(node.attributes, attributes(winner + 1, file));
                let full = tree.root().join(path);
                prop_assert_eq!(fs::read_to_string(&full).unwrap(), format!("{} {file}", winner + 1));
                let inode = fs::metadata(&full).unwrap().ino();
                prop_assert_eq!(*inodes.entry((winner, file)).or_insert(inode), inode);
            }
        }
    }
}
