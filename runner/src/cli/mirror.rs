//! `hostler mirror`.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use hostler_runner::build::fetch_options;
use hostler_runner::cache::{Cache, Clients, FetchOptions, Fetcher, Mirror, StoreError};
use hostler_runner::causes::in_one_line;
use hostler_runner::event::{Event, Sink, Stage};
use hostler_runner::lock::Lock;
use hostler_runner::mirror::{Directory, Plan, Published, Served, Verified, debian, rpm};
use hostler_runner::recipe::{Debian, PackageSource};
use hostler_runner::stop::Stop;
use serde_json::json;

use super::arguments::Global;
use super::build::tell;
use super::exit::Exit;
use super::{Failure, delegate, print, print_json, progress, signals};

#[derive(Debug, Subcommand)]
pub(crate) enum MirrorCommand {
    /// Bring a mirror up to date. It changes in one step, after everything is there and checked; what was
    /// fetched before something failed is not fetched again.
    #[command(subcommand)]
    Sync(SyncCommand),
    /// Serve the newest snapshot over HTTP, each file checked, until told to stop.
    Serve {
        /// The mirror.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Where to listen.
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8000")]
        listen: SocketAddr,
    },
    /// Show what a mirror has.
    List {
        /// The mirror.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Check every byte; what is damaged is fetched again, in all snapshots. Exit status 1 when something was.
    Verify {
        /// The mirror.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SyncCommand {
    /// Suites of a Debian archive, with their updates and security updates where this host's apt sources
    /// have them.
    Debian(SyncDebian),
    /// A release tree of Fedora's kind, or any repository of rpms.
    Rpm(SyncRpm),
}

#[derive(Debug, Args)]
struct Destination {
    /// The mirror's directory; made where it is missing. Root goes on as the user that it belongs to.
    #[arg(long, value_name = "DIR")]
    into: PathBuf,
    /// How many snapshots before the newest stay.
    #[arg(long, value_name = "N", default_value_t = 2)]
    keep: usize,
    /// Let suites go that the mirror has and this sync does not name.
    #[arg(long)]
    replace: bool,
    /// Downloads at the same time.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    parallel: u8,
}

#[derive(Debug, Args)]
pub(crate) struct SyncDebian {
    #[command(flatten)]
    into: Destination,
    /// The archive's address; without one, this host's own apt sources are used.
    #[arg(long, value_name = "URL")]
    source: Option<String>,
    /// The suite's code name.
    #[arg(long, value_name = "NAME")]
    suite: String,
    /// Architectures.
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_value = "amd64")]
    architecture: Vec<String>,
    /// Components.
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_value = "main")]
    component: Vec<String>,
    /// The keyring of the archive's signer, if it is not Debian's.
    #[arg(long, value_name = "FILE")]
    keyring: Option<PathBuf>,
    /// Only these packages, the essential ones and apt, with what they depend on; may be repeated.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    packages: Vec<String>,
    /// The same with the names in a file, one a line; # begins a comment.
    #[arg(long, value_name = "FILE")]
    packages_from: Vec<PathBuf>,
    /// Only the packages that this lock of a build has, from the release that it has.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["packages", "packages_from", "source"])]
    lock: Option<PathBuf>,
    /// The installer's images in this folder (netboot, cdrom, …; all), and the installer's own packages; may be
    /// repeated.
    #[arg(long, value_name = "FOLDER", value_delimiter = ',')]
    installer: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct SyncRpm {
    #[command(flatten)]
    into: Destination,
    /// The folder that the tree gets in the mirror.
    #[arg(long, value_name = "NAME")]
    name: String,
    /// The tree's address; may be repeated for equal mirrors.
    #[arg(long, value_name = "URL")]
    source: Vec<String>,
    /// The address of a metalink, which also says what the tree's metadata is, or of a list of mirrors.
    #[arg(long, value_name = "URL")]
    mirror_list: Option<String>,
    /// The keyring of who signs the tree's metadata.
    #[arg(long, value_name = "FILE")]
    keyring: Option<PathBuf>,
    /// Architectures of packages, beside noarch [default: all].
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    architecture: Vec<String>,
    /// Only these packages with what they need; may be repeated.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    packages: Vec<String>,
    /// Also the images that the tree's .treeinfo names: kernels, initial file systems, discs.
    #[arg(long)]
    images: bool,
}

fn failed(error: impl Into<anyhow::Error>) -> Failure {
    Failure::new(Exit::Failed, error)
}

/// Runs the command.
pub(crate) fn mirror(global: &Global, command: MirrorCommand) -> Result<Exit, Failure> {
    match command {
        MirrorCommand::Sync(SyncCommand::Debian(wanted)) => sync_debian(global, wanted),
        MirrorCommand::Sync(SyncCommand::Rpm(wanted)) => sync_rpm(global, wanted),
        MirrorCommand::Serve { directory, listen } => serve(&directory, listen),
        MirrorCommand::List { directory } => list(global, &directory),
        MirrorCommand::Verify { directory } => verify(global, &directory),
    }
}

