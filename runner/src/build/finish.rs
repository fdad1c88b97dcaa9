//! The builder guest: what it boots from, and what it is told to do.
//!
//! The scripts are in `guest/`; this puts them into an initial file system together with the nonce,
//! the settings and the recipe's commands. Pure up to the reading of kernel modules. Deliberately
//! absent: the running of it.

use std::io;
use std::path::{Path, PathBuf};

use crate::vm::argv::{GUEST_GATEWAY, MIRROR_PORT};
use crate::vm::initramfs::Initramfs;
use crate::vm::modules::{self, ModulesError};

/// What a builder guest's kernel needs as modules, where it has not got it built in.
const MODULES: [&str; 10] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "virtio_net",
    "crc32c_generic",
    "ext4",
    "loop",
    "dm_mod",
    "vfat",
];

/// Why the guest's initial file system could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FinishError {
    /// The kernel's modules are no good.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// busybox could not be read.
    #[error("could not read {path}")]
    Busybox {
        /// Where it was expected.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The programs of the builder guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestPrograms<'a> {
    /// A static busybox.
    pub busybox: &'a Path,
    /// The folder with the kernel's modules.
    pub modules: &'a Path,
}

/// What is to be done to the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work<'a> {
    /// The guest's proof.
    pub nonce: &'a str,
    /// Number of the root partition, 1 being the first.
    pub root_partition: u32,
    /// Its file system's UUID.
    pub root_uuid: &'a str,
    /// Packages whose preinst scripts are to run, as dpkg's info files name them, in order.
    pub preinst: &'a [String],
    /// The recipe's commands.
    pub run: &'a [String],
    /// The guest's `sources.list`, when it is to reach the mirror.
    pub sources: Option<&'a str>,
    /// Whether the image gets the unit that proves its boot.
    pub verify: bool,
}

/// The root of the mirror, as the guest's `sources.list` has it.
#[must_use]
pub fn mirror_base() -> String {
    format!("http://{GUEST_GATEWAY}:{MIRROR_PORT}")
}

/// The guest's initial file system.
///
/// # Errors
/// When busybox or a module cannot be read.
pub fn initramfs(programs: GuestPrograms<'_>, work: &Work<'_>) -> Result<Initramfs, FinishError> {
    let busybox = std::fs::read(programs.busybox)
        .map_err(|source| FinishError::Busybox { path: programs.busybox.to_owned(), source })?;
    let mut initramfs = Initramfs::new(busybox, include_str!("guest/init.sh"));
    let mut order = String::new();
    for module in modules::load_ordered(programs.modules, &MODULES)? {
        order.push_str(&format!("{}.ko\n", module.name));
        initramfs.file(&format!("modules/{}.ko", module.name), 0o644, module.bytes);
    }
    initramfs.file("modules/order", 0o644, order);
    add_work(&mut initramfs, work);
    Ok(initramfs)
}

fn add_work(initramfs: &mut Initramfs, work: &Work<'_>) {
    initramfs.file("hostler/nonce", 0o400, format!("{}\n", work.nonce));
    initramfs.file("hostler/settings", 0o400, settings(work));
    for (number, (name, script)) in (10..).zip(steps(work)) {
        initramfs.file(&format!("hostler/steps/{number:04}-{name}"), 0o400, script);
    }
    let files = "hostler/files";
    initramfs.file(&format!("{files}/preinst"), 0o400, lines(work.preinst));
    initramfs.file(
        &format!("{files}/bin/dpkg-maintscript-helper"),
        0o755,
        include_str!("guest/dpkg-maintscript-helper"),
    );
    if let Some(sources) = work.sources {
        initramfs.file(&format!("{files}/sources.list"), 0o644, sources);
        initramfs.file(&format!("{files}/apt.conf"), 0o644, include_str!("guest/apt.conf"));
    }
    if work.verify {
        initramfs.file(&format!("{files}/verify-boot"), 0o755, include_str!("guest/verify-boot"));
        initramfs.file(
            &format!("{files}/hostler-verify.service"),
            0o644,
            include_str!("guest/hostler-verify.service"),
        );
        initramfs.file(
            &format!("{files}/hostler-verify.rules"),
            0o644,
            include_str!("guest/hostler-verify.rules"),
        );
    }
}

fn settings(work: &Work<'_>) -> String {
    let mirror = if work.sources.is_some() { mirror_base() } else { String::new() };
    format!(
        "disk_device=/dev/vda\nroot_device=/dev/vda{}\nroot_uuid={}\nfile_system=ext4\nmirror={}\n",
        work.root_partition,
        quoted(work.root_uuid),
        quoted(&mirror)
    )
}

/// The steps in their order. The recipe's commands come before the initramfs is made, because what
/// they install may belong into it.
fn steps(work: &Work<'_>) -> Vec<(String, String)> {
    let mut steps = vec![
        ("preinst".to_owned(), include_str!("guest/preinst.sh").to_owned()),
        ("configure".to_owned(), include_str!("guest/configure.sh").to_owned()),
    ];
    for (number, command) in (1..).zip(work.run) {
        let script = format!("{}{command}\n", include_str!("guest/run.sh"));
        steps.push((format!("run-{number}"), script));
    }
    if work.verify {
        let script = include_str!("guest/install-verify.sh").to_owned();
        steps.push(("install-verify".to_owned(), script));
    }
    steps.push(("boot".to_owned(), include_str!("guest/boot.sh").to_owned()));
    steps.push(("cleanup".to_owned(), include_str!("guest/cleanup.sh").to_owned()));
    steps
}

fn lines(names: &[String]) -> String {
    names.iter().map(|name| format!("{name}\n")).collect()
}

/// A word for a shell, whatever is in it.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work() -> Work<'static> {
        Work {
            nonce: "5fe7",
            root_partition: 2,
            root_uuid: "1-2",
            preinst: &[],
            run: &[],
            sources: None,
            verify: false,
        }
    }

    fn names(work: &Work<'_>) -> Vec<String> {
        steps(work).into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn the_recipes_commands_come_before_the_initramfs_is_made() {
        let run = ["apt-get install -y less".to_owned(), "true".to_owned()];
        let work = Work { run: &run, verify: true, ..work() };
        assert_eq!(
            names(&work),
            ["preinst", "configure", "run-1", "run-2", "install-verify", "boot", "cleanup"]
        );
        assert!(steps(&work)[2].1.ends_with("\napt-get install -y less\n"));
    }

    #[test]
    fn an_image_that_is_not_verified_gets_no_unit() {
        assert!(!names(&work()).contains(&"install-verify".to_owned()));
    }

    #[test]
    fn without_a_mirror_the_guest_has_no_network() {
        assert!(settings(&work()).contains("mirror=''\n"));
        let with = Work { sources: Some("deb x"), ..work() };
        assert!(settings(&with).contains("mirror='http://10.0.2.2:8080'\n"));
        assert!(settings(&with).contains("root_device=/dev/vda2\n"));
    }

    #[test]
    fn quotes_stay_quotes() {
        assert_eq!(quoted("a'b; rm"), r"'a'\''b; rm'");
    }

    #[test]
    fn only_the_guests_first_process_can_read_the_nonce() {
        let mut initramfs = Initramfs::default();
        add_work(&mut initramfs, &work());
        let mut bytes = Vec::new();
        initramfs.write(&mut bytes).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        // The nonce is in its own file and in nothing that reaches the chroot.
        assert_eq!(text.matches("5fe7").count(), 1);
    }
}
