//! Which system calls each process may make, as data, and the filters made from it.
//!
//! What the daemon and its workers may not do is listed, not what they may: a forgotten call would leave
//! something unreclaimed on a kernel or C library that nobody tried. A refused call answers `EPERM`, which
//! every caller handles, and does not kill. Readers and the metrics' server get a list of what they may.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};

use super::ConfineError;

/// What changes the host as a whole, or looks into other processes' memory: nobody here needs it.
const NOBODYS: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mknodat,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// A worker frees things. It starts nothing, talks to nobody, becomes nobody else, and makes, renames or
/// gives away no file.
const NO_WORKERS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_chroot,
    libc::SYS_connect,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fsetxattr,
    libc::SYS_ftruncate,
    libc::SYS_linkat,
    libc::SYS_listen,
    libc::SYS_lsetxattr,
    libc::SYS_mkdirat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_setgid,
    libc::SYS_setgroups,
    libc::SYS_setregid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setreuid,
    libc::SYS_setuid,
    libc::SYS_setxattr,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_symlinkat,
    libc::SYS_truncate,
    libc::SYS_utimensat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_accept,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_creat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_symlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
];

/// Reading, writing and waiting on descriptors that are there already, and what the C library and the
/// runtime need for themselves.
const READERS: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// What accepting connections needs on top.
const SERVERS: &[i64] =
    &[libc::SYS_accept4, libc::SYS_getpeername, libc::SYS_getsockname, libc::SYS_setsockopt];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

pub(super) fn daemon() -> Result<(), ConfineError> {
    apply(whole(NOBODYS), Unlisted::Allowed)
}

pub(super) fn worker() -> Result<(), ConfineError> {
    let mut forbidden = whole(NO_WORKERS);
    // `openat2`, which takes its flags in memory, is how workers go down into others' directories; a
    // filter cannot look there.
    forbidden.insert(libc::SYS_openat, vec![rule(2, libc::O_CREAT, libc::O_CREAT)?]);
    #[cfg(target_arch = "x86_64")]
    forbidden.insert(libc::SYS_open, vec![rule(1, libc::O_CREAT, libc::O_CREAT)?]);
    forbidden.insert(libc::SYS_clone3, Vec::new());
    apply(forbidden, Unlisted::Allowed)
}

/// What is forbidden to a worker on top of its origin, which becomes two by `clone`.
pub(super) fn no_copies() -> Result<Program, ConfineError> {
    Program::new(whole(&[libc::SYS_clone]), Unlisted::Allowed)
}

pub(super) fn reader() -> Result<(), ConfineError> {
    apply(listed(&[READERS])?, Unlisted::Forbidden)
}

pub(super) fn server() -> Result<(), ConfineError> {
    apply(listed(&[READERS, SERVERS])?, Unlisted::Forbidden)
}

fn listed(lists: &[&[i64]]) -> Result<Rules, ConfineError> {
    let mut allowed: Rules = lists.iter().flat_map(|list| whole(list)).collect();
    // Memory, but none that can be executed.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        allowed.insert(call, vec![rule(2, libc::PROT_EXEC, 0)?]);
    }
    let flags = [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL];
    let flags: Result<_, _> = flags.iter().map(|flag| rule(1, -1, *flag)).collect();
    allowed.insert(libc::SYS_fcntl, flags?);
    let non_blocking = i32::try_from(libc::FIONBIO).map_err(|error| ConfineError::Filter(Box::new(error)))?;
    allowed.insert(libc::SYS_ioctl, vec![rule(1, -1, non_blocking)?]);
    Ok(allowed)
}

/// Each of them, whatever its arguments.
fn whole(calls: &[i64]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// An argument of which those bits have that value.
fn rule(argument: u8, bits: i32, value: i32) -> Result<SeccompRule, ConfineError> {
    let compare = SeccompCmpOp::MaskedEq(u64::from(bits.cast_unsigned()));
    let value = u64::from(value.cast_unsigned());
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(|error| ConfineError::Filter(Box::new(error)))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unlisted {
    Allowed,
    Forbidden,
}

/// A filter, ready to be applied.
#[derive(Debug)]
pub(super) struct Program(BpfProgram);

impl Program {
    fn new(rules: Rules, unlisted: Unlisted) -> Result<Self, ConfineError> {
        let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
        let (others, these) = match unlisted {
            Unlisted::Allowed => (SeccompAction::Allow, refuse),
            Unlisted::Forbidden => (refuse, SeccompAction::Allow),
        };
        let build = || -> Result<BpfProgram, Box<dyn std::error::Error + Send + Sync>> {
            let filter = SeccompFilter::new(rules, others, these, std::env::consts::ARCH.try_into()?)?;
            Ok(filter.try_into()?)
        };
        build().map(Self).map_err(ConfineError::Filter)
    }

    /// Applies it to all threads of this process.
    pub(super) fn apply(&self) -> Result<(), ConfineError> {
        apply_filter_all_threads(&self.0).map_err(|error| ConfineError::Filter(Box::new(error)))
    }
}

fn apply(rules: Rules, unlisted: Unlisted) -> Result<(), ConfineError> {
    Program::new(rules, unlisted)?.apply()
}
