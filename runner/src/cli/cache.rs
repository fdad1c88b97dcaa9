//! `hostler cache`.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use hostler_runner::cache::{ArchiveError, Cache, Carried, limit};
use hostler_runner::lock::Lock;
use hostler_runner::stop::Stop;
use serde_json::json;

use super::arguments::Global;
use super::build::{cache_directory, tell};
use super::exit::Exit;
use super::{Failure, delegate, print, print_json, signals};

#[derive(Debug, Args)]
pub(crate) struct CacheArguments {
    /// The cache [default: $HOSTLER_CACHE, else hostler in the user's cache directory; root's is
    /// /var/cache/hostler, in which the user that builds for root has a directory].
    #[arg(long, value_name = "DIR", global = true)]
    cache: Option<PathBuf>,
    #[command(subcommand)]
    command: CacheCommand,
}

#[derive(Debug, Subcommand)]
enum CacheCommand {
    /// Show what the cache has: how much, how much of it is in use, and since when the rest is not.
    Stat,
    /// Check every byte, and remove what is damaged. Exit status 1 when something was.
    Verify,
    /// Remove what was not used for longest; never what a running build or a lock needs.
    Prune {
        /// How much may stay, such as 10GiB [default: $HOSTLER_CACHE_LIMIT, else 32GiB].
        #[arg(long, value_name = "SIZE")]
        limit: Option<ByteSize>,
        /// Remove all that was not used for so long, such as 30days.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        unused_for: Option<Duration>,
    },
    /// Write the cache to a tar archive, for a host without a network.
    Export {
        /// The archive; - is the standard output.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Only what the lock of a build needs, and all of that.
        #[arg(long, value_name = "FILE")]
        lock: Option<PathBuf>,
    },
    /// Take what an archive of `export` has. Each file has to be what its digest says.
    Import {
        /// The archive; - is the standard input.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

/// An archive, opened as whoever calls.
enum Opened {
    Nothing,
    Out(Box<dyn Write>, Option<Box<Lock>>),
    In(Box<dyn Read>),
}

/// Runs the command.
pub(crate) fn cache(global: &Global, wanted: CacheArguments) -> Result<Exit, Failure> {
    let failed = |error: anyhow::Error| Failure::new(Exit::Failed, error);
    let opened = open(&wanted.command).map_err(failed)?;
    let (directory, shown) = enter(wanted.cache.as_deref())?;
    let cache = Cache::open(&directory).map_err(|error| Failure::new(Exit::Failed, error))?;
    match (wanted.command, opened) {
        (CacheCommand::Stat, _) => stat(global, &cache, &shown),
        (CacheCommand::Verify, _) => verify(global, &cache),
        (CacheCommand::Prune { limit: asked, unused_for }, _) => {
            let most = match (asked, unused_for) {
                (Some(size), _) => size.0,
                (None, Some(_)) => u64::MAX,
                (None, None) => {
                    limit(|name| std::env::var_os(name)).map_err(|error| Failure::new(Exit::Usage, error))?
                }
            };
            prune(global, &cache, most, unused_for)
        }
        (CacheCommand::Export { file, .. }, Opened::Out(to, lock)) => {
            let only = lock.as_deref().map(Lock::digests);
            let carried = cache.export(only.as_deref(), to).map_err(|error| {
                leave_no_half(&file);
                failed(named(error, lock.as_deref()))
            })?;
            // The standard output may be the archive.
            tell(&told("wrote", carried));
            Ok(Exit::Done)
        }
        (CacheCommand::Import { .. }, Opened::In(from)) => {
            let carried = cache.import(from).map_err(|error| failed(error.into()))?;
            if global.json {
                return print_json(&json!({
                    "files": carried.files, "bytes": carried.bytes, "known": carried.known,
                }));
            }
            print(&format!("{}\n", told("took", carried)))
        }
        (CacheCommand::Export { .. } | CacheCommand::Import { .. }, _) => Ok(Exit::Usage),
    }
}

/// An error that names what is missing as the lock does.
fn named(error: ArchiveError, lock: Option<&Lock>) -> anyhow::Error {
    let name = match (&error, lock) {
        (ArchiveError::Missing(digest), Some(lock)) => lock.name_of(*digest),
        _ => None,
    };
    let context = name.map(|name| format!("cannot export {name}"));
    match context {
        Some(context) => anyhow::Error::new(error).context(context),
        None => error.into(),
    }
}

/// Removes an archive that could not be finished: nobody is to take it for a whole one, or to be kept from the
/// next try by it.
fn leave_no_half(file: &Path) {
    if file.as_os_str() == "-" {
        return;
    }
    if let Err(error) = std::fs::remove_file(file) {
        // Root's file is not to be removed by the user that root has become.
        tell(&format!("hostler: {} is not whole, remove it: {error}", file.display()));
    }
}

fn open(command: &CacheCommand) -> anyhow::Result<Opened> {
    let read =
        |lock: &Option<PathBuf>| lock.as_deref().map(Lock::load).transpose().map(|lock| lock.map(Box::new));
    let is_standard = |path: &Path| path.as_os_str() == "-";
    Ok(match command {
        CacheCommand::Export { file, lock } if is_standard(file) => {
            anyhow::ensure!(!io::stdout().is_terminal(), "an archive is nothing for a terminal: name a file");
            Opened::Out(Box::new(io::stdout()), read(lock)?)
        }
        CacheCommand::Export { file, lock } => {
            let lock = read(lock)?;
            let created = File::create_new(file);
            Opened::Out(Box::new(created.with_context(|| format!("cannot create {}", file.display()))?), lock)
        }
        CacheCommand::Import { file } if is_standard(file) => Opened::In(Box::new(io::stdin())),
        CacheCommand::Import { file } => {
            let opened = File::open(file);
            Opened::In(Box::new(opened.with_context(|| format!("cannot open {}", file.display()))?))
        }
        _ => Opened::Nothing,
    })
}

/// The cache's directory, and what it is called. Root goes on as the user that it belongs to.
fn enter(asked: Option<&Path>) -> Result<(PathBuf, PathBuf), Failure> {
    if rustix::process::geteuid().is_root() {
        let shown = delegate::enter_cache(asked).map_err(|error| Failure::new(Exit::Failed, error))?;
        return Ok((PathBuf::from("."), shown));
    }
    let directory = cache_directory(asked).map_err(|error| Failure::new(Exit::Usage, error))?;
    Ok((directory.clone(), directory))
}

fn told(did: &str, carried: Carried) -> String {
    let known = match carried.known {
        0 => String::new(),
        known => format!("; {known} were there already"),
    };
    format!("{did} {} files, {}{known}", carried.files, ByteSize(carried.bytes))
}

fn stat(global: &Global, cache: &Cache, shown: &Path) -> Result<Exit, Failure> {
    let failed = |error| Failure::new(Exit::Failed, error);
    let contents = cache.contents().map_err(failed)?;
    let limit = limit(|name| std::env::var_os(name)).map_err(|error| Failure::new(Exit::Usage, error))?;
    let sum = |keep: fn(&hostler_runner::cache::Content) -> bool| -> (usize, u64) {
        let kept = contents.iter().filter(|content| keep(content));
        kept.fold((0, 0), |(count, bytes), content| (count + 1, bytes + content.size))
    };
    let (files, bytes) = sum(|_| true);
    let (in_use, in_use_bytes) = sum(|content| content.in_use);
    let (needed, needed_bytes) = sum(|content| content.needed && !content.in_use);
    let oldest = contents.iter().map(|content| content.used).min();
    if global.json {
        return print_json(&json!({
            "directory": shown,
            "files": files,
            "bytes": bytes,
            "limit_bytes": limit,
            "in_use_files": in_use,
            "in_use_bytes": in_use_bytes,
            "locked_files": needed,
            "locked_bytes": needed_bytes,
            "oldest_use": oldest,
        }));
    }
    let mut text =
        format!("{}: {files} files, {} of at most {}\n", shown.display(), ByteSize(bytes), ByteSize(limit));
    if in_use > 0 {
        text.push_str(&format!("running builds use {in_use} files, {}\n", ByteSize(in_use_bytes)));
    }
    if needed > 0 {
        text.push_str(&format!("locks need {needed} files, {}\n", ByteSize(needed_bytes)));
    }
    if let Some(oldest) = oldest {
        let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(oldest));
        let days = age.map_or(0, |age| age.as_secs() / 86_400);
        text.push_str(&format!("the longest unused was used {days} days ago\n"));
    }
    print(&text)
}

fn verify(global: &Global, cache: &Cache) -> Result<Exit, Failure> {
    let cancel = signals::cancel()?;
    let said = AtomicU64::new(0);
    let shows = io::stderr().is_terminal();
    let progress = |bytes: u64| {
        // A line for each GiB on a terminal; in a log the result is enough.
        if shows && said.fetch_max(bytes >> 30, Ordering::Relaxed) < bytes >> 30 {
            tell(&format!("checked {}", ByteSize(bytes)));
        }
    };
    let audit = cache.audit(&Stop::new(cancel), &progress);
    let audit = audit.map_err(|error| match signals::received() {
        Some(signal) => Failure::new(Exit::Stopped(signal), error),
        None => Failure::new(Exit::Failed, error),
    })?;
    let exit = if audit.damaged.is_empty() { Exit::Done } else { Exit::Failed };
    if global.json {
        let damaged: Vec<String> = audit.damaged.iter().map(ToString::to_string).collect();
        print_json(&json!({ "intact": audit.intact, "bytes": audit.bytes, "damaged": damaged }))?;
        return Ok(exit);
    }
    for digest in &audit.damaged {
        tell(&format!("damaged, and removed: {digest}"));
    }
    if !audit.damaged.is_empty() {
        tell("what was damaged is fetched again when it is needed; look after the disk");
    }
    print(&format!("{} files are intact, {}\n", audit.intact, ByteSize(audit.bytes)))?;
    Ok(exit)
}

fn prune(global: &Global, cache: &Cache, most: u64, unused_for: Option<Duration>) -> Result<Exit, Failure> {
    let older_than = unused_for.and_then(|time| SystemTime::now().checked_sub(time));
    let shrunk = cache.shrink(most, older_than).map_err(|error| Failure::new(Exit::Failed, error))?;
    if global.json {
        return print_json(&json!({
            "removed_files": shrunk.files,
            "removed_bytes": shrunk.bytes,
            "bytes": shrunk.left,
            "needed_bytes": shrunk.needed,
        }));
    }
    let mut text = format!(
        "removed {} files, {}; {} stay\n",
        shrunk.files,
        ByteSize(shrunk.bytes),
        ByteSize(shrunk.left)
    );
    if shrunk.left > most {
        let needed = ByteSize(shrunk.needed);
        text.push_str(&format!("running builds and locks need {needed}, so it is still above the limit\n"));
    }
    print(&text)
}
