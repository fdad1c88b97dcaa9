//! A control group of the machine's own, with limits, where this host lets its user make one.
//!
//! That is where a group of version 2 was delegated to the user (`Delegate=yes` of systemd.resource-control(5)):
//! the group that this process is in, or one above it. Version 2 has no processes in a group whose children have
//! limits, so where it is the group that this process is in, and nobody else is, this process steps aside for as
//! long as the machine runs. With a watchdog, the machine is in the lease's group: that is where the watchdog
//! looks for what is left of a build, so it stays there, and has that group's limits and no others.
//!
//! [`choose`] decides, purely; the rest reads and acts. What has no group is told by [`Unlimited`], never
//! silently left out.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::fs::Access;

/// How much memory qemu may have beside the guest's, in bytes: 512 MiB of translated code, and as much for itself.
/// Measured were 85 MiB, with little code; what the kernel keeps of its disks' files in memory comes and goes.
const BESIDE_THE_GUEST: u64 = 1 << 30;
/// How many threads it may have: one for each of up to 64 requests to its disks at once, and for each processor,
/// with some more.
const MOST_THREADS: u64 = 512;
/// What limits are needed for.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];
/// How groups of this program are called; their process' number follows.
const NAME: &str = "hostler-";

/// Why a machine is in no group of its own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unlimited {
    /// There is no version 2.
    #[error("no control groups of version 2 are mounted here")]
    NotMounted,
    /// It is in another one.
    #[error(
        "it is in the lease's group, where the watchdog looks for what is left: the limits of the groups above it hold"
    )]
    Leased,
    /// Root may do as it likes in groups that are others'.
    #[error("this process is root's, to which no group is delegated: run it as a user")]
    Root,
    /// No group is this user's.
    #[error(
        "the group {} is not delegated to this user: start it below a unit with Delegate=yes, or as systemd-run --user --scope --property Delegate=yes", path.display()
    )]
    NotDelegated {
        /// The group.
        path: PathBuf,
    },
    /// A controller is not handed down.
    #[error("the group {} has no controller for {lacks}: its unit needs Delegate=yes, and the host that controller in version 2", path.display())]
    NoController {
        /// The group.
        path: PathBuf,
        /// What is missing.
        lacks: &'static str,
    },
    /// Others are in the same group.
    #[error(
        "others than this process are in the group {}, so none below it can have limits: give the unit DelegateSubgroup=, or start it in a scope of its own", path.display()
    )]
    Shared {
        /// The group.
        path: PathBuf,
    },
    /// The kernel refuses.
    #[error("no group could be made in {}: {why}", path.display())]
    Refused {
        /// In which.
        path: PathBuf,
        /// What it said.
        why: String,
    },
}

/// What is known of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level {
    /// Where it is.
    pub path: PathBuf,
    /// Whether this user may make groups in it and move processes between them.
    pub is_ours: bool,
    /// What limits it could hand down.
    pub controllers: Vec<String>,
    /// What limits it hands down.
    pub handed_down: Vec<String>,
    /// The processes in it.
    pub processes: Vec<u32>,
}

/// Where a machine's group is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// In which group.
    pub parent: PathBuf,
    /// Whether that has to begin handing limits down.
    pub begins: bool,
    /// Whether this process has to leave it for that.
    pub steps_aside: bool,
}

/// Chooses among this process' own group and those above it, the nearest first. `own` are this process and the
/// machine's.
///
/// # Errors
/// Why there is none to choose.
pub fn choose(levels: &[Level], own: &[u32]) -> Result<Choice, Unlimited> {
    let mut why = None;
    for (distance, level) in levels.iter().enumerate() {
        let path = || level.path.clone();
        if !level.is_ours {
            return Err(why.unwrap_or(Unlimited::NotDelegated { path: path() }));
        }
        let has = |list: &[String], name: &str| list.iter().any(|one| one == name);
        if let Some(lacks) = CONTROLLERS.into_iter().find(|name| !has(&level.controllers, name)) {
            why.get_or_insert(Unlimited::NoController { path: path(), lacks });
            continue;
        }
        let begins = CONTROLLERS.into_iter().any(|name| !has(&level.handed_down, name));
        let is_alone = level.processes.iter().all(|process| own.contains(process));
        if !begins || is_alone {
            let steps_aside = begins && distance == 0;
            return Ok(Choice { parent: path(), begins, steps_aside });
        }
        why.get_or_insert(Unlimited::Shared { path: path() });
    }
    Err(why.unwrap_or(Unlimited::NotMounted))
}