/// What works on a mirror: as its owner, until a signal comes.
struct Work {
    directory: Directory,
    fetcher: Fetcher,
    sink: Arc<dyn Sink>,
}

impl Work {
    fn begin(
        root: &Path,
        make: bool,
        store: fn(&Directory) -> Result<Cache, StoreError>,
        change: impl FnOnce(&mut FetchOptions),
    ) -> Result<Self, Failure> {
        if make && !root.exists() && !rustix::process::geteuid().is_root() {
            std::fs::create_dir_all(root)
                .with_context(|| format!("cannot make {}", root.display()))
                .map_err(failed)?;
        }
        become_owner(root)?;
        let cancel = signals::cancel()?;
        let directory = if make { Directory::create(root) } else { Directory::open(root) }.map_err(failed)?;
        let mut options = fetch_options(&Stop::new(cancel));
        change(&mut options);
        let store = Arc::new(store(&directory).map_err(failed)?);
        let fetcher = Fetcher::new(store, options).map_err(failed)?;
        Ok(Self { directory, fetcher, sink: progress::simple() })
    }

    /// Runs a stage; a signal that ended it is the command's ending.
    fn stage<T>(
        &self,
        stage: Stage,
        work: impl FnOnce(&Self) -> Result<T, anyhow::Error>,
    ) -> Result<T, Failure> {
        self.sink.event(Event::Started(stage));
        let done = work(self).map_err(|error| match signals::received() {
            Some(signal) => Failure::new(Exit::Stopped(signal), error),
            None => failed(error),
        })?;
        self.sink.event(Event::Finished(stage));
        Ok(done)
    }
}

fn become_owner(root: &Path) -> Result<(), Failure> {
    delegate::become_owner(root)
        .with_context(|| format!("cannot work in the mirror {}", root.display()))
        .map_err(failed)
}

fn sync_debian(global: &Global, wanted: SyncDebian) -> Result<Exit, Failure> {
    let usage = |error: anyhow::Error| Failure::new(Exit::Usage, error);
    let mut packages = wanted.packages;
    for path in &wanted.packages_from {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the list of packages {}", path.display()))
            .map_err(usage)?;
        let names = text.lines().filter_map(|line| line.split('#').next()?.split_whitespace().next());
        packages.extend(names.map(str::to_owned));
    }
    let lock = wanted.lock.as_deref().map(Lock::load).transpose();
    let lock = lock.map_err(|error| usage(error.into()))?;
    let extent = match &lock {
        Some(lock) => debian::Extent::Digests(lock.digests().into_iter().collect()),
        None if packages.is_empty() => debian::Extent::Whole,
        None => debian::Extent::Closure,
    };
    let source = match wanted.source {
        Some(url) if url.starts_with("http://") || url.starts_with("https://") => {
            PackageSource::Url(url.trim_end_matches('/').to_owned())
        }
        Some(url) => {
            return Err(usage(anyhow::anyhow!("{url:?} is no address: write http://… or https://…")));
        }
        None => PackageSource::HostApt,
    };
    let wish = debian::Wish {
        archive: Debian {
            source,
            suite: wanted.suite,
            architecture: String::new(),
            components: wanted.component,
            keyring: wanted.keyring,
            packages,
        },
        architectures: wanted.architecture,
        extent,
        installer: wanted.installer,
    };
    sync(global, &wanted.into, lock, |work| {
        Ok(debian::plan(&wish, &work.fetcher, Path::new("/"), work.sink.as_ref())?)
    })
}

fn sync_rpm(global: &Global, wanted: SyncRpm) -> Result<Exit, Failure> {
    let is_folder = !wanted.name.is_empty()
        && !wanted.name.starts_with('.')
        && wanted.name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte));
    if !is_folder {
        let error = anyhow::anyhow!(
            "{:?} is no name of a folder: use letters, digits, '.', '_', '-', '+'",
            wanted.name
        );
        return Err(Failure::new(Exit::Usage, error));
    }
    let wish = rpm::Wish {
        name: wanted.name,
        roots: wanted.source.iter().map(|root| root.trim_end_matches('/').to_owned()).collect(),
        mirror_list: wanted.mirror_list,
        keyring: wanted.keyring,
        architectures: wanted.architecture,
        packages: wanted.packages,
        images: wanted.images,
    };
    sync(global, &wanted.into, None, |work| Ok(rpm::plan(&wish, &work.fetcher, work.sink.as_ref())?))
}

