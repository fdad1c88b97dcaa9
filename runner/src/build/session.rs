//! The stages of one build, in their order.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::beside::Beside;
use crate::cache::{self, Cache, Counted, Digest, FetchOptions, Fetcher, Proxies, Remote, Supply};
use crate::cancel::Cancel;
use crate::causes::in_one_line;
use crate::debian::{self, Selection};
use crate::disk::{self, BuilderTools, ComposedDisk};
use crate::event::{Event, Sink, Stage};
use crate::lock::{Lock, LockedMachine, LockedRecipe, LockedTool};
use crate::recipe::{Kind, Recipe};
use crate::stop::{Stop, Stopped};
use crate::vm::argv::Accelerator;
use crate::vm::canary::Canary;

use super::bundle::{self, Bundle};
use super::delivery::Delivery;
use super::error::{BuildError, Failed};
use super::image::{self, Packing};
use super::preflight::{Fitness, Host, Needs, Workspace, examine};
use super::product::Product;
use super::registrar::{Ending, Registrar};
use super::scratch::{Scratch, sweep};

/// How long the shared store may take to be given what it lacked, after a build.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

/// How long stages that notice late that they are to stop are waited for.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// What to build, and where.
#[derive(Clone, Debug)]
pub struct Request {
    /// The recipe.
    pub recipe: Recipe,
    /// Where the scratch directory is made.
    pub workspace: Workspace,
    /// The folder of the recipe.
    pub beside: Beside,
    /// The download cache.
    pub cache: PathBuf,
    /// The root of the file system whose apt sources count.
    pub apt_root: PathBuf,
    /// What is done for a person who looks for the cause of a failure.
    pub debugging: Debugging,
    /// What the build may use.
    pub supply: Supply,
    /// Whether it delivers its lock.
    pub locks: bool,
}

/// What is done for a person who looks for the cause of a failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Debugging {
    /// Keep the disks of a guest that failed beside what is known of it.
    pub keeps: bool,
    /// Keep a guest that failed running, with a shell on its console where it can have one.
    pub holds: bool,
}

/// What a build has around it.
#[derive(Clone)]
pub struct Environment {
    /// The `hostler` program, for `hostler __vm`.
    pub shim: PathBuf,
    /// The watchdog.
    pub registrar: Arc<dyn Registrar>,
    /// The wish to stop.
    pub cancel: Arc<Cancel>,
    /// Takes the progress.
    pub sink: Arc<dyn Sink>,
    /// Takes the finished files.
    pub delivery: Arc<dyn Delivery>,
}

/// A file that a build made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its SHA-256 digest in hexadecimal.
    pub sha256: String,
}

/// A finished build.
#[derive(Clone, Debug)]
pub struct Built {
    /// What was asked for; the image comes first, where there is one.
    pub files: Vec<BuiltFile>,
    /// What went in, if that was asked for.
    pub lock: Option<PathBuf>,
    /// The guests' consoles, the verified image's last.
    pub logs: Vec<PathBuf>,
    /// What executed the guests.
    pub accelerator: Accelerator,
    /// How long each stage took.
    pub stages: Vec<(Stage, Duration)>,
    /// When each of the builder guest's steps began, counted from its start.
    pub steps: Vec<(String, Duration)>,
    /// What was downloaded.
    pub counted: Counted,
    /// How many packages were chosen.
    pub packages: usize,
    /// How long it took as a whole.
    pub took: Duration,
}

/// Builds an image.
///
/// # Errors
/// See [`BuildError`]. Nothing is left then but the [`super::bundle`] in the output directory.
pub fn build(request: &Request, environment: &Environment) -> Result<Built, Failed> {
    let started = Instant::now();
    let stop = Stop::new(Arc::clone(&environment.cancel)).at(started + request.recipe.limits.total);
    let result = Session::run(request, environment, started, stop);
    let ending = match &result {
        Ok(_) => Ending::Succeeded,
        Err(failed) if failed.error.is_cancelled() => Ending::Cancelled,
        Err(_) => Ending::Failed,
    };
    // A build that failed may have downloaded as well; only a finished one has counted it.
    let counted = result.as_ref().map(|built| built.counted).unwrap_or_default();
    environment.registrar.report(ending, started.elapsed().as_secs_f64(), counted);
    result
}

pub(super) struct Session<'a> {
    pub(super) request: &'a Request,
    pub(super) environment: &'a Environment,
    pub(super) started: Instant,
    pub(super) stop: Stop,
    pub(super) scratch: Scratch,
    stages: Vec<(Stage, Duration)>,
    /// What machines were told, as a lock has it.
    pub(super) machines: Mutex<Vec<LockedMachine>>,
    /// By how much limits on silence are stretched.
    pub(super) slowness: u32,
}

