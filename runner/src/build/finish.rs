//! The guests that Hostler's own init runs in: what they boot from, and what they are told to do.
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

/// Further ones for a disk that was made elsewhere.
const FOREIGN_MODULES: [&str; 4] = ["xfs", "btrfs", "nls_cp437", "nls_ascii"];

/// What is to be done in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work<'a> {
    /// The guest's proof.
    pub nonce: &'a str,
    /// Number of the root partition, 1 being the first.
    pub root_partition: u32,
    /// Its file system's UUID.
    pub root_uuid: &'a str,
    /// The guest's `sources.list`, when it is to reach the mirror.
    pub sources: Option<&'a str>,
    /// `SOURCE_DATE_EPOCH` for all that runs in the guest.
    pub time: Option<u64>,
    /// What for.
    pub task: Task<'a>,
}

/// What a guest tells of an image, and on which disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tell<'a> {
    /// The disk that takes the list of packages.
    pub results: &'a str,
    /// The disk that takes the root file system as an archive.
    pub root: Option<&'a str>,
    /// Whether kernel and initramfs come along.
    pub kernel: bool,
}

/// What a guest is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task<'a> {
    /// Looks into an image that was made elsewhere; `/dev/vda` is a throwaway copy of it.
    Inspect {
        /// What to tell.
        tell: Tell<'a>,
        /// Whether the copy gets the unit that proves its boot.
        verify: bool,
    },
    /// Finishes an image.
    Finish {
        /// Packages whose preinst scripts are to run, as dpkg's info files name them, in order.
        preinst: &'a [String],
        /// The recipe's commands.
        run: &'a [String],
        /// Whether the image gets the unit that proves its boot.
        verify: bool,
        /// What to tell of it.
        tell: Option<Tell<'a>>,
    },
    /// Makes a throwaway machine's disk ready.
    Prepare {
        /// As above.
        preinst: &'a [String],
    },
    /// Works in a throwaway machine.
    Use {
        /// The recipe's commands.
        run: &'a [String],
        /// Whether the second disk has a workspace.
        workspace: bool,
        /// Files in `/artifacts` to hand over.
        artifacts: &'a [String],
        /// The disk that takes them.
        results: &'a str,
    },
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
    if let Task::Inspect { .. } = work.task {
        let mut more = String::new();
        for module in modules::load_ordered(programs.modules, &FOREIGN_MODULES)? {
            let name = format!("{}.ko", module.name);
            if !order.lines().any(|there| there == name) {
                more.push_str(&format!("{name}\n"));
                initramfs.file(&format!("modules/{name}"), 0o644, module.bytes);
            }
        }
        initramfs.file("modules/more", 0o644, more);
        initramfs.file("hostler/file-systems", 0o400, include_str!("guest/file-systems.sh"));
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
    let mut put = |name: &str, mode, bytes: &[u8]| {
        initramfs.file(&format!("hostler/files/{name}"), mode, bytes.to_vec());
    };
    if let Some(sources) = work.sources {
        put("sources.list", 0o644, sources.as_bytes());
        put("apt.conf", 0o644, include_bytes!("guest/apt.conf"));
    }
    match work.task {
        Task::Finish { preinst, .. } | Task::Prepare { preinst } => {
            put("preinst", 0o400, lines(preinst).as_bytes());
            put("bin/dpkg-maintscript-helper", 0o755, include_bytes!("guest/dpkg-maintscript-helper"));
        }
        Task::Use { workspace, artifacts, .. } => {
            put("artifacts", 0o400, lines(artifacts).as_bytes());
            if workspace {
                put("has-workspace", 0o400, b"");
            }
        }
        Task::Inspect { .. } => {}
    }
    if let Task::Finish { verify: true, .. } | Task::Inspect { verify: true, .. } = work.task {
        put("verify-boot", 0o755, include_bytes!("guest/verify-boot"));
        put("hostler-verify.service", 0o644, include_bytes!("guest/hostler-verify.service"));
        put("hostler-verify.rules", 0o644, include_bytes!("guest/hostler-verify.rules"));
    }
}

fn settings(work: &Work<'_>) -> String {
    let mirror = if work.sources.is_some() { mirror_base() } else { String::new() };
    let (throwaway, results) = match work.task {
        Task::Finish { tell, .. } => ("", tell.map_or("", |tell| tell.results)),
        Task::Inspect { tell, .. } => ("", tell.results),
        Task::Prepare { .. } => ("", ""),
        Task::Use { results, .. } => ("yes", results),
    };
    let tell = match work.task {
        Task::Finish { tell, .. } => tell,
        Task::Inspect { tell, .. } => Some(tell),
        Task::Prepare { .. } | Task::Use { .. } => None,
    };
    let foreign = match work.task {
        Task::Inspect { verify: true, .. } => "rw",
        // Even so, a journal is replayed; the disk is a copy.
        Task::Inspect { verify: false, .. } => "ro",
        _ => "",
    };
    let root_device =
        if foreign.is_empty() { format!("/dev/vda{}", work.root_partition) } else { String::new() };
    format!(
        "disk_device=/dev/vda\nroot_device={root_device}\nroot_uuid={}\nfile_system=ext4\nmirror={}\nthrowaway={throwaway}\nforeign={foreign}\nresults={results}\nroot_archive={}\nwants_kernel={}\nsource_date={}\n",
        quoted(work.root_uuid),
        quoted(&mirror),
        tell.and_then(|tell| tell.root).unwrap_or(""),
        if tell.is_some_and(|tell| tell.kernel) { "yes" } else { "" },
        work.time.map_or(String::new(), |time| time.to_string()),
    )
}

