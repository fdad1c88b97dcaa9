//! Is this host fit to build? Asked before anything is started.
//!
//! Every check gives a [`Finding`]: what was looked at, how it is, and what to do about it.
//! `hostler doctor` shows them all, a build stops at the unfit ones. Reading is thin, judging is
//! pure. Deliberately absent: acceleration, which only a canary knows, and the watchdog.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::child::find_program;
use crate::stop::Stop;
use crate::vm::argv::{Accelerator, Boot, CONTROL_PORT, Network, VmSpec};
use crate::vm::confinement::Enforced;
use crate::vm::launch::{LaunchError, Programs, launch};
use crate::vm::qemu::version;

/// What qemu itself takes beside the guest's memory, in bytes.
const QEMU_OVERHEAD: u64 = 640 * 1024 * 1024;

/// What every build runs.
const TOOLS: [(&str, &str); 4] =
    [("mke2fs", "e2fsprogs"), ("debugfs", "e2fsprogs"), ("e2fsck", "e2fsprogs"), ("gpgv", "gpgv")];

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fitness {
    /// As it should be.
    Fit,
    /// A build works, less well.
    Poor,
    /// No build works.
    Unfit,
}

/// What was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// qemu and its image tool.
    Qemu,
    /// A helper program.
    Tool,
    /// User namespaces.
    UserNamespaces,
    /// Landlock.
    Landlock,
    /// Which accelerator runs a guest.
    Acceleration,
    /// Free disk space.
    Space,
    /// Free memory.
    Memory,
    /// The watchdog.
    Watchdog,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub subject: Subject,
    /// How it is.
    pub fitness: Fitness,
    /// What was found.
    pub found: String,
    /// What to do about it, where something is to be done.
    pub advice: Option<String>,
}

impl Finding {
    /// All is well.
    #[must_use]
    pub fn fit(subject: Subject, found: impl Into<String>) -> Self {
        Self { subject, fitness: Fitness::Fit, found: found.into(), advice: None }
    }

    /// Something is to be done.
    #[must_use]
    pub fn bad(
        subject: Subject,
        fitness: Fitness,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { subject, fitness, found: found.into(), advice: Some(advice.into()) }
    }
}

/// The programs that a build runs.
#[derive(Clone, Debug)]
pub struct Host {
    /// For machines.
    pub programs: Programs,
    /// qemu's image tool.
    pub qemu_img: PathBuf,
    /// qemu's version, as it tells it.
    pub qemu_version: String,
}

/// What a build needs of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The guest's memory in bytes.
    pub memory: u64,
    /// Space in the workspace in bytes.
    pub space: u64,
    /// Programs beside those that every build runs, and their packages.
    pub tools: &'static [(&'static str, &'static str)],
}

/// The directory in which a build makes its scratch directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// It, as this process reaches it.
    pub folder: PathBuf,
    /// It, as people know it.
    pub shown: PathBuf,
    /// The option that chooses another.
    pub option: &'static str,
}

/// Looks at everything. The host's programs, if they are all there.
#[must_use]
pub fn examine(
    shim: &Path,
    workspace: &Workspace,
    needs: Needs,
    stop: &Stop,
) -> (Vec<Finding>, Option<Host>) {
    let (finding, host) = qemu(shim, stop);
    let mut findings = vec![finding];
    for (program, package) in TOOLS.iter().chain(needs.tools) {
        findings.push(tool(program, package));
    }
    findings.extend(confinement(shim));
    findings.push(space(workspace, needs.space));
    findings.push(memory(needs.memory));
    (findings, host)
}

fn qemu(shim: &Path, stop: &Stop) -> (Finding, Option<Host>) {
    let missing = |name: &str| {
        let found = format!("{name} is not installed");
        let advice = "install qemu-system-x86, qemu-utils and seabios, all of the same version: \
                      apt-get install --allow-downgrades qemu-system-x86 qemu-utils seabios";
        (Finding::bad(Subject::Qemu, Fitness::Unfit, found, advice), None)
    };
    let Some(qemu) = find_program("qemu-system-x86_64") else {
        return missing("qemu-system-x86_64");
    };
    let Some(qemu_img) = find_program("qemu-img") else {
        return missing("qemu-img");
    };
    let versions = [&qemu, &qemu_img].map(|program| match version(program, stop) {
        Ok(Some(version)) => Ok(version),
        Ok(None) => Err(format!("{} does not tell its version", program.display())),
        Err(error) => Err(error.to_string()),
    });
    let finding = judge_versions(&versions);
    let host = match (finding.fitness, versions) {
        (Fitness::Fit, [Ok(qemu_version), _]) => {
            Some(Host { programs: Programs { shim: shim.to_owned(), qemu }, qemu_img, qemu_version })
        }
        _ => None,
    };
    (finding, host)
}

