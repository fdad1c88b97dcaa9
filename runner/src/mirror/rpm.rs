//! What of a release tree of Fedora's kind goes into a mirror.

use std::collections::HashSet;
use std::io::BufRead;
use std::path::{Path, PathBuf};

use crate::cache::{Digest, FetchError, Fetcher, Metadata, StoreError, Wanted};
use crate::debian::signature::{self, SignatureError};
use crate::event::{Event, Sink, Stage};
use crate::rpm::repomd::Index;
use crate::rpm::{File, MetadataError, filelists, metalink, primary, repomd, treeinfo, unpack};

use super::{Folder, Plan};

const REPOMD: &str = "repodata/repomd.xml";
const SIGNATURE: &str = "repodata/repomd.xml.asc";
/// How many `.treeinfo` files of different days are held against the roots' indices.
const MOST_DAYS: usize = 3;

/// Which part of a tree.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The folder that it gets in the mirror.
    pub name: String,
    /// Roots of equal mirrors, without a slash at the end.
    pub roots: Vec<String>,
    /// The address of a metalink or of a list of mirrors, which name more roots.
    pub mirror_list: Option<String>,
    /// The keyring of who signs `repomd.xml`.
    pub keyring: Option<PathBuf>,
    /// Architectures of packages, beside `noarch`; none means all.
    pub architectures: Vec<String>,
    /// Only these packages and what they need; none means all.
    pub packages: Vec<String>,
    /// The images that `.treeinfo` names.
    pub images: bool,
}

/// Why a mirror cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A file cannot be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file cannot be used.
    #[error("cannot use {name}")]
    Metadata {
        /// The file.
        name: String,
        /// Why.
        #[source]
        source: MetadataError,
    },
    /// A file is not trusted.
    #[error("cannot trust {REPOMD}")]
    Signature(#[from] SignatureError),
    /// An index cannot be unpacked.
    #[error("cannot unpack {name}: the tree is damaged, tell its maintainers")]
    Unpack {
        /// The file.
        name: String,
        /// What the decoder said.
        #[source]
        source: std::io::Error,
    },
    /// There is no such package.
    #[error("the tree has no package {0}: check --packages and --architecture")]
    NoPackage(String),
    /// Nobody says where it can be had.
    #[error("no address of the tree is known: give --source or --mirror-list")]
    NoRoot,
    /// The tree's own two lists do not agree.
    #[error(
        ".treeinfo says that {REPOMD} is another file than the one that is there: is the mirror just being updated?"
    )]
    Torn,
}

impl PlanError {
    /// Whether a root is to blame, and not this host or the one who waits.
    fn is_of_the_tree(&self) -> bool {
        match self {
            Self::Metadata { .. } | Self::Torn | Self::Signature(SignatureError::Distrusted(_)) => true,
            // The signature of a file that is there.
            Self::Fetch(error) => !matches!(error, FetchError::Stopped { .. } | FetchError::Store { .. }),
            _ => false,
        }
    }
}

