//! A busy build host: many loop devices, mounts, mount namespaces and processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use crate::bystander::attach;
use crate::failure::{OrFail, wait_until};
use crate::place::Place;
use crate::probe;

const PATIENCE: Duration = Duration::from_secs(300);
const NAMESPACE: &str = include_str!("namespace.sh");

/// How many there are of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Bound loop devices.
    pub loops: usize,
    /// Mounts, in all namespaces together.
    pub mounts: usize,
    /// Mount namespaces, with the bench's own.
    pub namespaces: usize,
    /// Processes.
    pub processes: usize,
}

/// The host. All that it is goes with the place.
#[derive(Debug)]
pub struct Host {
    /// What it has in fact, of the bench's own.
    pub size: Size,
}

impl Host {
    /// Makes one. Loop devices are mounted evenly in the namespaces.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn make(place: &Place, size: Size) -> Self {
        let template = place.image("template.img", 1);
        let nodes: Vec<(String, PathBuf)> = (0..size.loops)
            .map(|index| {
                let image = place.path(format!("{index}.img"));
                fs::copy(&template, &image).or_fail("copying an image");
                (attach(&image), place.directory(format!("points/{index}")))
            })
            .collect();
        let of_loops = size.loops / size.namespaces;
        let of_each = size.mounts / size.namespaces;
        // Namespaces are copies of the bench's own, so what it has all of them have.
        let there = probe::mounts().len();
        for index in 0..of_each.saturating_sub(there + of_loops) {
            bind(place, &place.directory(format!("binds/{index}")));
        }
        let processes = size.processes / size.namespaces;
        for (index, share) in (0..size.namespaces).zip(nodes.chunks(of_loops.max(1))) {
            start(place, index, processes, &share[..of_loops.min(share.len())]);
        }
        for index in 0..size.namespaces {
            let ready = place.path(format!("ready-{index}"));
            wait_until("a namespace with its mounts and processes", PATIENCE, || ready.exists());
        }
        let own = probe::mounts().len() - of_loops;
        let mounts = (own + of_loops) * size.namespaces;
        Self { size: Size { mounts, processes: place.processes().len(), ..size } }
    }
}

/// Mounts a directory of the place's on another.
fn bind(place: &Place, point: &Path) {
    let none = None::<&str>;
    mount(Some(place.root()), point, none, MsFlags::MS_BIND, none).or_fail("mounting a directory");
}

fn start(place: &Place, index: usize, processes: usize, nodes: &[(String, PathBuf)]) {
    // The first is the bench's own namespace.
    let mut command = if index == 0 {
        place.command("bash")
    } else {
        let mut command = place.command("unshare");
        command.args(["--mount", "--propagation", "private", "bash"]);
        command
    };
    command.args(["-c", NAMESPACE, "namespace"]).arg(place.path(format!("ready-{index}")));
    command.arg(processes.max(1).to_string());
    for (node, point) in nodes {
        command.arg(node).arg(point);
    }
    // Its end is the place's to bring about, and to wait for.
    let started: std::io::Result<_> = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    drop(started.or_fail("starting a namespace's processes"));
}

/// Many mounts in the bench's own namespace, all on one that takes them along when it goes.
#[derive(Debug)]
pub struct Crowd {
    point: PathBuf,
}

impl Crowd {
    /// Mounts so many.
    ///
    /// # Panics
    /// When one fails.
    #[must_use]
    pub fn make(place: &Place, count: usize) -> Self {
        let point = place.directory("crowd");
        mount(Some("crowd"), &point, Some("tmpfs"), MsFlags::empty(), None::<&str>)
            .or_fail("mounting a tmpfs");
        let crowd = Self { point };
        for index in 1..count {
            let point = crowd.point.join(index.to_string());
            fs::create_dir(&point).or_fail("making a mount point");
            bind(place, &point);
        }
        crowd
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // One call for all of them.
        let _ = Command::new("umount").arg("--lazy").arg(&self.point).status();
    }
}