/// The steps in their order.
fn steps(work: &Work<'_>) -> Vec<(String, String)> {
    let step = |name: &str, script: &str| (name.to_owned(), script.to_owned());
    let preinst = step("preinst", include_str!("guest/preinst.sh"));
    let configure = step("configure", include_str!("guest/configure.sh"));
    let cleanup = step("cleanup", include_str!("guest/cleanup.sh"));
    match work.task {
        Task::Inspect { verify, .. } => {
            let mut steps = vec![step("report", include_str!("guest/report.sh"))];
            if verify {
                steps.push(step("plant-verify", include_str!("guest/plant-verify.sh")));
            }
            steps
        }
        Task::Finish { run, verify, tell, .. } => {
            let mut steps = vec![preinst, configure];
            // Before the initramfs is made, because what they install may belong into it.
            steps.extend(commands(run, include_str!("guest/run.sh")));
            if verify {
                steps.push(step("install-verify", include_str!("guest/install-verify.sh")));
            }
            steps.push(step("boot", include_str!("guest/boot.sh")));
            steps.push(cleanup);
            if tell.is_some() {
                steps.push(step("report", include_str!("guest/report.sh")));
            }
            steps
        }
        Task::Prepare { .. } => {
            vec![preinst, configure, step("prepare", include_str!("guest/prepare.sh")), cleanup]
        }
        Task::Use { run, .. } => {
            let mut steps = vec![step("workspace", include_str!("guest/workspace.sh"))];
            steps.extend(commands(run, include_str!("guest/use.sh")));
            steps.push(step("artifacts", include_str!("guest/artifacts.sh")));
            steps
        }
    }
}

/// The recipe's commands, each after `before`.
fn commands<'a>(run: &'a [String], before: &'a str) -> impl Iterator<Item = (String, String)> + 'a {
    (1..).zip(run).map(move |(number, command)| (format!("run-{number}"), format!("{before}{command}\n")))
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

    fn work(task: Task<'static>) -> Work<'static> {
        Work { nonce: "5fe7", root_partition: 2, root_uuid: "1-2", sources: None, time: None, task }
    }

    fn finish(verify: bool) -> Work<'static> {
        work(Task::Finish { preinst: &[], run: &[], verify, tell: None })
    }

    fn names(work: &Work<'_>) -> Vec<String> {
        steps(work).into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn the_recipes_commands_come_before_the_initramfs_is_made() {
        let run = ["apt-get install -y less".to_owned(), "true".to_owned()];
        let tell = Tell { results: "/dev/vdb", root: None, kernel: false };
        let task = Task::Finish { preinst: &[], run: &run, verify: true, tell: Some(tell) };
        let work = Work { task, ..finish(true) };
        assert_eq!(
            names(&work),
            ["preinst", "configure", "run-1", "run-2", "install-verify", "boot", "cleanup", "report"]
        );
        assert!(steps(&work)[2].1.ends_with("\napt-get install -y less\n"));
    }

    #[test]
    fn a_throwaway_machine_gets_its_workspace_first_and_hands_over_last() {
        let run = ["make".to_owned()];
        let artifacts = ["a.iso".to_owned()];
        let task = Task::Use { run: &run, workspace: true, artifacts: &artifacts, results: "/dev/vdc" };
        let work = Work { task, ..finish(false) };
        assert_eq!(names(&work), ["workspace", "run-1", "artifacts"]);
        assert!(settings(&work).contains("\nthrowaway=yes\nforeign=\nresults=/dev/vdc\n"));
    }

    #[test]
    fn an_image_that_is_only_looked_into_is_mounted_read_only() {
        let tell = Tell { results: "/dev/vdb", root: Some("/dev/vdc"), kernel: true };
        let look = work(Task::Inspect { tell, verify: false });
        let told = settings(&look);
        assert!(told.contains("\nroot_device=\n") && told.contains("\nforeign=ro\n"), "{told}");
        assert!(told.contains("\nroot_archive=/dev/vdc\nwants_kernel=yes\nsource_date=\n"), "{told}");
        assert_eq!(names(&look), ["report"]);
        let plant = work(Task::Inspect { tell, verify: true });
        assert_eq!(names(&plant), ["report", "plant-verify"]);
        assert!(settings(&plant).contains("\nforeign=rw\n"));
    }

    #[test]
    fn an_image_that_is_not_verified_gets_no_unit() {
        assert!(!names(&finish(false)).contains(&"install-verify".to_owned()));
    }

    #[test]
    fn without_a_mirror_the_guest_has_no_network() {
        assert!(settings(&finish(false)).contains("mirror=''\n"));
        let with = Work { sources: Some("deb x"), ..finish(false) };
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
        add_work(&mut initramfs, &finish(true));
        let mut bytes = Vec::new();
        initramfs.write(&mut bytes).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        // The nonce is in its own file and in nothing that reaches the chroot.
        assert_eq!(text.matches("5fe7").count(), 1);
    }
}