/// What the first of the stages that need the network comes to.
pub(super) struct Chosen {
    pub(super) selection: Arc<Selection>,
    pub(super) fetcher: Arc<Fetcher>,
}

/// What all of them come to.
pub(super) struct Packages {
    pub(super) selection: Arc<Selection>,
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) tools: BuilderTools,
}

impl<'a> Session<'a> {
    fn run(
        request: &'a Request,
        environment: &'a Environment,
        started: Instant,
        stop: Stop,
    ) -> Result<Built, Failed> {
        let Workspace { folder, shown, option } = &request.workspace;
        fs::create_dir_all(folder).map_err(|source| BuildError::Workspace {
            option,
            path: shown.clone(),
            source,
        })?;
        for swept in sweep(folder).map_err(BuildError::from)? {
            let path = shown.join(swept.file_name().unwrap_or_default());
            environment.sink.event(Event::Note(format!("removed {}, whose build is dead", path.display())));
        }
        let preflight = Instant::now();
        environment.sink.event(Event::Started(Stage::Preflight));
        let host = preflight_host(request, environment, &stop)
            .inspect_err(|_| environment.sink.event(Event::GaveUp(Stage::Preflight)))?;
        environment.sink.event(Event::Finished(Stage::Preflight));

        let scratch = Scratch::create(folder).map_err(BuildError::from)?;
        let claimed = environment.registrar.claim_directory(std::os::fd::AsFd::as_fd(&scratch));
        claimed.map_err(BuildError::Claim)?;
        let stages = vec![(Stage::Preflight, preflight.elapsed())];
        let mut session = Session {
            request,
            environment,
            started,
            stop,
            scratch,
            stages,
            machines: Mutex::default(),
            slowness: 1,
        };
        let made = session.make(&host).map_err(|error| {
            let page = session.bundle(&error);
            Failed { error: Box::new(error), page }
        });
        // What is left of a build that failed is removed all the same, and said first.
        let removed = session.scratch.remove();
        let built = made?;
        removed.map_err(BuildError::from)?;
        Ok(built)
    }

    /// Delivers what is known of a failure; the page. Nothing failed in a build that somebody stopped, and
    /// that a bundle cannot be delivered is told and changes nothing.
    fn bundle(&self, error: &BuildError) -> Option<PathBuf> {
        if error.is_cancelled() {
            return None;
        }
        let name = &self.request.recipe.image.name;
        let guest = match error {
            BuildError::Guest(guest) => Some(guest.as_ref()),
            _ => None,
        };
        let bundle = Bundle {
            name,
            class: error.class(),
            message: in_one_line(error),
            stages: self.stages.clone(),
            took: self.started.elapsed(),
            guest: guest.map(|guest| bundle::Guest {
                report: &guest.report,
                console_log: &guest.logs.console,
                installer_log: Some(&guest.logs.installer),
                picture: guest.report.has_picture.then_some(guest.logs.picture.as_path()),
            }),
        };
        let folder = format!("{name}{}", bundle::ENDING);
        let deliver = || -> Result<PathBuf, Box<dyn std::error::Error>> {
            let mut page = PathBuf::new();
            for disk in guest.filter(|_| self.request.debugging.keeps).iter().flat_map(|guest| &guest.disks) {
                self.environment.delivery.deliver(disk, Some(&folder))?;
            }
            for file in bundle.write(&self.scratch.path().join(&folder))? {
                page = self.environment.delivery.deliver(&file, Some(&folder))?;
            }
            Ok(page)
        };
        deliver()
            .inspect_err(|error| {
                let told =
                    format!("could not keep what is known of the failure: {}", in_one_line(error.as_ref()));
                self.environment.sink.event(Event::Warning(told));
            })
            .ok()
    }

    fn make(&mut self, host: &Host) -> Result<Built, BuildError> {
        let product = match &self.request.recipe.kind {
            Kind::Debian => self.make_of_packages(host)?,
            Kind::Builder(builder) => self.make_in_throwaway(host, builder)?,
        };
        self.deliver(host, product)
    }

    /// The kind `debian`: the host unpacks packages into the image's disk, a guest finishes it.
    fn make_of_packages(&mut self, host: &Host) -> Result<Product, BuildError> {
        let chosen = self.select()?;
        let packages = self.fetch(chosen, true)?;
        let accelerator = self.stage(Stage::Canary, |session| session.canary(host, &packages))?;
        let disk = self.stage(Stage::Compose, |session| session.compose(&packages, None))?;
        let (report, log) =
            self.stage(Stage::Guest, |session| session.guest(host, &packages, &disk, accelerator))?;
        Ok(Product {
            disk: Some(disk.image),
            artifacts: Vec::new(),
            logs: vec![log],
            accelerator,
            steps: report.stages,
            packages,
        })
    }

