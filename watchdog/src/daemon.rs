//! Start and end of the daemon: everything that happens once.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as BlockingListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::thread::CapabilitySet;
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::causes::chain;
use crate::config::{Config, ConfigError};
use crate::confine::{self, ConfineError};
use crate::engine::{Engine, Parts};
use crate::journal::{Journal, JournalError};
use crate::kernel::events::Watcher;
use crate::kernel::{calls, cgroups, mounts};
use crate::metrics::Metrics;
use crate::model::{BootId, MountNamespace};
use crate::{api, http};

/// The initial mount namespace's inode number, the same on every host whose kernel numbers the
/// initial namespaces itself (`MNT_NS_INIT_INO`, `include/uapi/linux/nsfs.h`).
const INITIAL_MOUNT_NAMESPACE: MountNamespace = MountNamespace(0xEFFF_FFF8);

/// Why the daemon does not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Not root.
    #[error(
        "hostlerd needs root's privileges to end processes, unmount and detach; start it as root or by its systemd unit"
    )]
    NotRoot,
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Its mounts are not the host's.
    #[error(
        "hostlerd runs in mount namespace {own} and the host's is {host}: what it unmounts here would stay mounted there; take ProtectSystem=, PrivateTmp=, PrivateMounts= and their like out of its unit, or pass --own-mount-namespace if only this namespace is meant"
    )]
    ForeignNamespace {
        /// The daemon's own.
        own: u64,
        /// The host's.
        host: u64,
    },
    /// It cannot be told whose its mounts are.
    #[error(
        "whether hostlerd runs in the host's mount namespace cannot be told; pass --own-mount-namespace if only its own is meant"
    )]
    UnclearNamespace(#[source] io::Error),
    /// It has too many rights.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// Listening.
    #[error("listening on {place} failed")]
    Listen {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The group of `[api]`.
    #[error("[api] group: there is no group {0}; create it, or name another")]
    NoGroup(String),
    /// Anything of the kernel's that is needed from the start.
    #[error("{operation} failed")]
    Kernel {
        /// What.
        operation: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn kernel(operation: &'static str) -> impl FnOnce(io::Error) -> DaemonError {
    move |source| DaemonError::Kernel { operation, source }
}

/// How to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration's file, read again on SIGHUP; without one all is as by default.
    pub config: Option<PathBuf>,
    /// Only the daemon's own mount namespace is meant.
    pub own_mount_namespace: bool,
}

/// Runs until SIGTERM or SIGINT. Leases stay in the journal for the next start.
///
/// # Errors
/// When it cannot start.
pub fn run(options: &Options) -> Result<(), DaemonError> {
    let config = read_config(options)?;
    if !rustix::process::geteuid().is_root() {
        return Err(DaemonError::NotRoot);
    }
    if !options.own_mount_namespace {
        check_namespace()?;
    }
    raise_descriptor_limit();
    let activated = activated_socket()?;
    // Before there is a second thread, which would keep what the first gives up.
    confine::daemon(rights_to_listen(&config, activated.is_some()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(kernel("starting the asynchronous runtime"))?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, serve(options, config, activated))
}

/// What only the daemon's settings need: its own socket for a group, and a port below 1024.
fn rights_to_listen(config: &Config, is_activated: bool) -> CapabilitySet {
    let mut rights = CapabilitySet::empty();
    if !is_activated && config.api.group.is_some() {
        rights |= CapabilitySet::CHOWN;
    }
    if config.metrics.listen.is_some_and(|address| address.port() < 1024) {
        rights |= CapabilitySet::NET_BIND_SERVICE;
    }
    rights
}

fn read_config(options: &Options) -> Result<Config, ConfigError> {
    options.config.as_deref().map_or_else(|| Ok(Config::default()), Config::read)
}

fn check_namespace() -> Result<(), DaemonError> {
    let own = mounts::namespace_of(None).map_err(DaemonError::UnclearNamespace)?;
    if own == INITIAL_MOUNT_NAMESPACE {
        return Ok(());
    }
    // Kernels before 6.18 or so number it like any other; the first process is in it.
    let host = mounts::namespace_of(Some(1)).map_err(DaemonError::UnclearNamespace)?;
    if own == host { Ok(()) } else { Err(DaemonError::ForeignNamespace { own: own.0, host: host.0 }) }
}

/// The socket that systemd passed, when it did.
fn activated_socket() -> Result<Option<BlockingListener>, DaemonError> {
    let place = || "the socket that systemd passed".to_owned();
    let failed = |source| DaemonError::Listen { place: place(), source };
    let mut passed = sd_notify::listen_fds().map_err(failed)?;
    let Some(descriptor) = passed.next() else { return Ok(None) };
    if passed.next().is_some() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "more than one was passed")));
    }
    let socket = calls::inherited(descriptor).map_err(failed)?;
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    Ok(Some(BlockingListener::from(socket)))
}

