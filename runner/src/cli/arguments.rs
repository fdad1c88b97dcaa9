//! What was typed, without what it means.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Builds operating-system images without privileges, and shows what holds a builder's devices.
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
        default_value = "/run/hostler/hostler.sock"
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
    /// Build as the user that root has chosen; `build` starts this itself.
    #[command(name = "__build", hide = true)]
    BuildUnprivileged(BuildUnprivileged),
    /// Is this host fit to build on, and what to do where it is not.
    Doctor(Doctor),
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
}

#[derive(Debug, Args)]
pub(crate) struct BuildUnprivileged {
    #[arg(long)]
    pub(crate) user: u32,
    #[arg(long)]
    pub(crate) group: u32,
    #[arg(long)]
    pub(crate) kvm_group: Option<u32>,
    #[arg(long)]
    pub(crate) parent: u32,
    #[arg(long)]
    pub(crate) recipe: PathBuf,
    #[arg(long)]
    pub(crate) output: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Where an image would go.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) output: PathBuf,
    /// The download cache [default: $HOSTLER_CACHE, else hostler in the user's cache directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
}