/// Reads the tree's metadata and tells which of its files the mirror is to have. Blocks for the network.
///
/// # Errors
/// Something cannot be had, trusted or understood.
pub fn plan(wish: &Wish, fetcher: &Fetcher, sink: &dyn Sink) -> Result<Plan, PlanError> {
    let tell = |doing: &str| {
        sink.event(Event::Progress { stage: Stage::Select, doing: doing.to_owned(), bytes: 0, total: None });
    };
    let reader = Reader { fetcher, wish };
    let mut roots = wish.roots.clone();
    let mut vouched = None;
    if let Some(address) = &wish.mirror_list {
        tell("mirrors");
        let text = reader.text(&fetcher.metadata(address, std::slice::from_ref(address))?);
        if text.trim_start().starts_with('<') {
            if !address.starts_with("https://") && wish.keyring.is_none() {
                sink.event(Event::Warning(format!(
                    "nothing vouches for the metalink {address}, which is not https, and so for nothing of {}: give its https address, or --keyring",
                    wish.name
                )));
            }
            let found = metalink::parse(&text).map_err(|source| unusable(address, source))?;
            roots.extend(found.mirrors);
            vouched = Some(found.repomd);
        } else {
            roots.extend(metalink::mirror_list(&text));
        }
    }
    if roots.is_empty() {
        return Err(PlanError::NoRoot);
    }
    let roots = fetcher.with_mirrors(roots);
    let mut plan = Plan::default();

    tell(REPOMD);
    let by_link_only = vouched.is_none() && wish.keyring.is_none();
    let Heads { treeinfo, images, bytes, repomd, signature } = reader.heads(&roots, vouched.as_ref())?;
    if wish.images && !images.is_empty() {
        sink.event(Event::Warning(format!(
            "nothing vouches for the images of {} but the link to its mirror: no signature covers .treeinfo, which names their digests",
            wish.name
        )));
    }
    if by_link_only {
        sink.event(Event::Warning(format!(
            "nothing vouches for {REPOMD} of {} but the link to its mirror: give --keyring, or a metalink as --mirror-list",
            wish.name
        )));
    }
    for file in treeinfo.iter().chain(&signature).chain([&repomd]) {
        plan.files.push((format!("{}/{}", wish.name, file.path), wanted(file, &roots)));
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let indices = repomd::parse(&text).map_err(|source| unusable(REPOMD, source))?;
    let primary = indices.iter().find(|index| index.kind == "primary");
    let primary = primary.ok_or_else(|| unusable(REPOMD, MetadataError::Unusable("primary")))?;
    tell(&primary.file.path);
    let text = reader.index(primary, &roots)?;
    let mut packages = primary::parse(text).map_err(|source| unusable(&primary.file.path, source))?;
    packages.retain(|package| {
        wish.architectures.is_empty()
            || package.architecture == "noarch"
            || wish.architectures.contains(&package.architecture)
    });
    if !wish.packages.is_empty() {
        let paths = filelists::missing(&packages);
        if let (false, Some(lists)) =
            (paths.is_empty(), indices.iter().find(|index| index.kind == "filelists"))
        {
            tell(&lists.file.path);
            let text = reader.index(lists, &roots)?;
            filelists::provide(&mut packages, &paths, text)
                .map_err(|source| unusable(&lists.file.path, source))?;
        }
        let kept = primary::closure(&packages, &wish.packages).map_err(PlanError::NoPackage)?;
        packages = kept.into_iter().map(|place| packages[place].clone()).collect();
    }

    let mut seen: HashSet<String> = [REPOMD.to_owned()].into();
    let files = indices.into_iter().map(|index| index.file);
    let files = files.chain(packages.into_iter().map(|package| package.file));
    for file in files.chain(images.into_iter().filter(|_| wish.images)) {
        if seen.insert(file.path.clone()) {
            plan.files.push((format!("{}/{}", wish.name, file.path), wanted(&file, &roots)));
        }
    }
    fetcher.tell_news(sink);
    plan.folders
        .push((wish.name.clone(), Folder { upstreams: roots, about: "release tree of rpms".to_owned() }));
    Ok(plan)
}

/// Reads files that nothing vouches for yet, from whichever root has one that can be used.
struct Reader<'a> {
    fetcher: &'a Fetcher,
    wish: &'a Wish,
}

/// What all else of a tree hangs from.
struct Heads {
    treeinfo: Option<File>,
    /// What `.treeinfo` names.
    images: Vec<File>,
    /// Those of `repomd.xml`.
    bytes: Vec<u8>,
    repomd: File,
    signature: Option<File>,
}

