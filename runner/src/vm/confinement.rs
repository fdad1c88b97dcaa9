//! What the machine's process may touch, first as data, then applied.
//!
//! [`Confinement::of`] says it for a machine, purely but for the headers of disks, which tell what an
//! overlay lies on; [`Confinement::apply`] has the kernel enforce it, in the process that becomes qemu.
//! Landlock lets it read the programs that it consists of and what it boots, write its disks, and connect to
//! the mirror: no directory is writable, and nothing of the user's is readable. Limits bound what a process
//! that a guest took over could still use up. Beside that there are namespaces, capabilities and qemu's own
//! system call filter; see [`super::shim`] and [`super::argv`].
//!
//! What this kernel cannot enforce is told by [`Enforced`], never silently left out.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::argv::{Attachment, Boot, Disk, DiskFormat, MIRROR_PORT, Network, VmSpec};

/// What is asked of Landlock: what Linux 6.15 can. Older kernels enforce less of it, and say so.
const WANTED: ABI = ABI::V7;
/// Programs, libraries and qemu's own files, wherever a distribution has them.
const SYSTEM: [&str; 11] = [
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/nix/store",
    "/gnu/store",
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/qemu",
    "/sys/devices/system",
    "/sys/kernel/mm",
];
/// Devices; those that do not exist are no harm.
const DEVICES: [&str; 5] = ["/dev/kvm", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"];
/// How much address space qemu may have beside the guest's memory, in bytes: its translated code, its
/// libraries, and a stack and a heap for each thread.
const ADDRESS_SPACE: u64 = 8 << 30;
/// How many files it may have open.
const OPEN_FILES: u64 = 512;
/// How much longer than its disk a disk's file may be, in bytes: an image's tables and snapshots.
const FILE_SURPLUS: u64 = 256 << 20;
/// How many overlays may lie on one another.
const LONGEST_CHAIN: usize = 16;

/// What a process may touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// Files, and trees, that it may read and execute.
    reads: Vec<Name>,
    /// Files that it may read and write.
    writes: Vec<Name>,
    /// Devices that it may use.
    devices: Vec<Name>,
    /// The TCP port that it may connect to.
    connects: Option<u16>,
    /// The longest file that it may write, in bytes.
    file_size: u64,
    /// The most address space, in bytes.
    address_space: u64,
}

/// A path as bytes: it need not be text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Name(Vec<u8>);

impl From<&Path> for Name {
    fn from(path: &Path) -> Self {
        Self(path.as_os_str().as_bytes().to_vec())
    }
}

impl Name {
    fn path(&self) -> PathBuf {
        OsString::from_vec(self.0.clone()).into()
    }
}

/// How much of it the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Enforced {
    /// All of it.
    Fully,
    /// Less than was asked: the kernel is older.
    Partly,
    /// Nothing: the kernel has no Landlock, or it is switched off.
    NotAtAll,
}

impl Confinement {
    /// What the process that runs `program` as this machine may touch.
    #[must_use]
    pub fn of(spec: &VmSpec, program: &Path) -> Self {
        let mut reads: Vec<Name> = SYSTEM.iter().map(|path| Name::from(Path::new(path))).collect();
        reads.extend(own_files(program).iter().map(|path| Name::from(path.as_path())));
        if let Boot::Kernel { kernel, initramfs, .. } = &spec.boot {
            reads.extend([Name::from(kernel.as_path()), Name::from(initramfs.as_path())]);
        }
        let is_disc = |disk: &&Disk| disk.attachment == Attachment::Disc;
        let (discs, disks): (Vec<&Disk>, Vec<&Disk>) = spec.disks.iter().partition(is_disc);
        reads.extend(discs.iter().map(|disc| Name::from(disc.path.as_path())));
        let mut longest = 0;
        for disk in &disks {
            let (size, below) = look(disk);
            longest = longest.max(size);
            reads.extend(below.iter().map(|path| Name::from(path.as_path())));
        }
        Self {
            reads,
            writes: disks.iter().map(|disk| Name::from(disk.path.as_path())).collect(),
            devices: DEVICES.iter().map(|path| Name::from(Path::new(path))).collect(),
            connects: (spec.network == Network::Mirror).then_some(MIRROR_PORT),
            file_size: longest.saturating_add(FILE_SURPLUS),
            address_space: spec.memory_mib.saturating_mul(1 << 20).saturating_add(ADDRESS_SPACE),
        }
    }

    /// The disks that may be written.
    pub fn writes(&self) -> impl Iterator<Item = PathBuf> {
        self.writes.iter().map(Name::path)
    }