    /// Makes the files that were asked for, proves the image, and hands all over.
    fn deliver(&mut self, host: &Host, product: Product) -> Result<Built, BuildError> {
        let Product { disk, artifacts, mut logs, accelerator, steps, packages } = product;
        let name = &self.request.recipe.image.name;
        let mut files = Vec::new();
        if let Some(disk) = &disk {
            let qcow2 = self.scratch.path().join(format!("{name}.qcow2"));
            self.stage(Stage::Convert, |session| {
                image::convert(&host.qemu_img, disk, &qcow2, Packing::Compressed, &session.stop)?;
                files.push(finished(&qcow2, None, session)?);
                Ok(())
            })?;
            if self.request.recipe.verify.boot {
                logs.push(self.stage(Stage::Verify, |session| session.verify(host, &qcow2, accelerator))?);
            }
        }
        let folder = format!("{name}.artifacts");
        for artifact in &artifacts {
            files.push(finished(artifact, Some(&folder), self)?);
        }
        let sums = self.scratch.path().join(format!("{name}.sha256"));
        let text: String = files.iter().map(|file| format!("{}  {}\n", file.sha256, file.name())).collect();
        fs::write(&sums, text).map_err(|source| BuildError::Write { path: sums.clone(), source })?;
        let delivery = &self.environment.delivery;
        let logs = logs.iter().map(|log| delivery.deliver(log, None)).collect::<Result<_, _>>()?;
        delivery.deliver(&sums, None)?;
        let mut built = Vec::new();
        for file in &files {
            let path = delivery.deliver(&file.path, file.folder.as_deref())?;
            built.push(BuiltFile { path, bytes: file.bytes, sha256: file.sha256.clone() });
        }
        let lock = self.lock(host, &packages)?;
        packages.fetcher.settle(SETTLE_LIMIT);
        Ok(Built {
            files: built,
            lock,
            logs,
            accelerator,
            stages: self.stages.clone(),
            steps,
            counted: packages.fetcher.counted(),
            packages: packages.selection.packages.len(),
            took: self.started.elapsed(),
        })
    }

    /// Delivers what went in, if that is wanted; and tells how it differs from what a lock has.
    fn lock(&self, host: &Host, packages: &Packages) -> Result<Option<PathBuf>, BuildError> {
        let Packages { selection, fetcher, .. } = packages;
        let recipe = &self.request.recipe;
        let lock = Lock {
            recipe: LockedRecipe { name: recipe.image.name.clone(), sha256: recipe.digest },
            tools: vec![LockedTool { name: "qemu".to_owned(), version: host.qemu_version.clone() }],
            machines: self.machines.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            suites: selection.locked_suites(),
            files: fetcher.brought(),
            ..Lock::new()
        };
        if let Some(kept) = fetcher.lock() {
            for difference in kept.differences(&lock) {
                self.environment.sink.event(Event::Warning(difference));
            }
        }
        let needed = fetcher.lock().or(self.request.locks.then_some(&lock));
        if let Some(needed) = needed {
            let name = Digest::of(needed.text()?.as_bytes());
            fetcher.cache().need(name, &needed.digests())?;
        }
        if !self.request.locks {
            return Ok(None);
        }
        let path = self.scratch.path().join(format!("{}.lock", recipe.image.name));
        fs::write(&path, lock.text()?).map_err(|source| BuildError::Write { path: path.clone(), source })?;
        Ok(Some(self.environment.delivery.deliver(&path, None)?))
    }

    /// Runs one stage, unless someone wants to stop or the time is over; the one place where giving up
    /// in the middle of something becomes the build's own ending.
    pub(super) fn stage<T>(
        &mut self,
        stage: Stage,
        work: impl FnOnce(&mut Self) -> Result<T, BuildError>,
    ) -> Result<T, BuildError> {
        self.stop.check().map_err(|stopped| ending(self.request, stage, stopped))?;
        let started = Instant::now();
        self.environment.sink.event(Event::Started(stage));
        let result = work(self);
        self.stages.push((stage, started.elapsed()));
        let result = result.map_err(|error| {
            self.environment.sink.event(Event::GaveUp(stage));
            given_up(self.request, stage, error)
        })?;
        self.environment.sink.event(Event::Finished(stage));
        Ok(result)
    }