impl Reader<'_> {
    /// `.treeinfo` and `repomd.xml` of one day: the roots may have them of different ones.
    fn heads(&self, roots: &[String], vouched: Option<&File>) -> Result<Heads, PlanError> {
        let mut left = roots.to_vec();
        for _ in 0..MOST_DAYS {
            let (images, treeinfo, root) = match self.treeinfo(&left, vouched) {
                Ok((images, file, root)) => (images, Some(file), root),
                // A repository that is no release tree has none.
                Err(PlanError::Fetch(error)) if left.len() == roots.len() && error.refusal().is_some() => {
                    (Vec::new(), None, String::new())
                }
                Err(PlanError::Fetch(error)) if left.len() < roots.len() && error.is_of_upstreams() => {
                    return Err(PlanError::Torn);
                }
                Err(error) => return Err(error),
            };
            let (bytes, repomd, signature) = match (vouched, self.wish.keyring.as_deref()) {
                (Some(file), keyring) => {
                    let bytes = self.fetcher.fetch(&wanted(file, roots))?;
                    let signature = keyring.map(|keyring| self.signature(&bytes, keyring, roots));
                    (bytes, file.clone(), signature.transpose()?)
                }
                (None, _) => match self.repomd(roots, &images) {
                    Err(PlanError::Torn) if left.len() > 1 => {
                        left.retain(|other| *other != root);
                        continue;
                    }
                    repomd => repomd?,
                },
            };
            return Ok(Heads { treeinfo, images, bytes, repomd, signature });
        }
        Err(PlanError::Torn)
    }

    /// `.treeinfo`, what it names, and the root that has it.
    fn treeinfo(
        &self,
        roots: &[String],
        vouched: Option<&File>,
    ) -> Result<(Vec<File>, File, String), PlanError> {
        let check = |answer: &Metadata| {
            let images =
                treeinfo::parse(&self.text(answer)).map_err(|source| unusable(".treeinfo", source))?;
            vouched.map_or(Ok(()), |file| agree(&images, file.digest))?;
            Ok(images)
        };
        let (answer, images) = self.usable(".treeinfo", roots, check)?;
        let root = answer.url().strip_suffix("/.treeinfo").unwrap_or_default().to_owned();
        Ok((images, self.keep(".treeinfo", &answer)?, root))
    }

    /// The tree's first index, and its signature where one is asked for: of the same root, as others may have
    /// another day's. It is the one that `images` have, if they have one.
    fn repomd(&self, roots: &[String], images: &[File]) -> Result<(Vec<u8>, File, Option<File>), PlanError> {
        let check = |answer: &Metadata| {
            repomd::parse(&self.text(answer)).map_err(|source| unusable(REPOMD, source))?;
            agree(images, Digest::of(&answer.bytes))?;
            match (&self.wish.keyring, answer.url().strip_suffix(&format!("/{REPOMD}"))) {
                (Some(keyring), Some(root)) => {
                    self.signature(&answer.bytes, keyring, &[root.to_owned()]).map(Some)
                }
                _ => Ok(None),
            }
        };
        let (answer, signature) = self.usable(REPOMD, roots, check)?;
        let file = self.keep(REPOMD, &answer)?;
        Ok((answer.bytes, file, signature))
    }

    /// The signature of the tree's first index.
    fn signature(&self, index: &[u8], keyring: &Path, roots: &[String]) -> Result<File, PlanError> {
        let check = |answer: &Metadata| {
            let scratch = self.fetcher.cache().scratch()?;
            let stop = self.fetcher.stop();
            Ok(signature::verify_detached(index, &answer.bytes, keyring, scratch.path(), stop)?)
        };
        let (answer, ()) = self.usable(SIGNATURE, roots, check)?;
        self.keep(SIGNATURE, &answer)
    }

    fn usable<T>(
        &self,
        path: &str,
        roots: &[String],
        check: impl FnMut(&Metadata) -> Result<T, PlanError>,
    ) -> Result<(Metadata, T), PlanError> {
        let urls: Vec<String> = roots.iter().map(|root| format!("{root}/{path}")).collect();
        self.fetcher.usable_metadata(path, &urls, check, PlanError::is_of_the_tree)
    }

    /// Keeps a file as it is now; it is in the store then.
    fn keep(&self, path: &str, answer: &Metadata) -> Result<File, PlanError> {
        let digest = self.fetcher.keep(answer, &format!("tree {:?} {path:?}", self.wish.name))?;
        let size = Some(answer.bytes.len() as u64);
        Ok(File { path: path.to_owned(), digest, size })
    }

    /// The text of an index that `repomd.xml` names.
    fn index(&self, index: &Index, roots: &[String]) -> Result<Box<dyn BufRead>, PlanError> {
        let file = self.fetcher.open(&wanted(&index.file, roots))?;
        let name = || index.file.path.clone();
        unpack(&name(), file, index.plain_size).map_err(|source| PlanError::Unpack { name: name(), source })
    }

    fn text(&self, answer: &Metadata) -> String {
        String::from_utf8_lossy(&answer.bytes).into_owned()
    }
}

/// Does `.treeinfo` speak of this `repomd.xml`, if it speaks of one?
fn agree(images: &[File], repomd: Digest) -> Result<(), PlanError> {
    match images.iter().any(|image| image.path == REPOMD && image.digest != repomd) {
        true => Err(PlanError::Torn),
        false => Ok(()),
    }
}

fn unusable(name: &str, source: MetadataError) -> PlanError {
    PlanError::Metadata { name: name.to_owned(), source }
}

fn wanted(file: &File, roots: &[String]) -> Wanted {
    Wanted {
        name: file.path.clone(),
        urls: roots.iter().map(|root| format!("{root}/{}", file.path)).collect(),
        size: file.size,
        digest: file.digest,
    }
}