/// A pidfd per lease and, in a worker, one per process of a lease: the usual soft limit of 1024 is soon
/// reached. Workers inherit it.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let hard = getrlimit(Resource::Nofile).maximum;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard }) {
        tracing::warn!("the limit on open descriptors stays as it is: {error}");
    }
}

fn boot_id() -> Result<BootId, DaemonError> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| BootId(text.trim().to_owned()))
        .map_err(kernel("reading the boot's identity"))
}

/// A socket that is removed with the daemon.
struct OwnSocket(PathBuf);

impl Drop for OwnSocket {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn bind(config: &Config) -> Result<(BlockingListener, OwnSocket), DaemonError> {
    let path = &config.api.socket;
    let failed = |source| DaemonError::Listen { place: path.display().to_string(), source };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    remove_dead_socket(path).map_err(failed)?;
    let group = match &config.api.group {
        Some(name) => {
            let found = nix::unistd::Group::from_name(name).map_err(|error| failed(error.into()))?;
            Some(found.ok_or_else(|| DaemonError::NoGroup(name.clone()))?.gid)
        }
        None => None,
    };
    let listener = BlockingListener::bind(path).map_err(failed)?;
    let own = OwnSocket(path.clone());
    let mode = if group.is_some() { 0o660 } else { 0o666 };
    if let Some(group) = group {
        std::os::unix::fs::chown(path, None, Some(group.as_raw())).map_err(failed)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok((listener, own))
}

/// Removes what a killed daemon left; a live one's stays, and binding then fails.
fn remove_dead_socket(path: &Path) -> io::Result<()> {
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Ok(_) | Err(_) => Ok(()),
    }
}

async fn serve(
    options: &Options,
    config: Config,
    activated: Option<BlockingListener>,
) -> Result<(), DaemonError> {
    let signals = Signals::new().map_err(kernel("waiting for signals"))?;
    let boot = boot_id()?;
    let (journal, recovered) = Journal::open(&config.state.directory, &boot)?;
    for line in &recovered.damaged {
        tracing::error!(line, "line {line} of the journal is damaged; the file is kept as journal.damaged");
    }
    let (events, mut happened) = mpsc::unbounded_channel();
    let watcher = Watcher::start(move |event| {
        // The daemon is stopping; nobody needs to know any more.
        let _ = events.send(event);
    })
    .map_err(kernel("watching the kernel's events"))?;
    let hierarchy = cgroups::detect().unwrap_or_else(|error| {
        tracing::warn!("control groups cannot be found: {error}");
        None
    });
    if hierarchy.is_none() {
        tracing::warn!("no control groups for leases on this host: processes are followed by descent");
    }
    let (listener, _own_socket) = match activated {
        Some(listener) => (listener, None),
        None => bind(&config).map(|(listener, own)| (listener, Some(own)))?,
    };
    // Each message tells its sender; connections have this from the listener.
    rustix::net::sockopt::set_socket_passcred(&listener, true)
        .map_err(|error| kernel("having the kernel tell who sends a message")(error.into()))?;
    let listener = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
    let listener = listener
        .map_err(|source| DaemonError::Listen { place: config.api.socket.display().to_string(), source })?;
    let metrics_listener = match config.metrics.listen {
        Some(address) => Some(http::bind(address).map_err(|source| DaemonError::Listen {
            place: format!("{address} ([metrics] listen)"),
            source,
        })?),
        None => None,
    };
    let program = std::env::current_exe().map_err(kernel("finding this program's own file"))?;
    let engine = Engine::new(Parts {
        config,
        program: program.clone(),
        journal,
        watcher,
        metrics: Metrics::new(),
        hierarchy,
        boot,
        next_lease: recovered.next_lease,
    });
    engine.forget_unopened(recovered.unopened).await;
    engine.take_up(recovered.leases.into_values().collect()).await;

    let handler = engine.clone();
    tokio::task::spawn_local(async move {
        while let Some(event) = happened.recv().await {
            handler.handle(event);
        }
    });
    let follower = engine.clone();
    tokio::task::spawn_local(async move { follower.follow_changes().await });
    let sweeper = engine.clone();
    tokio::task::spawn_local(async move { sweeper.sweep_regularly().await });
    tokio::task::spawn_local(api::serve(listener, engine.clone(), program.clone()));
    if let Some(listener) = metrics_listener {
        tokio::task::spawn_local(http::keep_serving(listener, engine.clone(), program));
    }
    write_metrics(&engine);

    tell_systemd(&[NotifyState::Ready]);
    tracing::info!("hostlerd {} is ready", env!("CARGO_PKG_VERSION"));
    keep_systemd_informed();
    until_stopped(options, &engine, signals).await;
    tell_systemd(&[NotifyState::Stopping]);
    tracing::info!("hostlerd stops; leases are taken up again at its next start");
    Ok(())
}

fn write_metrics(engine: &Engine) {
    let writer = engine.clone();
    tokio::task::spawn_local(async move {
        const INTERVAL: Duration = Duration::from_secs(15);
        loop {
            let Some(path) = writer.config().metrics.textfile else { return };
            match writer.metrics_text().await {
                Ok(text) => {
                    if let Err(error) = replace_file(&path, &text) {
                        tracing::warn!("the metrics could not be written to {}: {error}", path.display());
                    }
                }
                Err(error) => tracing::error!("the metrics could not be encoded: {error}"),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    });
}

/// node_exporter must never read half a file.
fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, text)?;
    std::fs::rename(&fresh, path)
}

/// The signals that have a meaning. Taken up before anybody can reach the daemon: until then each of
/// them would end it on the spot.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }
}

async fn until_stopped(options: &Options, engine: &Engine, mut signals: Signals) {
    loop {
        tokio::select! {
            _ = signals.hangup.recv() => match read_config(options) {
                Ok(config) => {
                    engine.set_config(config);
                    tracing::info!("the configuration was read again");
                }
                Err(error) => tracing::error!("the configuration stays as it was: {}", chain(&error)),
            },
            _ = signals.terminate.recv() => return,
            _ = signals.interrupt.recv() => return,
        }
    }
}

fn tell_systemd(state: &[NotifyState<'_>]) {
    // Without systemd there is nobody to tell, which is no error.
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("systemd could not be told: {error}");
    }
}

/// With `WatchdogSec=` systemd restarts a daemon that stops answering: one whose loop is stuck
/// sends nothing.
fn keep_systemd_informed() {
    if let Some(interval) = sd_notify::watchdog_enabled() {
        tokio::task::spawn_local(async move {
            loop {
                tell_systemd(&[NotifyState::Watchdog]);
                tokio::time::sleep(interval / 2).await;
            }
        });
    }
}
