//! Tries what holds a machine's process, instead of believing it.
//!
//! [`examine`] starts this same program in qemu's place, confined in the same way, which tries what it
//! must not be able to do and reports ([`main`]); then it starts qemu itself and looks at its system call
//! filter from outside. Deliberately absent: any conclusion from a version or a setting.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use rustix::thread::{capabilities, no_new_privs};
use serde::{Deserialize, Serialize};

use super::argv::{Accelerator, Boot, CONTROL_PORT, Disk, DiskFormat, Network, VmSpec};
use super::confinement::Enforced;
use super::control_group::Unlimited;
use super::launch::{LaunchError, Programs, launch, start};

/// The argument with which this program tries what holds it.
pub const PROBE: &str = "__probe";
/// How long the trying, and qemu's start, may take.
const DEADLINE: Duration = Duration::from_secs(20);
/// A file that every user of a host may read.
const READABLE: &str = "/etc/passwd";

/// What was found out about one way in which qemu is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Held {
    /// What is held.
    pub what: &'static str,
    /// Whether it was found to hold.
    pub holds: bool,
    /// What was tried and found.
    pub how: String,
}

/// What holds qemu.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Each way.
    pub held: Vec<Held>,
    /// The limits of its control group, or why it has none.
    pub group: Result<String, Unlimited>,
}

/// Why nothing could be found out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The probe, or qemu, did not start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A file or socket for it could not be made or read.
    #[error("could not prepare the trying of what holds qemu, or read its result")]
    Files(#[source] io::Error),
}

/// What the process in qemu's place could do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Tried {
    has_capabilities: bool,
    may_gain_privileges: bool,
    read: bool,
    wrote_beside: bool,
    connected: bool,
    core: Option<u64>,
    open_files: Option<u64>,
    file_size: Option<u64>,
    address_space: Option<u64>,
}

/// Runs in qemu's place: tries everything, and writes what worked onto its disk, which is all that it
/// may write to. Its arguments are the disk, and the address of a service of this host.
#[must_use]
pub fn main(arguments: &[OsString]) -> ExitCode {
    let [disk, service] = arguments else { return ExitCode::from(2) };
    let disk = Path::new(disk);
    let service = service.to_str().and_then(|text| text.parse::<SocketAddr>().ok());
    let limit = |resource| getrlimit(resource).current;
    let tried = Tried {
        has_capabilities: capabilities(None)
            .map_or(true, |sets| !(sets.effective | sets.permitted | sets.inheritable).is_empty()),
        may_gain_privileges: !no_new_privs().unwrap_or(false),
        read: File::open(READABLE).is_ok(),
        wrote_beside: File::create(disk.with_extension("beside")).is_ok(),
        connected: service
            .is_none_or(|service| TcpStream::connect_timeout(&service, Duration::from_secs(3)).is_ok()),
        core: limit(Resource::Core),
        open_files: limit(Resource::Nofile),
        file_size: limit(Resource::Fsize),
        address_space: limit(Resource::As),
    };
    let write = || -> io::Result<()> {
        let file = File::options().write(true).truncate(true).open(disk)?;
        serde_json::to_writer(file, &tried).map_err(io::Error::other)
    };
    if write().is_ok() { ExitCode::SUCCESS } else { ExitCode::from(2) }
}

/// Finds out what holds qemu on this host, for a guest with so much memory. `scratch` is for the probe's
/// disk; `shim` is this program.
///
/// # Errors
/// See [`ProbeError`]; that something does not hold is no error.
pub fn examine(programs: &Programs, memory_mib: u64, scratch: &Path) -> Result<Found, ProbeError> {
    let disk = scratch.join("probe.raw");
    File::create(&disk).map_err(ProbeError::Files)?;
    let service = TcpListener::bind("127.0.0.1:0").map_err(ProbeError::Files)?;
    let address = service.local_addr().map_err(ProbeError::Files)?;
    let spec = VmSpec {
        accelerator: Accelerator::Tcg,
        processors: 1,
        memory_mib,
        boot: Boot::Disk,
        disks: vec![Disk::new(disk.clone(), DiskFormat::Raw)],
        network: Network::Mirror,
        port_name: CONTROL_PORT,
        log_port: None,
        smbios_serial: None,
    };
    let own = Programs { qemu: programs.shim.clone(), ..programs.clone() };
    let words = [PROBE.into(), disk.clone().into_os_string(), address.to_string().into()];
    let mut machine = start(&own, &spec, &words, &|_| Ok(()))?;
    let (isolated, enforced) = (machine.isolated, machine.enforced);
    let group = match machine.group() {
        Ok(group) => Ok(format!("memory {}, {} threads", bytesize::ByteSize(group.memory), group.threads)),
        Err(why) => Err(why.clone()),
    };
    machine.wait(DEADLINE).map_err(ProbeError::Files)?;
    let text = fs::read(&disk).map_err(ProbeError::Files)?;
    let tried: Tried = serde_json::from_slice(&text).map_err(|error| ProbeError::Files(error.into()))?;
    drop((service, machine));
    let has_filter = has_filter(programs, &VmSpec { disks: Vec::new(), ..spec })?;
    Ok(Found { held: judge(&tried, isolated, enforced, has_filter), group })
}

