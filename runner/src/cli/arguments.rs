//! What was typed, without what it means.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use super::cache::CacheArguments;
use super::lease::LeaseCommand;
use super::mirror::MirrorCommand;
use super::progress::{Form, Telling};
use super::run::RunArguments;
use super::status::StatusArguments;

/// Builds operating-system images without privileges, runs builders so that they cannot leak, and
/// shows what holds their devices.
///
/// Exit status: 0 done, 1 the build or command failed, 2 wrong usage or recipe, 3 refused, 4 the
/// watchdog is not reachable, 5 this host is not fit (`hostler doctor` tells why), 128 and a signal's
/// number when that signal stopped it in order.
#[derive(Debug, Parser)]
#[command(name = "hostler", version, propagate_version = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// The watchdog's socket.
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "HOSTLER_SOCKET",
        default_value = hostler_protocol::DEFAULT_SOCKET
    )]
    pub(crate) socket: PathBuf,
    /// Print one JSON document instead of text.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build an image.
    Build(Build),
    /// Look at the console of a machine that a build runs right now, and type into it; Ctrl-] leaves it.
    Attach {
        /// The output directory of the build, or the directory that it works in.
        #[arg(value_name = "DIR", default_value = ".")]
        directory: PathBuf,
    },
    /// Go on as the user that root has chosen; the commands start this themselves.
    #[command(name = "__unprivileged", hide = true)]
    Unprivileged(Unprivileged),
    /// Run a command under a lease: what it leaves behind is taken back when it ends or dies.
    ///
    /// Exit status, signals and terminal are the command's.
    Run(RunArguments),
    /// Open, close and list leases, for jobs that are no single process.
    #[command(subcommand)]
    Lease(LeaseCommand),
    /// Show leases, what belongs to them, and loop devices and qemu processes that belong to none.
    Status(StatusArguments),
    /// Show what holds a loop device, a mount point or a process.
    Why {
        /// A loop device (/dev/loop3), a mount point as findmnt shows it, or a process number.
        target: String,
    },
    /// Show what the watchdog would do: now for leases that are over, later for those in their grace,
    /// and at the next sweep for what a rule of its configuration takes for leaked.
    Plan,
    /// Take something back now (root only): what no lease has, or a whole lease.
    Reclaim(Reclaim),
    /// Look after the download cache: what it has, whether that is intact, and how it gets to another host.
    Cache(CacheArguments),
    /// Make and serve mirrors of release trees, whole or only what is needed of them.
    #[command(subcommand)]
    Mirror(MirrorCommand),
    /// Is this host fit, and what to do where it is not.
    Doctor(Doctor),
}

#[derive(Debug, Args)]
#[group(id = "wanted", required = true, multiple = false)]
pub(crate) struct Reclaim {
    /// A device (/dev/loop3) or a mount point as findmnt shows it, with all that lies on it. It is left
    /// when a lease has it, when [protect] protects it, and when somebody uses it.
    #[arg(group = "wanted")]
    pub(crate) target: Option<String>,
    /// End this lease; its number is as `hostler status` shows it.
    #[arg(long, value_name = "ID", group = "wanted")]
    pub(crate) lease: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Build {
    /// The recipe.
    #[arg(value_name = "RECIPE.toml")]
    pub(crate) recipe: PathBuf,
    /// Where the image goes.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) output: PathBuf,
    /// The download cache [default: $HOSTLER_CACHE, else hostler in the user's cache directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// When a guest fails, keep its disks, and what it was booted from, beside what is known of the failure.
    #[arg(long)]
    pub(crate) keep: bool,
    /// When a guest fails, keep it running for an hour, with a shell on its console, for `hostler attach`.
    #[arg(long)]
    pub(crate) shell_on_failure: bool,
    /// Do not build: try what holds the machine's process on this host, and say it.
    #[arg(long)]
    pub(crate) explain_confinement: bool,
    #[command(flatten)]
    pub(crate) telling: Telling,
    #[command(flatten)]
    pub(crate) supply: SupplyArguments,
}

/// What a build may use.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct SupplyArguments {
    /// Write what went into the image to this file: its lock. With --locked, the lock to keep to.
    #[arg(long, value_name = "FILE")]
    pub(crate) lock: Option<PathBuf>,
    /// Use exactly what the lock has, and refuse the rest by name [default lock: the recipe's path with
    /// .lock for .toml].
    #[arg(long)]
    pub(crate) locked: bool,
    /// Ask no upstream: end at once, by name, at the first thing that is not in the cache.
    #[arg(long)]
    pub(crate) offline: bool,
}

impl SupplyArguments {
    /// The lock to keep to.
    pub(crate) fn kept(&self, recipe: &Path) -> Option<PathBuf> {
        let default = || recipe.with_extension("lock");
        self.locked.then(|| self.lock.clone().unwrap_or_else(default))
    }

    /// Where the build's lock is to be written.
    pub(crate) fn written(&self) -> Option<&Path> {
        self.lock.as_deref().filter(|_| !self.locked)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Unprivileged {
    #[arg(long)]
    pub(crate) user: u32,
    #[arg(long)]
    pub(crate) group: u32,
    #[arg(long)]
    pub(crate) kvm_group: Option<u32>,
    /// Root's process has a lease already, which covers this one.
    #[arg(long)]
    pub(crate) registered: bool,
    /// The path of the working directory, for people.
    #[arg(long)]
    pub(crate) cache: PathBuf,
    /// The recipe's path, for people; without one, the host is examined.
    #[arg(long)]
    pub(crate) recipe: Option<PathBuf>,
    /// When a guest fails, keep its disks, and what it was booted from, beside what is known of the failure.
    #[arg(long)]
    pub(crate) keep: bool,
    /// When a guest fails, keep it running for an hour, with a shell on its console, for `hostler attach`.
    #[arg(long)]
    pub(crate) shell_on_failure: bool,
    /// Only say what holds the machine's process.
    #[arg(long)]
    pub(crate) explain_confinement: bool,
    /// How to show the progress.
    #[arg(long, value_enum, default_value_t = Form::Plain)]
    pub(crate) progress: Form,
    /// The path of the lock that is handed over, for people.
    #[arg(long)]
    pub(crate) locked: Option<PathBuf>,
    /// Whether the lock is to be handed over.
    #[arg(long)]
    pub(crate) locks: bool,
    #[arg(long)]
    pub(crate) offline: bool,
    /// How long the host may be examined.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "5min")]
    pub(crate) limit: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Where an image would go.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) output: PathBuf,
    /// The download cache [default: $HOSTLER_CACHE, else hostler in the user's cache directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// How long to try which accelerator runs a guest, with the downloads that this needs.
    #[arg(long, value_name = "TIME", default_value = "5min", value_parser = humantime::parse_duration)]
    pub(crate) limit: Duration,
}
