//! The stages of one build, in their order.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::cache::{self, Cache, FetchOptions, Fetcher, Proxies, Remote, StoreError, Wanted};
use crate::causes::in_one_line;
use crate::debian::{self, Selection};
use crate::disk::{self, BuilderTools, ComposedDisk};
use crate::event::{Event, Stage};
use crate::lock::{LockedInput, LockedMachine};
use crate::recipe::{Kind, Recipe};
use crate::stop::{Stop, Stopped};
use crate::vm::argv::Accelerator;
use crate::vm::canary::Canary;

use super::downloads;
use super::error::{BuildError, Failed};
use super::outputs;
use super::preflight::{Fitness, Host, Needs, Workspace, examine};
use super::product::Product;
use super::registrar::Ending;
use super::request::{Built, Environment, Request};
use super::scratch::{Scratch, sweep};

/// How long stages that notice late that they are to stop are waited for.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

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
    let counted = match &result {
        Ok(built) => built.counted,
        Err(failed) => *failed.counted,
    };
    environment.registrar.report(ending, started.elapsed().as_secs_f64(), counted);
    result
}

pub(super) struct Session<'a> {
    pub(super) request: &'a Request,
    pub(super) environment: &'a Environment,
    pub(super) started: Instant,
    pub(super) stop: Stop,
    pub(super) scratch: Scratch,
    pub(super) stages: Vec<(Stage, Duration)>,
    /// What machines were told, as a lock has it.
    pub(super) machines: Mutex<Vec<LockedMachine>>,
    /// What went in from the recipe's side, as a lock has it.
    pub(super) inputs: Mutex<Vec<LockedInput>>,
    /// Who downloads, as soon as there is one.
    downloading: Arc<OnceLock<Arc<Fetcher>>>,
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
    /// The recipe's own downloads, under the names by which the guest finds them.
    pub(super) downloads: Vec<(String, Wanted)>,
}

impl Packages {
    /// Notes all chosen packages as brought.
    pub(super) fn note_all(&self) {
        for package in &self.selection.packages {
            self.fetcher.note_brought(&self.selection.wanted(&package.file));
        }
    }
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

