//! A release tree that lies on this host, as the guest's mirror has it.
//!
//! ```text
//! .treeinfo ─► images
//! repodata/repomd.xml ─► primary and the other indices ─► packages
//! ```
//!
//! `.treeinfo` and `repomd.xml` are believed, as the recipe names their tree, and their digests are in the lock.
//! All else is what these two say, or is not handed out; what they do not name does not exist.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::beside::Beside;
use crate::cache::offer::{Local, Offer, Offered};
use crate::cache::{Digest, Wanted};
use crate::contents::provenance::Artifact;
use crate::media::treeinfo::{self, is_inside};
use crate::rpm::repomd::Index;
use crate::rpm::{self, File, MetadataError};
use crate::stop::Stop;
use crate::vm::argv::{GUEST_GATEWAY, MIRROR_PORT};

use super::medium::MediumError;

/// The mirror's folder that has it.
const FOLDER: &str = "tree";
const INFO: &str = ".treeinfo";
/// The largest `.treeinfo`, in bytes.
const LARGEST_INFO: u64 = 1 << 20;
/// The largest index, as it lies there, in bytes.
const LARGEST_INDEX: u64 = 1 << 30;

/// Where the guest finds it.
pub(super) fn address() -> String {
    format!("http://{GUEST_GATEWAY}:{MIRROR_PORT}/{FOLDER}")
}

/// A tree.
#[derive(Debug)]
pub(super) struct ReleaseTree {
    folder: Beside,
    files: HashMap<String, Wanted>,
    /// What all the rest is believed for.
    pub(super) heads: Vec<Artifact>,
    /// Repositories that it names and does not have.
    pub(super) elsewhere: Vec<String>,
}

impl Offer for ReleaseTree {
    fn find(&self, path: &str) -> Option<Offered> {
        let path = path.strip_prefix('/')?.strip_prefix(FOLDER)?.strip_prefix('/')?;
        let wanted = self.files.get(path)?.clone();
        let local = Local { folder: self.folder.clone(), path: path.into() };
        Some(Offered { wanted, local: Some(local), modified: None })
    }
}

impl ReleaseTree {
    /// Reads what the tree says of itself.
    pub(super) fn read(folder: Beside, stop: &Stop) -> Result<Self, MediumError> {
        let mut tree = Self { folder, files: HashMap::new(), heads: Vec::new(), elsewhere: Vec::new() };
        let info = tree.head(INFO, LARGEST_INFO)?;
        let shown = tree.shown(INFO);
        let read = treeinfo::parse(&info).map_err(|source| MediumError::Treeinfo { path: shown, source })?;
        if read.stage2.is_none() {
            return Err(MediumError::NoStage2 { path: tree.shown(INFO) });
        }
        let wrong = |source| MediumError::Repository { path: tree.shown(INFO), source };
        for file in rpm::treeinfo::parse(&info).map_err(wrong)? {
            tree.add("", &file, INFO)?;
        }
        tree.elsewhere = read.elsewhere;
        for repository in read.repositories {
            stop.check().map_err(|source| MediumError::Stopped { path: tree.shown(&repository), source })?;
            tree.repository(&repository)?;
        }
        Ok(tree)
    }

    /// Adds what the repository in this folder has.
    fn repository(&mut self, folder: &str) -> Result<(), MediumError> {
        let of = |path: &str| join(folder, path);
        let name = of("repodata/repomd.xml");
        let wanted = self.files.get(&name).map(|wanted| wanted.digest);
        let text = self.head(&name, LARGEST_INFO)?;
        // `.treeinfo` may vouch for it.
        if wanted.is_some_and(|wanted| wanted != Digest::of(text.as_bytes())) {
            return Err(MediumError::Digest { path: self.shown(&name) });
        }
        let shown = self.shown(&name);
        let wrong = |source| MediumError::Repository { path: shown.clone(), source };
        let indices = rpm::repomd::parse(&text).map_err(wrong)?;
        let primary = indices.iter().find(|index| index.kind == "primary").cloned();
        let Index { file: primary, plain_size, .. } =
            primary.ok_or(MetadataError::Unusable("primary")).map_err(wrong)?;
        for index in indices {
            self.add(folder, &index.file, &name)?;
        }
        let packed = self.bytes(&of(&primary.path), LARGEST_INDEX)?;
        let name = of(&primary.path);
        if Digest::of(&packed) != primary.digest {
            return Err(MediumError::Digest { path: self.shown(&name) });
        }
        let shown = self.shown(&name);
        let text = rpm::unpack(&name, packed.as_slice(), plain_size)
            .map_err(|source| MediumError::Open { path: shown.clone(), source })?;
        let wrong = |source| MediumError::Repository { path: shown.clone(), source };
        for package in rpm::primary::parse(text).map_err(wrong)? {
            self.add(folder, &package.file, &name)?;
        }
        Ok(())
    }

