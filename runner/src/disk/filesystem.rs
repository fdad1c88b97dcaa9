//! The root file system: made from a tree by an ordinary user, with the right owners.
//!
//! `mke2fs -d` records the owners and modes that files have on the host. What must differ (all
//! owners, setuid bits, unreadable files) is corrected in the finished file system by `debugfs`, which
//! takes about 30 µs for a field; a user namespace would save that second and is not allowed
//! everywhere. `e2fsck` has the last word. debugfs ends with 0 whatever happens (e2fsprogs 1.47), so
//! that its standard error decides.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::child::{HostTool, Tool, ToolError};
use crate::stop::Stop;

use super::layout::{Kind, Layout};
use super::partition::Partition;
use super::tree::mode_on_disk;

const MKE2FS: HostTool = HostTool { name: "mke2fs", package: "e2fsprogs" };
const DEBUGFS: HostTool = HostTool { name: "debugfs", package: "e2fsprogs" };
const E2FSCK: HostTool = HostTool { name: "e2fsck", package: "e2fsprogs" };

/// Slow disks write some MB/s.
const LIMIT: Duration = Duration::from_secs(300);

/// Bytes of the unit in which sizes are given to mke2fs.
const KIBIBYTE: u64 = 1024;

/// The features are named one by one: what the host's mke2fs would choose may be too new for the
/// image's own GRUB and kernel.
const CONFIGURATION: &str = "[defaults]
base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
default_mntopts = acl,user_xattr
enable_periodic_fsck = 0
blocksize = 4096
inode_size = 256
inode_ratio = 16384
[fs_types]
ext4 = {
features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
}
small = {
inode_ratio = 8192
}
floppy = {
inode_ratio = 8192
}
big = {
}
huge = {
}
";