    pub(super) fn select(&mut self) -> Result<Chosen, BuildError> {
        let request = self.request.clone();
        let sink = Arc::clone(&self.environment.sink);
        self.stage(Stage::Select, |session| {
            let supply = session.request.supply.clone();
            let options = FetchOptions { supply, ..fetch_options(&session.stop) };
            session.interruptible(Stage::Select, move || {
                let cache = Arc::new(Cache::open(&request.cache)?);
                let fetcher = Arc::new(Fetcher::new(cache, options)?);
                let chosen = debian::select(&request.recipe, &fetcher, &request.apt_root, sink.as_ref())?;
                Ok(Chosen { selection: Arc::new(chosen), fetcher })
            })
        })
    }

    /// Fetches the builder's own tools, and the chosen packages if they are to be unpacked.
    pub(super) fn fetch(&mut self, chosen: Chosen, is_unpacked: bool) -> Result<Packages, BuildError> {
        let Chosen { selection, fetcher } = chosen;
        let sink = Arc::clone(&self.environment.sink);
        let shared = (Arc::clone(&selection), Arc::clone(&fetcher));
        let scratch = self.scratch.path().to_owned();
        let tools = self.stage(Stage::Fetch, |session| {
            session.interruptible(Stage::Fetch, move || {
                let (selection, fetcher) = shared;
                if is_unpacked {
                    debian::fetch(&selection, &fetcher, sink.as_ref())?;
                }
                Ok(disk::builder_tools(&selection, &fetcher, &scratch, sink.as_ref())?)
            })
        })?;
        self.keep_cache_small(&fetcher)?;
        Ok(Packages { selection, fetcher, tools })
    }

    /// Makes room in the cache, when all that this build needs from it is in use.
    fn keep_cache_small(&self, fetcher: &Fetcher) -> Result<(), BuildError> {
        let most = cache::limit(|name| std::env::var_os(name))?;
        let shrunk = fetcher.cache().shrink(most, None)?;
        if shrunk.files > 0 {
            self.environment.sink.event(Event::Note(format!(
                "removed {} files that were not used for longest from the cache, {}: it had more than {}",
                shrunk.files,
                bytesize::ByteSize(shrunk.bytes),
                bytesize::ByteSize(most)
            )));
        }
        Ok(())
    }

    pub(super) fn canary(&mut self, host: &Host, packages: &Packages) -> Result<Accelerator, BuildError> {
        let canary = Canary {
            programs: &host.programs,
            qemu_version: &host.qemu_version,
            kernel: &packages.tools.kernel,
            busybox: &packages.tools.busybox,
            scratch: self.scratch.path(),
            register: &|process| self.environment.registrar.adopt(process),
            stop: &self.stop,
        };
        let verdicts = canary.judge(Some(&self.request.cache.join("acceleration")))?;
        self.environment.sink.event(Event::Note(verdicts.to_string()));
        self.slowness = verdicts.slowness();
        verdicts.best().ok_or(BuildError::NoAccelerator(verdicts))
    }

    /// Makes the disk; with the kernel's modules in it, if those are given.
    pub(super) fn compose(
        &self,
        packages: &Packages,
        modules: Option<PathBuf>,
    ) -> Result<ComposedDisk, BuildError> {
        let request = self.request.clone();
        let sink = Arc::clone(&self.environment.sink);
        let selection = Arc::clone(&packages.selection);
        let fetcher = Arc::clone(&packages.fetcher);
        let scratch = self.scratch.path().to_owned();
        let stop = self.stop.clone();
        self.interruptible(Stage::Compose, move || {
            let cache = fetcher.cache();
            let what = (&request.recipe, &*selection, modules.as_deref());
            Ok(disk::compose(what, cache, &scratch, &stop, sink.as_ref())?)
        })
    }

    /// Runs work that does not always have an ear for the wish to stop in a thread of its own, and
    /// stops waiting for it soon after that wish comes or the time is over.
    pub(super) fn interruptible<T: Send + 'static>(
        &self,
        stage: Stage,
        work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
    ) -> Result<T, BuildError> {
        let (done, result) = channel();
        let name = stage.name().to_owned();
        thread::Builder::new()
            .name(name)
            .spawn(move || {
                // Nobody waits any more once the build has been given up.
                let _ = done.send(work());
            })
            .map_err(BuildError::Thread)?;
        let mut patience = None;
        loop {
            match result.recv_timeout(Duration::from_millis(100)) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let died = io::Error::other("a thread ended without a result");
                    return Err(BuildError::Thread(died));
                }
            }
            let Err(stopped) = self.stop.check() else {
                continue;
            };
            let since: &mut Instant = patience.get_or_insert_with(Instant::now);
            if since.elapsed() >= STOP_PATIENCE {
                return Err(ending(self.request, stage, stopped));
            }
        }
    }
}