    /// Has the kernel enforce it for this process and all that come from it, for good.
    ///
    /// # Errors
    /// When the kernel refuses something that it can enforce.
    pub(super) fn apply(&self) -> io::Result<Enforced> {
        let limit =
            |resource, most: u64| setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
        // A dump of a guest's memory is nobody's business.
        limit(Resource::Core, 0)?;
        limit(Resource::Nofile, OPEN_FILES)?;
        limit(Resource::Fsize, self.file_size)?;
        limit(Resource::As, self.address_space)?;
        self.restrict().map_err(io::Error::other)
    }

    fn restrict(&self) -> Result<Enforced, RulesetError> {
        let read: BitFlags<AccessFs> = AccessFs::from_read(WANTED);
        let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
        let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        let mut rules = Ruleset::default()
            .handle_access(AccessFs::from_all(WANTED))?
            .handle_access(AccessNet::BindTcp | AccessNet::ConnectTcp)?
            .scope(Scope::from_all(WANTED))?
            .create()?;
        for (names, access) in [(&self.reads, read), (&self.writes, write), (&self.devices, device)] {
            for name in names {
                // What is not there needs no permission.
                let Ok(file) = PathFd::new(name.path()) else { continue };
                let is_file = !name.path().is_dir();
                let access = if is_file { access & AccessFs::from_file(WANTED) } else { access };
                rules = rules.add_rule(PathBeneath::new(file, access))?;
            }
        }
        if let Some(port) = self.connects {
            rules = rules.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
        }
        Ok(match rules.restrict_self()?.ruleset {
            RulesetStatus::FullyEnforced => Enforced::Fully,
            RulesetStatus::PartiallyEnforced => Enforced::Partly,
            RulesetStatus::NotEnforced => Enforced::NotAtAll,
        })
    }
}

/// A program, and where it has its firmware, modules and libraries when it was installed in a tree of its own,
/// such as `/opt/qemu` for `/opt/qemu/bin/qemu-system-x86_64`. Not the tree itself, which may be a home.
fn own_files(program: &Path) -> Vec<PathBuf> {
    let real = std::fs::canonicalize(program).unwrap_or_else(|_| program.to_owned());
    let tree =
        real.parent().and_then(Path::parent).filter(|tree| *tree != Path::new("/")).map(Path::to_owned);
    let places = ["share/qemu", "share/seabios", "lib", "lib64", "libexec"];
    let in_tree = tree.iter().flat_map(|tree| places.iter().map(|place| tree.join(place)));
    std::iter::once(real.clone()).chain(in_tree).collect()
}

/// How large a disk is, in bytes, and the files that it lies on, if it is an overlay.
fn look(disk: &Disk) -> (u64, Vec<PathBuf>) {
    let length = std::fs::metadata(&disk.path).map_or(0, |data| data.len());
    if disk.format == DiskFormat::Raw {
        return (length, Vec::new());
    }
    let mut below: Vec<PathBuf> = Vec::new();
    let mut size = length;
    let mut path = disk.path.clone();
    while below.len() < LONGEST_CHAIN
        && let Some(header) = read_header(&path)
    {
        size = size.max(header.size);
        let Some(name) = header.backing else { break };
        // As qemu reads it: next to the file that names it (qemu-img(1), create).
        path = path.parent().unwrap_or(Path::new(".")).join(name);
        below.push(path.clone());
    }
    (size, below)
}

/// What a qcow2 file's header says.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    size: u64,
    /// The file behind it.
    backing: Option<PathBuf>,
    /// Its data is in another file.
    has_data_file: bool,
}

/// The other files that a machine's disks name. qemu may write their headers, so whoever took it over could
/// have them name any of the user's files, which the next reader of the disk would open.
pub(super) fn named_by(disks: &[Disk]) -> Vec<Option<(Option<PathBuf>, bool)>> {
    let overlays = disks.iter().filter(|disk| disk.format == DiskFormat::Qcow2);
    overlays
        .map(|disk| read_header(&disk.path).map(|header| (header.backing, header.has_data_file)))
        .collect()
}

fn read_header(path: &Path) -> Option<Header> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(8192).read_to_end(&mut bytes).ok()?;
    parse_header(&bytes)
}