/// Whether qemu, once it runs, has a filter of its system calls; proc_pid_status(5).
fn has_filter(programs: &Programs, spec: &VmSpec) -> Result<bool, ProbeError> {
    let machine = launch(programs, spec, &|_| Ok(()))?;
    let path = machine.pid_in_proc().map_or_else(String::new, |pid| format!("/proc/{pid}/status"));
    let started = Instant::now();
    let mut has_filter = false;
    while !has_filter && started.elapsed() < DEADLINE {
        let Ok(status) = fs::read_to_string(&path) else { break };
        has_filter = status.lines().any(|line| line.strip_prefix("Seccomp:").map(str::trim) == Some("2"));
        thread::sleep(Duration::from_millis(50));
    }
    machine.end().map_err(ProbeError::Files)?;
    Ok(has_filter)
}

fn judge(tried: &Tried, isolated: bool, enforced: Enforced, has_filter: bool) -> Vec<Held> {
    let not = |it: bool| if it { "" } else { "not " };
    let size = |limit: Option<u64>| {
        limit.map_or_else(|| "unlimited".to_owned(), |limit| bytesize::ByteSize(limit).to_string())
    };
    let landlock = match enforced {
        Enforced::Fully => "Landlock enforces all that is asked of it",
        Enforced::Partly => "this kernel's Landlock enforces only a part: a newer one does all",
        Enforced::NotAtAll => "this kernel enforces no Landlock: it needs Linux 5.13 and lsm=landlock",
    };
    vec![
        Held {
            what: "privileges",
            holds: !tried.has_capabilities && !tried.may_gain_privileges,
            how: format!(
                "it has {} capabilities and can{} gain any by executing a program",
                if tried.has_capabilities { "some" } else { "no" },
                if tried.may_gain_privileges { "" } else { "not" },
            ),
        },
        Held {
            what: "network",
            holds: isolated && !tried.connected,
            how: format!(
                "it is {}in user and network namespaces of its own; a service of this host was {}reached",
                not(isolated),
                not(tried.connected)
            ),
        },
        Held {
            what: "files",
            holds: enforced != Enforced::NotAtAll && !tried.read && !tried.wrote_beside,
            how: format!(
                "{landlock}; {READABLE} was {}read, a file beside its disk was {}made",
                not(tried.read),
                not(tried.wrote_beside)
            ),
        },
        Held {
            what: "system calls",
            holds: has_filter,
            how: format!(
                "qemu has {} filter: obsolete calls, privileges, new processes and resource control are denied",
                if has_filter { "its" } else { "no" }
            ),
        },
        Held {
            what: "limits",
            holds: tried.core == Some(0) && tried.file_size.is_some() && tried.address_space.is_some(),
            how: format!(
                "core dumps {}, open files {}, the longest file beside its disk {}, address space {}",
                size(tried.core),
                tried.open_files.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string()),
                size(tried.file_size),
                size(tried.address_space)
            ),
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried() -> Tried {
        Tried {
            has_capabilities: false,
            may_gain_privileges: false,
            read: false,
            wrote_beside: false,
            connected: false,
            core: Some(0),
            open_files: Some(512),
            file_size: Some(1 << 20),
            address_space: Some(1 << 30),
        }
    }

    fn failing(tried: &Tried, isolated: bool, enforced: Enforced, has_filter: bool) -> Vec<&'static str> {
        let held = judge(tried, isolated, enforced, has_filter);
        held.into_iter().filter(|held| !held.holds).map(|held| held.what).collect()
    }

    #[test]
    fn each_hole_is_told_as_one() {
        let none: Vec<&str> = Vec::new();
        assert_eq!(failing(&tried(), true, Enforced::Fully, true), none);
        assert_eq!(failing(&tried(), false, Enforced::Fully, true), ["network"]);
        assert_eq!(failing(&tried(), true, Enforced::NotAtAll, true), ["files"]);
        assert_eq!(failing(&tried(), true, Enforced::Fully, false), ["system calls"]);
        assert_eq!(failing(&Tried { read: true, ..tried() }, true, Enforced::Partly, true), ["files"]);
        assert_eq!(failing(&Tried { connected: true, ..tried() }, true, Enforced::Fully, true), ["network"]);
        assert_eq!(failing(&Tried { core: None, ..tried() }, true, Enforced::Fully, true), ["limits"]);
        let gain = Tried { may_gain_privileges: true, ..tried() };
        assert_eq!(failing(&gain, true, Enforced::Fully, true), ["privileges"]);
    }
}