/// A file that is ready to be delivered.
struct Finished {
    path: PathBuf,
    /// The folder that it goes to, where it is not the output directory itself.
    folder: Option<String>,
    bytes: u64,
    sha256: String,
}

impl Finished {
    /// How the list of digests names it.
    fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        match &self.folder {
            Some(folder) => format!("{folder}/{name}"),
            None => name.into_owned(),
        }
    }
}

fn finished(path: &Path, folder: Option<&str>, session: &Session<'_>) -> Result<Finished, BuildError> {
    let sha256 = image::digest(path, &session.stop)?;
    let bytes =
        fs::metadata(path).map_err(|source| BuildError::Write { path: path.to_owned(), source })?.len();
    Ok(Finished { path: path.to_owned(), folder: folder.map(str::to_owned), bytes, sha256 })
}

/// The build's ending, when it was given up.
fn ending(request: &Request, stage: Stage, stopped: Stopped) -> BuildError {
    match stopped {
        Stopped::Asked => BuildError::Cancelled { stage },
        Stopped::Late => BuildError::TimedOut { stage, limit: request.recipe.limits.total },
    }
}

/// The same for an error that may be of something that was given up.
fn given_up(request: &Request, stage: Stage, error: BuildError) -> BuildError {
    match Stopped::cause_of(&error) {
        Some(stopped) => ending(request, stage, stopped),
        None => error,
    }
}

fn preflight_host(request: &Request, environment: &Environment, stop: &Stop) -> Result<Host, BuildError> {
    let recipe = &request.recipe;
    let needs = Needs {
        memory: recipe.guest.memory,
        // The raw disk, the compressed image, and the unpacked tree beside them; of a throwaway machine its
        // disk, what it hands over, and that unpacked.
        space: recipe.image.size.saturating_mul(match recipe.kind {
            Kind::Debian => 2,
            Kind::Builder(_) => 3,
        }),
    };
    let (findings, host) = examine(&environment.shim, &request.workspace, needs, stop);
    stop.check().map_err(|stopped| ending(request, Stage::Preflight, stopped))?;
    let unfit = findings.iter().any(|finding| finding.fitness == Fitness::Unfit);
    match host {
        Some(host) if !unfit => Ok(host),
        _ => Err(BuildError::Unfit(findings)),
    }
}

/// Downloads through the proxy that the environment or apt's configuration names, first from the mirrors that
/// the environment names, until `stop`.
#[must_use]
pub fn fetch_options(stop: &Stop) -> FetchOptions {
    FetchOptions {
        proxies: Proxies::of_host(stop),
        stop: stop.clone(),
        mirrors: cache::mirrors(|name| std::env::var(name).ok()),
        // An unusable address was refused before.
        remote: Remote::of_environment(|name| std::env::var(name).ok()).ok().flatten(),
        ..FetchOptions::default()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::build::image::ImageError;

    fn request() -> Request {
        let recipe = include_str!("../../examples/debian-12.toml");
        Request {
            recipe: Recipe::parse(recipe, Path::new("debian-12.toml")).unwrap(),
            workspace: Workspace { folder: "out".into(), shown: "out".into(), option: "--output" },
            beside: Beside::of(Path::new("recipe.toml")).unwrap(),
            cache: "cache".into(),
            apt_root: "/".into(),
            debugging: Debugging::default(),
            supply: Supply::default(),
            locks: false,
        }
    }

    #[test]
    fn what_was_given_up_for_lack_of_time_is_a_timeout_that_names_stage_and_limit() {
        let late = BuildError::Image(ImageError::Stopped(Stopped::Late));
        let error = given_up(&request(), Stage::Convert, late);
        assert_eq!((error.class().name(), error.is_cancelled()), ("timeout", false));
        assert!(
            error.to_string().starts_with(
                "the build was not done within its total limit of 20m; it was in stage convert: raise limits.total"
            ),
            "{error}"
        );
    }

    #[test]
    fn what_was_given_up_on_request_is_a_cancellation_and_a_failure_stays_one() {
        let asked = BuildError::Image(ImageError::Stopped(Stopped::Asked));
        let error = given_up(&request(), Stage::Convert, asked);
        assert!(error.is_cancelled());
        assert_eq!(error.to_string(), "the build was told to stop; it was in stage convert");
        let failed = BuildError::Thread(io::Error::other("x"));
        assert_eq!(given_up(&request(), Stage::Convert, failed).class().name(), "machine_failed");
    }
}