/// docs/interop/qcow2.txt of qemu: magic, version, then where the backing file's name is and how long it
/// is, then the disk's size; all big endian.
fn parse_header(bytes: &[u8]) -> Option<Header> {
    let number = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes);
    if !bytes.starts_with(b"QFI\xfb") {
        return None;
    }
    let (at, size) = (number(8)?, number(24)?);
    let length = bytes.get(16..20)?.try_into().ok().map(u32::from_be_bytes)?;
    let backing = if at == 0 {
        None
    } else {
        let at = usize::try_from(at).ok()?;
        let name = bytes.get(at..at.checked_add(usize::try_from(length).ok()?)?)?;
        Some(OsString::from_vec(name.to_vec()).into())
    };
    // Version 3 tells it among what a reader has to know.
    let is_new = bytes.get(4..8)? != [0, 0, 0, 2];
    let has_data_file = is_new && number(72)? & 4 != 0;
    Some(Header { size, backing, has_data_file })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::argv::{Accelerator, CONTROL_PORT};

    fn spec(disks: Vec<Disk>, network: Network) -> VmSpec {
        VmSpec {
            accelerator: Accelerator::Tcg,
            processors: 1,
            memory_mib: 256,
            boot: Boot::Disk,
            disks,
            network,
            port_name: CONTROL_PORT,
            log_port: None,
            smbios_serial: None,
        }
    }

    fn qcow2(size: u64, backing: &str) -> Vec<u8> {
        let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
        bytes.extend(if backing.is_empty() { 0_u64 } else { 512 }.to_be_bytes());
        bytes.extend(u32::try_from(backing.len()).unwrap().to_be_bytes());
        bytes.extend(16_u32.to_be_bytes());
        bytes.extend(size.to_be_bytes());
        bytes.resize(512, 0);
        bytes.extend(backing.as_bytes());
        bytes
    }

    #[test]
    fn only_disks_are_writable_and_what_an_overlay_lies_on_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("cache")).unwrap();
        std::fs::write(at("top.qcow2"), qcow2(7 << 20, "cache/middle.qcow2")).unwrap();
        std::fs::write(at("cache/middle.qcow2"), qcow2(7 << 20, "base.raw")).unwrap();
        std::fs::write(at("cache/base.raw"), "raw").unwrap();
        let disk = Disk::new(at("top.qcow2"), DiskFormat::Qcow2);
        let disc = Disk::disc(at("disc.iso"));
        let confinement = Confinement::of(&spec(vec![disk, disc], Network::None), Path::new("/usr/bin/true"));
        assert_eq!(confinement.writes().collect::<Vec<_>>(), [at("top.qcow2")]);
        for name in ["cache/middle.qcow2", "cache/base.raw", "disc.iso"] {
            assert!(confinement.reads.contains(&Name::from(at(name).as_path())), "{name}");
        }
        assert_eq!(confinement.file_size, (7 << 20) + FILE_SURPLUS);
        assert_eq!(confinement.connects, None);
    }

    #[test]
    fn the_mirror_is_the_only_port() {
        let confinement = Confinement::of(&spec(Vec::new(), Network::Mirror), Path::new("/usr/bin/true"));
        assert_eq!(confinement.connects, Some(MIRROR_PORT));
    }

    #[test]
    fn a_disk_that_comes_to_name_another_file_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("overlay");
        std::fs::write(&path, qcow2(5, "base")).unwrap();
        let disks = [Disk::new(path.clone(), DiskFormat::Qcow2)];
        let before = named_by(&disks);
        assert_eq!(before, [Some((Some(PathBuf::from("base")), false))]);
        let mut changed = qcow2(5, "/home/me/.ssh/id_rsa");
        std::fs::write(&path, &changed).unwrap();
        assert_ne!(named_by(&disks), before);
        changed = qcow2(5, "base");
        changed[79] = 4;
        std::fs::write(&path, &changed).unwrap();
        assert_ne!(named_by(&disks), before);
    }

    #[test]
    fn a_header_that_lies_is_none() {
        assert_eq!(parse_header(b"QFI\xfb"), None);
        assert_eq!(parse_header(&[0; 600]), None);
        let mut bytes = qcow2(1, "x");
        bytes[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
        assert_eq!(parse_header(&bytes), None);
        assert_eq!(
            parse_header(&qcow2(5, "")),
            Some(Header { size: 5, backing: None, has_data_file: false })
        );
    }

    #[test]
    fn a_tree_is_never_the_whole_system() {
        let of = |program: &str| own_files(Path::new(program));
        assert_eq!(
            of("/opt/qemu/bin/qemu")[..2],
            [Path::new("/opt/qemu/bin/qemu"), Path::new("/opt/qemu/share/qemu")]
        );
        assert!(!of("/home/me/bin/qemu").contains(&PathBuf::from("/home/me")));
        assert_eq!(of("/qemu"), [Path::new("/qemu")]);
        assert_eq!(of("/nobin/qemu"), [Path::new("/nobin/qemu")]);
    }
}