/// Why there is no file system.
#[derive(Debug, thiserror::Error)]
pub enum FilesystemError {
    /// A tool fails.
    #[error("cannot make the file system: does the image have room for all packages?")]
    Tool(#[from] ToolError),
    /// The check finds something.
    #[error("the finished file system does not pass its check")]
    Check {
        /// What the checker said.
        #[source]
        source: ToolError,
    },
    /// A file beside the image cannot be written.
    #[error("cannot write {}: check the space of its disk", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// What a file system is made of.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The files.
    pub tree: &'a Path,
    /// Their owners and modes.
    pub layout: &'a Layout,
    /// Extended attributes that no user may set on the host: path, name and value.
    pub attributes: &'a [(String, String, Vec<u8>)],
    /// The time that everything is to have happened at, in seconds since 1970: the same files make the same
    /// bytes then.
    pub time: Option<u64>,
}

/// Makes a file system with this UUID in the partition of the disk `image`. Files for the tools are left in
/// `scratch`.
///
/// # Errors
/// A tool fails, or the result is not sound.
pub fn make(
    (image, partition): (&Path, Partition),
    uuid: &str,
    sources: Sources<'_>,
    scratch: &Path,
    stop: &Stop,
) -> Result<(), FilesystemError> {
    let write = |path: &Path, text: &str| {
        std::fs::write(path, text).map_err(|source| FilesystemError::Write { path: path.to_owned(), source })
    };
    let configuration = scratch.join("mke2fs.conf");
    write(&configuration, CONFIGURATION)?;
    // The inode tables of a fresh sparse file are zero already; saying so spares the guest the work.
    let mut extended = format!("offset={},root_owner=0:0,lazy_itable_init=0", partition.offset);
    if sources.time.is_some() {
        extended.push_str(&format!(",hash_seed={uuid}"));
    }
    // e2fsprogs' own name for what others call SOURCE_DATE_EPOCH (e2fsprogs 1.47.0, lib/ext2fs/initialize.c).
    let at_its_time = |tool: Tool| match sources.time {
        Some(time) => tool.variable("E2FSPROGS_FAKE_TIME", time.to_string()),
        None => tool,
    };
    let make = at_its_time(MKE2FS.find()?)
        .arguments(["-q", "-F", "-t", "ext4", "-L", "root", "-U", uuid, "-E", &extended, "-d"])
        .arguments([sources.tree, image])
        // A bare number means kibibytes, whatever the size of a block (mke2fs(8)).
        .argument(format!("{}k", partition.length / KIBIBYTE))
        .variable("MKE2FS_CONFIG", configuration);
    make.run(LIMIT, stop)?.success()?;

    let commands = scratch.join("owners.debugfs");
    let mut text = corrections(sources.layout, sources.time);
    for (number, (path, name, value)) in sources.attributes.iter().enumerate() {
        let file = scratch.join(format!("attribute-{number}"));
        let written = std::fs::write(&file, value);
        written.map_err(|source| FilesystemError::Write { path: file.clone(), source })?;
        text.push_str(&format!("ea_set -f \"{}\" \"/{}\" {name}\n", file.display(), quoted(path)));
    }
    write(&commands, &text)?;
    let place = at(image, partition);
    let correct = at_its_time(DEBUGFS.find()?).arguments(["-w", "-f"]).argument(commands).argument(&place);
    let finished = correct.run(LIMIT, stop)?.success()?;
    let complaint = |line: &&str| !line.is_empty() && !line.starts_with("debugfs ");
    if finished.stderr.lines().any(|line| complaint(&line)) {
        return Err(finished.failure().into());
    }

    let check = E2FSCK.find()?.argument("-fn").argument(place).run(LIMIT, stop)?;
    check.success().map_err(|source| FilesystemError::Check { source })?;
    Ok(())
}

/// How e2fsprogs names a file system inside of a disk.
#[must_use]
pub fn at(image: &Path, partition: Partition) -> OsString {
    let mut place = image.as_os_str().to_owned();
    place.push(format!("?offset={}", partition.offset));
    place
}

fn quoted(path: &str) -> String {
    path.replace('"', "\"\"")
}

/// The commands for debugfs that give every path its owner and mode; and one time, where there is one, to all that
/// the host's own files would tell of when they were made.
#[must_use]
pub fn corrections(layout: &Layout, time: Option<u64>) -> String {
    let mut text = String::new();
    for (path, node) in layout.nodes() {
        let attributes = node.attributes;
        let (kind, on_disk) = match node.kind {
            Kind::Directory if path.is_empty() => (0o040_000, 0),
            Kind::Directory => (0o040_000, 0o755),
            Kind::File => (0o100_000, mode_on_disk(attributes.mode)),
            Kind::Symlink(_) => (0o120_000, attributes.mode),
            // It shares the inode of the path that comes first.
            Kind::HardLink(_) => continue,
        };
        let quoted = quoted(path);
        text.push_str(&format!("sif \"/{quoted}\" uid {}\n", attributes.uid));
        text.push_str(&format!("sif \"/{quoted}\" gid {}\n", attributes.gid));
        if attributes.mode != on_disk {
            let mode = kind | attributes.mode;
            text.push_str(&format!("sif \"/{quoted}\" mode 0{mode:o}\n"));
        }
        for field in time.iter().flat_map(|_| ["atime", "ctime", "crtime"]) {
            text.push_str(&format!("sif \"/{quoted}\" {field} @{}\n", time.unwrap_or(0)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::layout::Attributes;
    use super::*;

    #[test]
    fn owners_for_all_and_modes_where_they_differ() {
        let mut layout = Layout::default();
        let attributes = |gid, mode| Attributes { uid: 0, gid, mode, modified: 0 };
        for (path, kind, attributes) in [
            ("", Kind::Directory, attributes(0, 0o755)),
            ("tmp", Kind::Directory, attributes(0, 0o1777)),
            ("a\"b", Kind::File, attributes(42, 0o2755)),
            ("plain", Kind::File, attributes(0, 0o644)),
            ("second", Kind::HardLink("plain".to_owned()), attributes(0, 0o644)),
        ] {
            layout.admit(path, kind, attributes, 1, |_, _| false).expect("admitted");
        }
        assert_eq!(
            corrections(&layout, None),
            "sif \"/\" uid 0\nsif \"/\" gid 0\nsif \"/\" mode 040755\nsif \"/a\"\"b\" uid 0\nsif \"/a\"\"b\" gid 42\nsif \"/a\"\"b\" mode 0102755\nsif \"/plain\" uid 0\nsif \"/plain\" gid 0\nsif \"/tmp\" uid 0\nsif \"/tmp\" gid 0\nsif \"/tmp\" mode 041777\n"
        );
    }
}