        let mut scratch = Scratch::create(folder).map_err(BuildError::from)?;
        let claimed = environment.registrar.claim_directory(std::os::fd::AsFd::as_fd(&scratch));
        claimed.map_err(BuildError::Claim)?;
        scratch.is_known();
        let stages = vec![(Stage::Preflight, preflight.elapsed())];
        let mut session = Session {
            request,
            environment,
            started,
            stop,
            scratch,
            stages,
            machines: Mutex::default(),
            inputs: Mutex::default(),
            downloading: Arc::default(),
            slowness: 1,
        };
        let made = session.make(&host).map_err(|error| {
            let page = session.keep(&host, &error);
            let counted = session.downloading.get().map(|fetcher| fetcher.counted()).unwrap_or_default();
            Failed { error: Box::new(error), page, counted: Box::new(counted) }
        });
        // What is left of a build that failed is removed all the same, and said first.
        let removed = session.scratch.remove();
        let built = made?;
        removed.map_err(BuildError::from)?;
        Ok(built)
    }

    fn make(&mut self, host: &Host) -> Result<Built, BuildError> {
        let product = match &self.request.recipe.kind {
            Kind::Debian => self.make_of_packages(host)?,
            Kind::Builder(builder) => self.make_in_throwaway(host, builder)?,
            Kind::Installer(installer) => self.make_by_installer(host, installer)?,
        };
        let delivered = self.deliver(host, product);
        delivered.map_err(|error| given_up(self.request, Stage::Convert, error))
    }

    /// The kind `debian`: the host unpacks packages into the image's disk, a guest finishes it.
    fn make_of_packages(&mut self, host: &Host) -> Result<Product, BuildError> {
        let chosen = self.select()?;
        let packages = self.fetch(chosen, true)?;
        let accelerator = self.stage(Stage::Canary, |session| session.canary(host, &packages))?;
        let disk = self.stage(Stage::Compose, |session| session.compose(&packages, None))?;
        let (worked, contents) =
            self.stage(Stage::Guest, |session| session.guest(host, &packages, &disk, accelerator))?;
        if let (Some(time), Some(root)) = (self.request.epoch(), &contents.root) {
            self.stage(Stage::Rewrite, |session| {
                Ok(disk::rewrite(&disk, root, time, session.scratch.path(), &session.stop)?)
            })?;
        }
        Ok(Product {
            disk: Some(disk.image),
            contents: Some(contents),
            artifacts: Vec::new(),
            logs: vec![worked.log],
            accelerator,
            steps: worked.report.stages,
            packages,
            materials: worked.fetched,
        })
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
            let downloading = Arc::clone(&session.downloading);
            session.interruptible(Stage::Select, move || {
                let cache = Arc::new(Cache::open(&request.cache)?);
                let fetcher = Arc::new(Fetcher::new(cache, options)?);
                // There is no other before it.
                let _ = downloading.set(Arc::clone(&fetcher));
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
        let wanted = self.request.recipe.downloads.clone();
        let (tools, downloads) = self.stage(Stage::Fetch, |session| {
            session.interruptible(Stage::Fetch, move || {
                let (selection, fetcher) = shared;
                if is_unpacked {
                    debian::fetch(&selection, &fetcher, sink.as_ref())?;
                }
                let tools = disk::builder_tools(&selection, &fetcher, &scratch, sink.as_ref())?;
                Ok((tools, downloads::bring(&wanted, &fetcher, sink.as_ref())?))
            })
        })?;
        self.keep_cache_small(&fetcher)?;
        Ok(Packages { selection, fetcher, tools, downloads })
    }

    /// Takes note of a file or folder of the recipe's side; a build that keeps to a lock has the lock's.
    pub(super) fn note_input(&self, name: &str, sha256: &str) -> Result<(), BuildError> {
        let sha256 = sha256.parse().expect("the digits of a digest");
        if let Some(lock) = &self.request.supply.lock {
            lock.check_input(name, sha256)?;
        }
        let input = LockedInput { name: name.to_owned(), sha256 };
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner).push(input);
        Ok(())
    }

    /// Makes room in the cache, when all that this build needs from it is in use.
    fn keep_cache_small(&self, fetcher: &Fetcher) -> Result<(), BuildError> {
        let most = cache::limit(|name| std::env::var_os(name))?;
        let shrunk = match fetcher.cache().shrink(most, None) {
            // Somebody else who needs the room makes it, and says what is in the way.
            Err(error @ (StoreError::Unread { .. } | StoreError::Locked { .. })) => {
                self.environment.sink.event(Event::Warning(in_one_line(&error)));
                return Ok(());
            }
            shrunk => shrunk?,
        };
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
            let time = request.epoch();
            let what = (&request.recipe, &*selection, modules.as_deref());
            Ok(disk::compose(what, time, cache, &scratch, &stop, sink.as_ref())?)
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
    let needs =
        Needs { memory: recipe.guest.memory, space: space(recipe), tools: outputs::tools(&recipe.output) };
    let (findings, host) = examine(&environment.shim, &request.workspace, needs, stop);
    stop.check().map_err(|stopped| ending(request, Stage::Preflight, stopped))?;
    let unfit = findings.iter().any(|finding| finding.fitness == Fitness::Unfit);
    match host {
        Some(host) if !unfit => Ok(host),
        _ => Err(BuildError::Unfit(findings)),
    }
}

/// The most that a build of this recipe has on its disk at once, in bytes.
fn space(recipe: &Recipe) -> u64 {
    let disks = match recipe.kind {
        // The raw disk, and the unpacked tree beside it or the file that is made of it.
        Kind::Debian => 2,
        // The machine's disk, what it hands over, and that unpacked or converted.
        Kind::Builder(_) | Kind::Installer(_) => 3,
    };
    // Each further format may be as large as the disk.
    let further = recipe.output.formats.len().saturating_sub(1);
    recipe.image.size.saturating_mul(disks + further as u64)
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
    use crate::beside::Beside;
    use crate::build::image::ImageError;
    use crate::build::request::Debugging;
    use crate::cache::{StoreError, Supply};

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
            time: None,
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
        // What is copied fails like any reading or writing.
        let copied = |error: io::Error| BuildError::Write { path: "x".into(), source: error };
        let asked = copied(io::Error::other(Stopped::Asked));
        assert!(given_up(&request(), Stage::Guest, asked).is_cancelled());
        let late = StoreError::Read { path: "x".into(), source: io::Error::other(Stopped::Late) };
        assert_eq!(given_up(&request(), Stage::Prepare, late.into()).class().name(), "timeout");
        let failed = BuildError::Thread(io::Error::other("x"));
        assert_eq!(given_up(&request(), Stage::Convert, failed).class().name(), "machine_failed");
    }
}