fn judge_versions(versions: &[Result<String, String>; 2]) -> Finding {
    match versions {
        [Ok(qemu), Ok(image)] if qemu == image => {
            Finding::fit(Subject::Qemu, format!("qemu and qemu-img {qemu}"))
        }
        [Ok(qemu), Ok(image)] => Finding::bad(
            Subject::Qemu,
            Fitness::Unfit,
            format!("qemu is {qemu}, but qemu-img is {image}"),
            "install both from the same release: \
             apt-get install --allow-downgrades qemu-system-x86 qemu-utils",
        ),
        [Err(problem), _] | [_, Err(problem)] => Finding::bad(
            Subject::Qemu,
            Fitness::Unfit,
            problem.clone(),
            "reinstall it: apt-get install --reinstall qemu-system-x86 qemu-utils",
        ),
    }
}

fn tool(program: &str, package: &str) -> Finding {
    match find_program(program) {
        Some(path) => Finding::fit(Subject::Tool, path.display().to_string()),
        None => Finding::bad(
            Subject::Tool,
            Fitness::Unfit,
            format!("{program} is not installed"),
            format!("apt-get install {package}"),
        ),
    }
}

/// Tries it, with a program that ends at once in qemu's place: what the kernel's settings say and
/// what it does are two things.
fn confinement(shim: &Path) -> Vec<Finding> {
    let Some(nothing) = find_program("true") else {
        return vec![tool("true", "coreutils")];
    };
    let spec = VmSpec {
        accelerator: Accelerator::Tcg,
        processors: 1,
        memory_mib: 1,
        boot: Boot::Disk,
        disks: Vec::new(),
        network: Network::Mirror,
        port_name: CONTROL_PORT,
        log_port: None,
        smbios_serial: None,
    };
    let programs = Programs { shim: shim.to_owned(), qemu: nothing };
    let result = launch(&programs, &spec, &|_| Ok(())).map(|machine| machine.enforced);
    let landlock = result.as_ref().ok().copied().map(judge_landlock);
    std::iter::once(judge_namespaces(result)).chain(landlock).collect()
}

fn judge_landlock(enforced: Enforced) -> Finding {
    let poor = |found| {
        let advice = "builds work, and qemu is held by namespaces and its system call filter; Landlock needs a \
                      newer kernel, or landlock in the kernel's option lsm=";
        Finding::bad(Subject::Landlock, Fitness::Poor, found, advice)
    };
    match enforced {
        Enforced::Fully => {
            Finding::fit(Subject::Landlock, "Landlock keeps qemu from files that are not its own")
        }
        Enforced::Partly => poor("this kernel's Landlock enforces only a part of what is asked of it"),
        Enforced::NotAtAll => poor("this kernel enforces no Landlock: qemu could read what this user can"),
    }
}

fn judge_namespaces(result: Result<Enforced, LaunchError>) -> Finding {
    match result {
        Ok(_) => Finding::fit(Subject::UserNamespaces, "user and network namespaces can be made"),
        Err(LaunchError::UserNamespaces(source)) => Finding::bad(
            Subject::UserNamespaces,
            Fitness::Unfit,
            format!("this user may not make user namespaces: {}", denial(&source)),
            "an administrator can allow them: sysctl user.max_user_namespaces=15000, and where it \
             exists kernel.unprivileged_userns_clone=1 or an AppArmor profile for hostler; a container \
             needs a seccomp profile that allows them",
        ),
        Err(error) => Finding::bad(
            Subject::UserNamespaces,
            Fitness::Unfit,
            format!("a confined process could not be started: {error}"),
            "look at this user's limits (ulimit -a) and the kernel's log",
        ),
    }
}

/// user_namespaces(7): the limit on their number answers as if a disk were full.
fn denial(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::StorageFull {
        "the limit on their number is reached".to_owned()
    } else {
        error.to_string()
    }
}

fn space(workspace: &Workspace, needed: u64) -> Finding {
    // A build makes it where it is missing.
    let there = workspace.folder.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("."));
    match rustix::fs::statvfs(there) {
        Ok(state) => judge_space(workspace, state.f_bavail.saturating_mul(state.f_frsize), needed),
        Err(error) => Finding::bad(
            Subject::Space,
            Fitness::Unfit,
            format!("{} cannot be looked at: {}", workspace.shown.display(), io::Error::from(error)),
            format!("choose another directory with {}", workspace.option),
        ),
    }
}