/// A machine's group. Dropped once the machine is gone, it is removed.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    parent: PathBuf,
    /// Where the machine's process came from.
    origin: PathBuf,
    /// Where this process went meanwhile.
    aside: Option<PathBuf>,
    /// The most memory, in bytes.
    pub memory: u64,
    /// The most threads.
    pub threads: u64,
}

impl Group {
    /// Puts a process that does nothing yet into a group of its own, with limits for a machine that has so much
    /// memory. `in_proc` is its number in the `/proc` that is mounted here.
    ///
    /// # Errors
    /// Why it is in none.
    pub fn around(process: u32, in_proc: Option<u32>, memory_mib: u64) -> Result<Self, Unlimited> {
        if rustix::process::geteuid().is_root() {
            return Err(Unlimited::Root);
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let place_of = |process: &str| {
            let text = fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
            place(&mounts, &text)
        };
        let (root, own) = place_of("self").ok_or(Unlimited::NotMounted)?;
        if in_proc.and_then(|process| place_of(&process.to_string())).is_some_and(|(_, its)| its != own) {
            return Err(Unlimited::Leased);
        }
        let levels: Vec<Level> =
            own.ancestors().take_while(|path| path.starts_with(&root)).map(Level::read).collect();
        let choice = choose(&levels, &[std::process::id(), process])?;
        let parent = choice.parent.clone();
        let refused = |error: io::Error| Unlimited::Refused { path: parent, why: error.to_string() };
        Self::make(choice, own, process, memory_mib).map_err(refused)
    }

    fn make(choice: Choice, origin: PathBuf, process: u32, memory_mib: u64) -> io::Result<Self> {
        let Choice { parent, begins, steps_aside } = choice;
        sweep(&parent);
        let named = |end: &str| parent.join(format!("{NAME}{}-{end}", std::process::id()));
        let group = Self {
            path: named(&process.to_string()),
            aside: steps_aside.then(|| named("aside")),
            memory: memory_mib.saturating_mul(1 << 20).saturating_add(BESIDE_THE_GUEST),
            threads: MOST_THREADS,
            parent,
            origin,
        };
        // From here on it is undone when it is dropped.
        for path in std::iter::once(&group.path).chain(&group.aside) {
            fs::create_dir(path)?;
        }
        let write = |path: &Path, file: &str, text: &str| fs::write(path.join(file), text);
        write(&group.path, "cgroup.procs", &process.to_string())?;
        if let Some(aside) = &group.aside {
            write(aside, "cgroup.procs", "0")?;
        }
        if begins {
            write(&group.parent, "cgroup.subtree_control", "+memory +pids")?;
        }
        write(&group.path, "memory.max", &group.memory.to_string())?;
        write(&group.path, "memory.oom.group", "1")?;
        write(&group.path, "pids.max", &group.threads.to_string())?;
        let holds = |file: &str, text: &str| -> io::Result<bool> {
            Ok(fs::read_to_string(group.path.join(file))?.lines().any(|line| line == text))
        };
        // The kernel rounds to whole pages, of which this is a multiple.
        if holds("cgroup.procs", &process.to_string())?
            && holds("memory.max", &group.memory.to_string())?
            && holds("pids.max", &group.threads.to_string())?
        {
            Ok(group)
        } else {
            Err(io::Error::other("its limits are not what was written"))
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What fails here leaves a group, which the next machine's removes once it is empty, or the unit's end.
        if self.aside.is_some() {
            let _ = fs::write(self.parent.join("cgroup.subtree_control"), "-memory -pids");
            let _ = fs::write(self.parent.join("cgroup.procs"), "0");
        }
        // Its process is still there when the group could not be made as a whole.
        for process in fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(self.origin.join("cgroup.procs"), process);
        }
        for path in std::iter::once(&self.path).chain(&self.aside) {
            remove(path);
        }
    }
}

/// Removes a group; the kernel may need a moment after the last process of it was reaped.
fn remove(path: &Path) {
    for _ in 0..50 {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(20));
            }
            _ => return,
        }
    }
}