    /// Takes a file that is believed; its text.
    fn head(&mut self, path: &str, limit: u64) -> Result<String, MediumError> {
        let bytes = self.bytes(path, limit)?;
        let digest = Digest::of(&bytes);
        self.heads.push(Artifact { name: format!("{FOLDER}:{path}"), sha256: digest.to_string() });
        self.files.insert(path.to_owned(), wanted(path, digest, Some(bytes.len() as u64)));
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn bytes(&self, path: &str, limit: u64) -> Result<Vec<u8>, MediumError> {
        let mut bytes = Vec::new();
        let file = self.folder.file(Path::new(path))?;
        file.take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| MediumError::Open { path: self.shown(path), source })?;
        if bytes.len() as u64 > limit {
            return Err(MediumError::TooLarge { path: self.shown(path), limit });
        }
        Ok(bytes)
    }

    fn add(&mut self, folder: &str, file: &File, named_by: &str) -> Result<(), MediumError> {
        let path = join(folder, &file.path);
        if !is_inside(&path) {
            let source = treeinfo::TreeinfoError::Outside { path };
            return Err(MediumError::Treeinfo { path: self.shown(named_by), source });
        }
        let wanted = wanted(&path, file.digest, file.size);
        self.files.entry(path).or_insert(wanted);
        Ok(())
    }

    fn shown(&self, path: &str) -> PathBuf {
        self.folder.shown(Path::new(path))
    }
}

fn join(folder: &str, path: &str) -> String {
    if folder.is_empty() { path.to_owned() } else { format!("{folder}/{path}") }
}

fn wanted(path: &str, digest: Digest, size: Option<u64>) -> Wanted {
    Wanted { name: path.to_owned(), urls: Vec::new(), size, digest }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A tree of one package; what follows `files` is put at the end of `.treeinfo`.
    fn tree(package: &str, more: &str) -> (tempfile::TempDir, Result<ReleaseTree, MediumError>) {
        let folder = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"x");
        let primary = format!(
            "<metadata><package type=\"rpm\"><name>a</name><arch>noarch</arch><checksum type=\"sha256\">{digest}</checksum><size package=\"1\"/><location href=\"{package}\"/></package></metadata>"
        );
        let repomd = format!(
            "<repomd><data type=\"primary\"><checksum type=\"sha256\">{}</checksum><location href=\"repodata/primary.xml\"/></data></repomd>",
            Digest::of(primary.as_bytes())
        );
        let info = format!(
            "[images-x86_64]\nkernel = k\ninitrd = i\n[stage2]\nmainimage = s\n[checksums]\nk = sha256:{digest}\ni = sha256:{digest}\ns = sha256:{digest}\n{more}"
        );
        fs::create_dir(folder.path().join("repodata")).unwrap();
        fs::write(folder.path().join("repodata/primary.xml"), primary).unwrap();
        fs::write(folder.path().join("repodata/repomd.xml"), repomd).unwrap();
        fs::write(folder.path().join(".treeinfo"), info).unwrap();
        let beside = Beside::of(&folder.path().join("recipe.toml")).unwrap();
        let read = ReleaseTree::read(beside, &Stop::default());
        (folder, read)
    }

    #[test]
    fn what_a_tree_vouches_for_is_offered_and_nothing_else() {
        let (_folder, read) = tree("Packages/a.rpm", "");
        let read = read.unwrap();
        let heads: Vec<&str> = read.heads.iter().map(|head| head.name.as_str()).collect();
        assert_eq!(heads, ["tree:.treeinfo", "tree:repodata/repomd.xml"]);
        for path in [".treeinfo", "s", "repodata/repomd.xml", "repodata/primary.xml", "Packages/a.rpm"] {
            assert!(read.find(&format!("/tree/{path}")).is_some(), "{path}");
        }
        for path in ["/tree/b.rpm", "/tree/", "/Packages/a.rpm", "/tree/../tree/s"] {
            assert!(read.find(path).is_none(), "{path}");
        }
    }

    #[test]
    fn a_tree_that_contradicts_itself_or_leads_out_of_itself_is_refused() {
        let other = format!("repodata/repomd.xml = sha256:{}\n", Digest::of(b"other"));
        assert!(matches!(tree("a.rpm", &other).1, Err(MediumError::Digest { .. })));
        assert!(matches!(tree("../a.rpm", "").1, Err(MediumError::Treeinfo { .. })));
        let (folder, read) = tree("a.rpm", "");
        assert!(read.is_ok());
        fs::write(folder.path().join("repodata/primary.xml"), "<metadata/>").unwrap();
        let beside = Beside::of(&folder.path().join("recipe.toml")).unwrap();
        let read = ReleaseTree::read(beside, &Stop::default());
        assert!(matches!(read, Err(MediumError::Digest { .. })));
        // Packages alone boot nothing.
        let info = fs::read_to_string(folder.path().join(".treeinfo")).unwrap();
        fs::write(folder.path().join(".treeinfo"), info.replace("[stage2]", "[stage3]")).unwrap();
        let beside = Beside::of(&folder.path().join("recipe.toml")).unwrap();
        let error = ReleaseTree::read(beside, &Stop::default()).unwrap_err().to_string();
        assert!(error.contains("names no stage2"), "{error}");
    }
}