fn judge_space(workspace: &Workspace, free: u64, needed: u64) -> Finding {
    let found = format!(
        "{} free in {}, {} needed at most",
        bytesize::ByteSize(free),
        workspace.shown.display(),
        bytesize::ByteSize(needed)
    );
    if free >= needed {
        Finding::fit(Subject::Space, found)
    } else {
        let advice = format!("free some space, or choose another directory with {}", workspace.option);
        Finding::bad(Subject::Space, Fitness::Unfit, found, advice)
    }
}

fn memory(guest: u64) -> Finding {
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| parse_available(&text));
    match available {
        Some(available) => judge_memory(available, guest),
        None => Finding::bad(
            Subject::Memory,
            Fitness::Poor,
            "/proc/meminfo does not tell the free memory",
            "make sure yourself that the guest's memory fits",
        ),
    }
}

fn judge_memory(available: u64, guest: u64) -> Finding {
    let needed = guest.saturating_add(QEMU_OVERHEAD);
    let found = format!(
        "{} of memory available, {} needed",
        bytesize::ByteSize(available),
        bytesize::ByteSize(needed)
    );
    if available >= needed {
        Finding::fit(Subject::Memory, found)
    } else {
        let advice = "end something, or lower [guest] memory in the recipe";
        Finding::bad(Subject::Memory, Fitness::Unfit, found, advice)
    }
}

/// `MemAvailable` in bytes; proc_meminfo(5).
fn parse_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_and_its_tool_must_be_of_one_version() {
        let same = [Ok("7.2".to_owned()), Ok("7.2".to_owned())];
        assert_eq!(judge_versions(&same).fitness, Fitness::Fit);
        let differ = judge_versions(&[Ok("7.2".to_owned()), Ok("9.0".to_owned())]);
        assert_eq!(differ.fitness, Fitness::Unfit);
        assert!(differ.found.contains("7.2") && differ.found.contains("9.0"));
        let broken = judge_versions(&[Ok("7.2".to_owned()), Err("no".to_owned())]);
        assert_eq!(broken.fitness, Fitness::Unfit);
    }

    #[test]
    fn forbidden_namespaces_are_told_with_what_to_do() {
        let denied = LaunchError::UserNamespaces(io::Error::from_raw_os_error(1));
        let finding = judge_namespaces(Err(denied));
        assert_eq!(finding.fitness, Fitness::Unfit);
        assert!(finding.advice.is_some_and(|advice| advice.contains("max_user_namespaces")));
        let limited = LaunchError::UserNamespaces(io::Error::from_raw_os_error(28));
        assert!(judge_namespaces(Err(limited)).found.ends_with("limit on their number is reached"));
    }

    #[test]
    fn too_little_of_anything_is_unfit() {
        let workspace = Workspace { folder: ".".into(), shown: "/var/cache/x".into(), option: "--cache" };
        assert_eq!(judge_space(&workspace, 10, 10).fitness, Fitness::Fit);
        let finding = judge_space(&workspace, 9, 10);
        assert_eq!(finding.fitness, Fitness::Unfit);
        assert_eq!(finding.found, "9 B free in /var/cache/x, 10 B needed at most");
        assert!(finding.advice.is_some_and(|advice| advice.contains("--cache")));
        assert_eq!(judge_memory(QEMU_OVERHEAD + 5, 5).fitness, Fitness::Fit);
        assert_eq!(judge_memory(QEMU_OVERHEAD, 5).fitness, Fitness::Unfit);
        assert_eq!(judge_memory(0, u64::MAX).fitness, Fitness::Unfit);
    }

    #[test]
    fn a_directory_that_a_build_would_make_is_looked_at_where_it_would_be() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("a/b");
        let workspace = Workspace { folder: missing.clone(), shown: missing, option: "--output" };
        assert_eq!(space(&workspace, 0).fitness, Fitness::Fit);
        let relative = Workspace { folder: "no-such-folder".into(), ..workspace };
        assert_eq!(space(&relative, 0).fitness, Fitness::Fit);
    }

    #[test]
    fn available_memory_is_read_in_bytes() {
        assert_eq!(parse_available("MemTotal: 9 kB\nMemAvailable:   24 kB\n"), Some(24 * 1024));
        assert_eq!(parse_available("MemTotal: 9 kB\n"), None);
    }
}