/// Removes what killed processes have left. What somebody is in cannot be removed.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(NAME).and_then(|rest| rest.split_once('-'));
        let owner = owner.and_then(|(owner, _)| owner.parse::<u32>().ok());
        if owner.is_some_and(|owner| !Path::new(&format!("/proc/{owner}")).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

impl Level {
    fn read(path: &Path) -> Self {
        let text = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
        let words = |file: &str| text(file).split_whitespace().map(str::to_owned).collect();
        let may_write = |file: &str| rustix::fs::access(path.join(file), Access::WRITE_OK).is_ok();
        Self {
            path: path.to_owned(),
            is_ours: ["", "cgroup.procs", "cgroup.subtree_control"].into_iter().all(may_write),
            controllers: words("cgroup.controllers"),
            handed_down: words("cgroup.subtree_control"),
            // One of another namespace of processes is 0, and nobody's own.
            processes: text("cgroup.procs").lines().map(|line| line.parse().unwrap_or(0)).collect(),
        }
    }
}

/// Where version 2 is mounted, and the group in it that a process is in: cgroups(7), proc_pid_mountinfo(5).
fn place(mounts: &str, groups: &str) -> Option<(PathBuf, PathBuf)> {
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        if kind.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let (below, point) = (fields.next()?, fields.next()?);
        // One that leads out of a namespace of groups, or is gone, is in no mount.
        let inside = Path::new(group).strip_prefix(below).ok()?;
        let is_plain = inside.components().all(|part| matches!(part, Component::Normal(_)));
        if !is_plain || group.ends_with(" (deleted)") || point.contains('\\') {
            return None;
        }
        let root = PathBuf::from(point);
        let group = if inside.as_os_str().is_empty() { root.clone() } else { root.join(inside) };
        Some((root, group))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "30 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n41 30 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_group_is_found_wherever_version_2_is_mounted() {
        let found = |mounts: &str, groups: &str| place(mounts, groups).map(|(_, group)| group);
        let hybrid = "9:name=systemd:/\n0::/user.slice/x.scope\n";
        assert_eq!(found(MOUNTS, hybrid), Some("/sys/fs/cgroup/unified/user.slice/x.scope".into()));
        assert_eq!(found(MOUNTS, "0::/\n"), Some("/sys/fs/cgroup/unified".into()));
        // A container's mount has a part of it.
        let part = MOUNTS.replace("0:38 / ", "0:38 /pod ");
        assert_eq!(found(&part, "0::/pod/job\n"), Some("/sys/fs/cgroup/unified/job".into()));
        for groups in ["0::/other\n", "0::/pod/../other\n", "0::/pod/job (deleted)\n", "4:memory:/pod\n", ""]
        {
            assert_eq!(found(&part, groups), None, "{groups}");
        }
        assert_eq!(found("", "0::/x\n"), None);
    }

    fn level(path: &str) -> Level {
        let both = || CONTROLLERS.map(str::to_owned).to_vec();
        Level {
            path: path.into(),
            is_ours: true,
            controllers: both(),
            handed_down: Vec::new(),
            processes: Vec::new(),
        }
    }

    #[test]
    fn the_nearest_group_that_can_hand_limits_down_is_chosen() {
        let own = [7, 8];
        // Alone in its scope.
        let alone = Level { processes: vec![7, 8], ..level("/u/scope") };
        let up = Level { is_ours: false, ..level("/u") };
        let choice = choose(&[alone.clone(), up.clone()], &own);
        assert_eq!(choice, Ok(Choice { parent: "/u/scope".into(), begins: true, steps_aside: true }));
        // In a group of the unit's own for its processes (DelegateSubgroup=).
        let shared = Level { processes: vec![1, 7, 8], ..level("/u/unit/main") };
        let unit = level("/u/unit");
        let choice = choose(&[shared.clone(), unit.clone(), up.clone()], &own);
        assert_eq!(choice, Ok(Choice { parent: "/u/unit".into(), begins: true, steps_aside: false }));
        // Where another build has begun.
        let begun = Level { handed_down: CONTROLLERS.map(str::to_owned).to_vec(), ..unit };
        let choice = choose(&[shared.clone(), begun, up.clone()], &own);
        assert_eq!(choice, Ok(Choice { parent: "/u/unit".into(), begins: false, steps_aside: false }));

        assert_eq!(
            choose(&[shared, up.clone()], &own),
            Err(Unlimited::Shared { path: "/u/unit/main".into() })
        );
        assert_eq!(choose(&[up], &own), Err(Unlimited::NotDelegated { path: "/u".into() }));
        let without = Level { controllers: vec!["memory".to_owned()], ..alone };
        let lacks = Unlimited::NoController { path: "/u/scope".into(), lacks: "pids" };
        assert_eq!(choose(&[without], &own), Err(lacks));
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(mounts in "([0-9/ -]|cgroup2|/sys| - ){0,40}", groups in "(0::|/|\\.\\.|a|\n){0,20}") {
            let _ = place(&mounts, &groups);
        }
    }
}
