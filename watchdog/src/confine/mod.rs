//! How little each process of the daemon may do.
//!
//! | process | runs as | capabilities | system calls |
//! |---|---|---|---|
//! | the daemon | root | what it and its workers need | all but those that change the host as a whole |
//! | a worker | root | what looking and acting need | no new program or process, no socket, no new file |
//! | the workers' origin | root | the same | the same, but copies of itself |
//! | a user's reader | that user | none | a list: reading, writing and waiting on what it was given |
//! | the metrics' server | nobody | none | the same, and accepting connections |
//!
//! Each is applied before the process reads the first byte that somebody else wrote, and cannot be undone.
//! The unit of systemd says the same for the daemon; this holds where it does not run under the unit.

mod filters;

use std::io;

use rustix::process::{Gid, Signal, Uid, set_parent_process_death_signal};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

/// What looking at the host and acting on it needs; the unit's file says what for.
const ACTING: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER);

/// What starting a process that is another user's needs on top.
const STARTING: CapabilitySet = CapabilitySet::SETUID.union(CapabilitySet::SETGID);

/// The user and group that nothing belongs to (`nobody`; the kernel's overflow number).
const NOBODY: u32 = 65_534;

/// Why a process could not be confined. It must not go on.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// Giving up rights.
    #[error("giving up rights that are not needed failed at {operation}")]
    Rights {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The system call filter.
    #[error("the filter of system calls could not be applied; the kernel needs CONFIG_SECCOMP_FILTER")]
    Filter(#[source] Box<dyn std::error::Error + Send + Sync>),
}

fn rights(operation: &'static str) -> impl FnOnce(rustix::io::Errno) -> ConfineError {
    move |source| ConfineError::Rights { operation, source: source.into() }
}

/// Confines the daemon, and with it all that it starts. To be called before it has threads.
///
/// `more` is what its settings need on top, such as `NET_BIND_SERVICE` for a low port.
///
/// # Errors
/// When the kernel refuses.
pub fn daemon(more: CapabilitySet) -> Result<(), ConfineError> {
    keep(ACTING | STARTING | more)?;
    filters::daemon()
}

/// Confines the process that workers are copies of.
///
/// # Errors
/// When the kernel refuses.
pub fn origin() -> Result<Origin, ConfineError> {
    keep(ACTING)?;
    filters::worker()?;
    die_with_parent()?;
    Ok(Origin { no_copies: filters::no_copies()? })
}

/// What is left to forbid to its copies.
#[derive(Debug)]
pub struct Origin {
    no_copies: filters::Program,
}

impl Origin {
    /// Confines a copy, which is a worker. It dies with the origin, and so with the daemon.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn confine_copy(&self) -> Result<(), ConfineError> {
        die_with_parent()?;
        self.no_copies.apply()
    }
}

/// Makes this process `uid`'s, with no group but `gid` and no rights of root's.
///
/// # Errors
/// When the kernel refuses.
pub fn become_user(uid: u32, gid: u32) -> Result<(), ConfineError> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // From here on it is none of the host's important processes: memory is taken from it first.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    bound(CapabilitySet::empty())?;
    set_thread_groups(&[]).map_err(rights("setgroups"))?;
    set_thread_res_gid(gid, gid, gid).map_err(rights("setresgid"))?;
    set_thread_res_uid(uid, uid, uid).map_err(rights("setresuid"))?;
    keep(CapabilitySet::empty())?;
    // A change of user has the kernel forget this.
    die_with_parent()
}

/// The same, as nobody.
///
/// # Errors
/// When the kernel refuses.
pub fn become_nobody() -> Result<(), ConfineError> {
    become_user(NOBODY, NOBODY)
}

/// Forbids all threads of a reader what reading and writing its connections does not need.
///
/// # Errors
/// When the kernel refuses.
pub fn seal_reader() -> Result<(), ConfineError> {
    filters::reader()
}

/// The same for the metrics' server, which also accepts connections.
///
/// # Errors
/// When the kernel refuses.
pub fn seal_server() -> Result<(), ConfineError> {
    filters::server()
}

fn keep(wanted: CapabilitySet) -> Result<(), ConfineError> {
    set_no_new_privs(true).map_err(rights("PR_SET_NO_NEW_PRIVS"))?;
    bound(wanted)?;
    let kept = capabilities(None).map_err(rights("capget"))?.permitted & wanted;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(rights("capset"))
}

/// Whoever lacks `CAP_SETPCAP` cannot change the bounding set; with no new privileges it gives nothing.
fn bound(wanted: CapabilitySet) -> Result<(), ConfineError> {
    let effective = capabilities(None).map_err(rights("capget"))?.effective;
    if !effective.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    for capability in CapabilitySet::all().difference(wanted).iter() {
        // A kernel that does not know one has none to give up.
        if matches!(capability_is_in_bounding_set(capability), Ok(true)) {
            remove_capability_from_bounding_set(capability).map_err(rights("PR_CAPBSET_DROP"))?;
        }
    }
    Ok(())
}

fn die_with_parent() -> Result<(), ConfineError> {
    // Should that have died just before, the end of the daemon's socket is what tells.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(rights("PR_SET_PDEATHSIG"))
}