fn sync(
    global: &Global,
    into: &Destination,
    lock: Option<Lock>,
    plan: impl FnOnce(&Work) -> Result<Plan, anyhow::Error>,
) -> Result<Exit, Failure> {
    let work = Work::begin(&into.into, true, Directory::store, |options| {
        options.parallel = usize::from(into.parallel);
        options.supply.lock = lock.map(Arc::new);
    })?;
    let mut plan = work.stage(Stage::Select, plan)?;
    plan.replace = into.replace;
    let published = work.stage(Stage::Fetch, |work| {
        Ok(work.directory.publish(plan, into.keep, &work.fetcher, work.sink.as_ref())?)
    })?;
    let counted = work.fetcher.counted();
    drop(work);
    let Published { snapshot, changed, files, bytes, removed } = published;
    if global.json {
        return print_json(&json!({
            "snapshot": snapshot,
            "changed": changed,
            "files": files,
            "bytes": bytes,
            "removed": removed,
            "upstream_bytes": counted.upstream_bytes + counted.metadata_bytes,
        }));
    }
    let what = if changed { "made snapshot" } else { "nothing has changed since snapshot" };
    let mut text = format!(
        "{what} {snapshot}: {files} files, {}; downloaded {}\n",
        ByteSize(bytes),
        ByteSize(counted.upstream_bytes + counted.metadata_bytes)
    );
    for name in removed {
        text.push_str(&format!("removed snapshot {name}\n"));
    }
    print(&text)
}

fn serve(root: &Path, listen: SocketAddr) -> Result<Exit, Failure> {
    // Before root's privileges go: they may be what a port needs.
    let listener =
        TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}")).map_err(failed)?;
    let address = listener.local_addr()?;
    let work = Work::begin(root, false, Directory::served_store, |_| {})?;
    let served = Served::open(root).map_err(failed)?;
    let folders: Vec<String> = served.manifest().folders.keys().cloned().collect();
    let fetcher = Arc::new(work.fetcher);
    let mirror = Mirror::start(listener, served, Clients::Anyone, Arc::clone(&fetcher)).map_err(failed)?;
    for folder in folders {
        tell(&format!("serving http://{address}/{folder}"));
    }
    while fetcher.stop().check().is_ok() {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let report = mirror.stop();
    tell(&format!("answered {} requests with {}", report.requests, ByteSize(report.served_bytes)));
    Ok(Exit::Done)
}

fn list(global: &Global, root: &Path) -> Result<Exit, Failure> {
    become_owner(root)?;
    let directory = Directory::open(root).map_err(failed)?;
    let current = directory.current().map_err(failed)?;
    let mut text = String::new();
    let mut documents = Vec::new();
    for name in directory.snapshots().map_err(failed)? {
        let manifest = directory.manifest(&name).map_err(failed)?;
        let is_current = current.as_ref() == Some(&name);
        let folders: Vec<_> = manifest
            .folders
            .iter()
            .map(|(name, folder)| json!({ "name": name, "about": folder.about, "upstreams": folder.upstreams }))
            .collect();
        documents.push(json!({
            "snapshot": name,
            "current": is_current,
            "files": manifest.files.len(),
            "bytes": manifest.size(),
            "folders": folders,
        }));
        let mark = if is_current { ", current" } else { "" };
        text.push_str(&format!(
            "{name}: {} files, {}{mark}\n",
            manifest.files.len(),
            ByteSize(manifest.size())
        ));
        for (name, folder) in &manifest.folders {
            text.push_str(&format!("  {name}: {}\n", folder.about));
        }
    }
    if global.json { print_json(&documents) } else { print(&text) }
}

fn verify(global: &Global, root: &Path) -> Result<Exit, Failure> {
    let work = Work::begin(root, false, Directory::store, |_| {})?;
    let verified =
        work.stage(Stage::Verify, |work| Ok(work.directory.verify(&work.fetcher, work.sink.as_ref())?))?;
    drop(work);
    let Verified { intact, bytes, repaired, lost } = verified;
    let exit = if repaired.is_empty() && lost.is_empty() { Exit::Done } else { Exit::Failed };
    if global.json {
        let repaired: Vec<String> = repaired.iter().map(ToString::to_string).collect();
        let lost: Vec<_> =
            lost.iter().map(|(path, error)| json!({ "path": path, "reason": in_one_line(error) })).collect();
        print_json(&json!({ "intact": intact, "bytes": bytes, "repaired": repaired, "lost": lost }))?;
        return Ok(exit);
    }
    for digest in &repaired {
        tell(&format!("damaged, and fetched again: {digest}"));
    }
    for (path, error) in &lost {
        tell(&format!("damaged, and cannot be fetched again: {path}: {}", in_one_line(error)));
    }
    if !lost.is_empty() {
        tell("what cannot be fetched stays damaged in the snapshots that have it; sync for a new one");
    }
    print(&format!("{intact} files are intact, {}\n", ByteSize(bytes)))?;
    Ok(exit)
}
