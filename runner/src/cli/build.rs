//! `hostler build`.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hostler_protocol::text::without_controls;
use hostler_runner::beside::Beside;
use hostler_runner::build::delivery::{Delivery, Folder};
use hostler_runner::build::preflight::{Finding, Workspace};
use hostler_runner::build::registrar::{Registrar, Unregistered};
use hostler_runner::build::{BuildError, Built, BuiltFile, Debugging, Environment, Failed, Request, build};
use hostler_runner::cache::{Remote, Supply, default_directory, limit};
use hostler_runner::cancel::Cancel;
use hostler_runner::causes::in_one_line;
use hostler_runner::event::Event;
use hostler_runner::lock::Lock;
use hostler_runner::recipe::Recipe;
use hostler_runner::vm::run::Report;
use hostler_runner::watchdog::WatchdogError;
use serde_json::json;

use super::arguments::{Build, Global};
use super::confinement;
use super::delegate::{self, Delegated, Task};
use super::exit::Exit;
use super::progress::{self, Files, Form};
use super::registration::Registration;
use super::{print, shown, signals};

/// Runs the command.
pub(crate) fn main(global: &Global, wanted: &Build) -> Exit {
    if rustix::process::geteuid().is_root() {
        let task = Task::Build {
            recipe: &wanted.recipe,
            output: &wanted.output,
            telling: &wanted.telling,
            supply: &wanted.supply,
            explains: wanted.explain_confinement,
            debugging: Debugging { keeps: wanted.keep, holds: wanted.shell_on_failure },
        };
        return delegate::main(global, &Delegated { task, cache: wanted.cache.as_deref() });
    }
    let recipe = match Recipe::load(&wanted.recipe) {
        Ok(recipe) => recipe,
        Err(error) => return fail(&error, Exit::Usage),
    };
    let cache = match cache_directory(wanted.cache.as_deref()) {
        Ok(cache) => cache,
        Err(error) => return fail(&error, Exit::Usage),
    };
    let cancel = match signals::cancel() {
        Ok(cancel) => cancel,
        Err(error) => return fail(&error, Exit::Failed),
    };
    let files = match wanted.telling.open() {
        Ok(files) => files,
        Err(error) => return fail(&error, Exit::Usage),
    };
    let beside = match Beside::of(&wanted.recipe) {
        Ok(beside) => beside,
        Err(error) => return fail(&error, Exit::Usage),
    };
    let lock = wanted.supply.kept(&wanted.recipe).map(|path| Lock::load(&path)).transpose();
    let lock = match lock {
        Ok(lock) => lock.map(Arc::new),
        Err(error) => return fail(&error, Exit::Usage),
    };
    let written = wanted.supply.written().map(Path::to_owned);
    let around = Around {
        supply: Supply { lock, offline: wanted.supply.offline },
        locks: written.is_some(),
        beside,
        workspace: output_workspace(&wanted.output),
        cache,
        delivery: Arc::new(Folder(wanted.output.clone())),
        cancel,
        unwatched: Some(NO_WATCHDOG.to_owned()),
        progress: wanted.telling.progress,
        files,
        explains: wanted.explain_confinement,
        debugging: Debugging { keeps: wanted.keep, holds: wanted.shell_on_failure },
    };
    let (exit, lock) = run(global, recipe, around);
    if let (Some(made), Some(place)) = (lock, written)
        && let Err(source) = move_file(&made, &place)
    {
        tell(&format!(
            "hostler: the lock stays at {}, it could not be moved to {}: {source}",
            made.display(),
            place.display()
        ));
        return Exit::Failed;
    }
    exit
}

/// Moves a file, also to another file system: there is always the whole of the old one or of the new one.
fn move_file(from: &Path, to: &Path) -> std::io::Result<()> {
    match std::fs::rename(from, to) {
        Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => {
            copy_over(from, to)?;
            std::fs::remove_file(from)
        }
        other => other,
    }
}

fn copy_over(from: &Path, to: &Path) -> std::io::Result<()> {
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut beside = tempfile::Builder::new().prefix(".hostler-").tempfile_in(folder)?;
    let mut source = std::fs::File::open(from)?;
    std::io::copy(&mut source, beside.as_file_mut())?;
    beside.as_file().set_permissions(source.metadata()?.permissions())?;
    beside.as_file().sync_all()?;
    beside.persist(to).map(drop).map_err(|error| error.error)
}

/// The output directory as the place for the scratch directory: what is finished moves into it by a
/// rename.
pub(crate) fn output_workspace(output: &Path) -> Workspace {
    Workspace { folder: output.to_owned(), shown: output.to_owned(), option: "--output" }
}

/// The cache that was asked for, or the user's.
pub(crate) fn cache_directory(asked: Option<&Path>) -> Result<PathBuf, hostler_runner::cache::StoreError> {
    match asked {
        Some(asked) => Ok(asked.to_owned()),
        None => default_directory(|name| std::env::var_os(name)),
    }
}

/// What it means to build without a watchdog.
const NO_WATCHDOG: &str = "no watchdog is reachable: if this process is killed, its machine dies with it, and \
     its scratch directory stays until the next build into the same output directory";

/// What a build has around it that depends on who started it.
pub(crate) struct Around {
    /// What it may use.
    pub(crate) supply: Supply,
    /// Whether its lock is wanted.
    pub(crate) locks: bool,
    /// The folder of the recipe.
    pub(crate) beside: Beside,
    /// Where the scratch directory is made.
    pub(crate) workspace: Workspace,
    /// The download cache.
    pub(crate) cache: PathBuf,
    /// Takes the finished files.
    pub(crate) delivery: Arc<dyn Delivery>,
    /// The wish to stop.
    pub(crate) cancel: Arc<Cancel>,
    /// What to say when no watchdog is reachable.
    pub(crate) unwatched: Option<String>,
    /// How the progress is shown.
    pub(crate) progress: Form,
    /// Who else hears of it.
    pub(crate) files: Files,
    /// Whether to say what holds the machine's process, instead of building.
    pub(crate) explains: bool,
    /// What is done for a person who looks for the cause of a failure.
    pub(crate) debugging: Debugging,
}

/// Builds, as the user that this process is. Where the lock was delivered, if it was wanted.
pub(crate) fn run(global: &Global, recipe: Recipe, around: Around) -> (Exit, Option<PathBuf>) {
    let Around {
        supply,
        locks,
        beside,
        workspace,
        cache,
        delivery,
        cancel,
        unwatched,
        progress,
        files,
        explains,
        debugging,
    } = around;
    if explains {
        return (confinement::explain(global, &recipe, &workspace, cancel), None);
    }
    // What is only used after the downloads is to be right before them.
    let time = match source_date() {
        Ok(time) => time,
        Err(error) => return (fail(&error, Exit::Usage), None),
    };
    if let Err(error) = limit(|name| std::env::var_os(name)) {
        return (fail(&error, Exit::Usage), None);
    }
    if let Err(error) = Remote::of_environment(|name| std::env::var(name).ok()) {
        return (fail(&error, Exit::Usage), None);
    }
    if let Some(lock) = &supply.lock
        && lock.recipe.sha256.is_some_and(|digest| digest != recipe.digest())
    {
        tell("hostler: the recipe is not the one that the lock was made of: make a new lock with --lock");
        return (Exit::Usage, None);
    }
    let sink = progress::sink(progress, files, &recipe.image.name, &cache);
    let registration = match Registration::open(&global.socket, &format!("build {}", recipe.image.name)) {
        Ok(registration) => Some(Arc::new(registration)),
        Err(WatchdogError::Unreachable { .. }) => {
            if let Some(text) = unwatched {
                sink.event(Event::Note(text));
            }
            None
        }
        Err(error @ WatchdogError::Refused(_)) => return (fail(&error, Exit::Refused), None),
        Err(error) => return (fail(&error, Exit::NoWatchdog), None),
    };
    let registrar: Arc<dyn Registrar> = match &registration {
        Some(registration) => Arc::<Registration>::clone(registration),
        None => Arc::new(Unregistered),
    };
    let environment = Environment {
        // Not the path of the program: a package's upgrade may put another one there meanwhile.
        shim: "/proc/self/exe".into(),
        registrar,
        cancel,
        sink: Arc::clone(&sink),
        delivery,
    };
    let request =
        Request { recipe, workspace, beside, cache, apt_root: "/".into(), debugging, supply, locks, time };
    let result = build(&request, &environment);
    drop(environment);
    sink.event(match &result {
        Ok(built) => Event::Built { files: built.files.iter().map(|file| file.path.clone()).collect() },
        Err(Failed { error, page, .. }) => {
            Event::Failed { class: error.class(), message: in_one_line(error.as_ref()), page: page.clone() }
        }
    });
    drop(sink);
    if let Some(Err(error)) = registration.map(|registration| registration.close()) {
        tell(&format!("hostler: the build's lease could not be closed: {}", in_one_line(&error)));
    }
    match result {
        Ok(built) => (show(global, &built), built.lock),
        Err(failed) => {
            let exit = show_failure(global, progress, &failed);
            let Workspace { folder, shown, .. } = &request.workspace;
            if folder != shown && in_one_line(failed.error.as_ref()).contains("./") {
                tell(&format!("hostler: paths that begin with ./ are below {}", shown.display()));
            }
            (exit, None)
        }
    }
}

/// The time that `SOURCE_DATE_EPOCH` gives, if it is set.
fn source_date() -> Result<Option<SystemTime>, std::io::Error> {
    let Some(text) = std::env::var_os("SOURCE_DATE_EPOCH") else {
        return Ok(None);
    };
    let seconds: Option<u64> = text.to_str().and_then(|text| text.parse().ok());
    match seconds.filter(|seconds| *seconds <= u64::from(u32::MAX)) {
        Some(seconds) => Ok(Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))),
        None => Err(std::io::Error::other(format!(
            "SOURCE_DATE_EPOCH is {text:?}: it has to be a number of seconds since 1970"
        ))),
    }
}

fn show(global: &Global, built: &Built) -> Exit {
    if global.json {
        let seconds = |duration: &Duration| duration.as_secs_f64();
        let stages: serde_json::Map<_, _> = built
            .stages
            .iter()
            .map(|(stage, took)| (stage.name().to_owned(), json!(seconds(took))))
            .collect();
        let files: Vec<_> = built
            .files
            .iter()
            .map(|file| json!({"path": file.path, "bytes": file.bytes, "sha256": file.sha256}))
            .collect();
        let document = json!({
            "result": "built",
            "files": files,
            "accelerator": built.accelerator.name(),
            "packages": built.packages,
            "upstream_bytes": built.counted.upstream_bytes,
            "metadata_bytes": built.counted.metadata_bytes,
            "cache_bytes": built.counted.cache_bytes,
            "upstream_files": built.counted.upstream_files,
            "cache_files": built.counted.cache_files,
            "upstream_failures": built.counted.upstream_faults,
            "shared_files": built.counted.remote.taken,
            "seconds": seconds(&built.took),
            "stages": stages,
            "logs": built.logs,
        });
        out(&format!("{document}\n"))
    } else {
        let mut text = String::new();
        for BuiltFile { path, bytes, .. } in &built.files {
            text.push_str(&format!("{}: {}\n", path.display(), bytesize::ByteSize(*bytes)));
        }
        text.push_str(&format!(
            "of {} packages, in {:.0} s with {}\n",
            built.packages,
            built.took.as_secs_f64(),
            built.accelerator.name()
        ));
        text.push_str(&format!(
            "downloaded {} of packages and {} of release files, {} came from the cache\n",
            bytesize::ByteSize(built.counted.upstream_bytes),
            bytesize::ByteSize(built.counted.metadata_bytes),
            bytesize::ByteSize(built.counted.cache_bytes)
        ));
        let faults = built.counted.upstream_faults;
        if faults > 0 {
            text.push_str(&format!("upstream failed {faults} times, and others helped out\n"));
        }
        let shared = built.counted.remote.taken;
        if shared > 0 {
            text.push_str(&format!("{shared} files came from the shared store\n"));
        }
        out(&text)
    }
}

/// Prints a result. The work is done whether or not anybody reads of it; where it cannot be written, that is
/// told.
pub(crate) fn out(text: &str) -> Exit {
    shown(print(text))
}

fn show_failure(global: &Global, progress: Form, failed: &Failed) -> Exit {
    let Failed { error, page, .. } = failed;
    let exit = if error.is_cancelled() {
        Exit::Stopped(signals::received().unwrap_or(15))
    } else {
        match error.as_ref() {
            BuildError::Unfit(_) | BuildError::NoAccelerator(_) => Exit::Unfit,
            _ => Exit::Failed,
        }
    };
    if global.json {
        let _ = print(&format!("{}\n", failure_document(failed)));
        return exit;
    }
    // Who stopped it knows why.
    let is_told = !error.is_cancelled();
    if let BuildError::Guest(guest) = error.as_ref()
        && is_told
    {
        let Report { screen, refused, .. } = &guest.report;
        if !screen.is_empty() {
            tell(&progress.shown(&screen_lines(screen)));
        }
        for refused in refused.iter().filter(|refused| refused.status.is_some()) {
            tell(&format!("the mirror could not give it {}", refused.told()));
        }
    }
    tell(&format!("hostler: [{}] {}", error.class(), in_one_line(error.as_ref())));
    // An unfit host says for each thing what to do.
    if is_told && exit != Exit::Unfit {
        tell(&format!("hostler: what to do: {}", error.class().advice()));
    }
    if let Some(page) = page {
        tell(&format!("hostler: all that is known of it: {}", page.display()));
    }
    exit
}

/// What a guest showed last.
fn screen_lines(screen: &str) -> String {
    let lines = screen.lines().map(|line| format!("  | {line}"));
    std::iter::once("the last on its screen:".to_owned()).chain(lines).collect::<Vec<_>>().join("\n")
}

fn failure_document(failed: &Failed) -> serde_json::Value {
    let Failed { error, page, counted } = failed;
    let mut document = json!({
        "result": "failed",
        "class": error.class(),
        "message": in_one_line(error.as_ref()),
        "advice": error.class().advice(),
        "page": page,
        "upstream_bytes": counted.upstream_bytes,
        "metadata_bytes": counted.metadata_bytes,
        "cache_bytes": counted.cache_bytes,
    });
    match error.as_ref() {
        BuildError::Guest(guest) => {
            let Report { screen, refused, findings, .. } = &guest.report;
            document["stage"] = json!(guest.stage);
            document["screen"] = json!(screen);
            document["findings"] = json!(findings);
            document["refused"] = json!(refused);
        }
        BuildError::Unfit(findings) => {
            let findings: &[Finding] = findings;
            document["findings"] = json!(findings);
        }
        _ => {}
    }
    document
}

/// Shows text that may hold what a recipe, an index or a program said: line by line, and nothing in it
/// acts on a terminal.
pub(crate) fn tell(text: &str) {
    let lines: Vec<String> = text.lines().map(without_controls).collect();
    // Standard error may be closed; the exit status still tells.
    let _ = writeln!(std::io::stderr(), "{}", lines.join("\n"));
}

/// Shows an error and gives its exit.
pub(crate) fn fail(error: &dyn std::error::Error, exit: Exit) -> Exit {
    tell(&format!("hostler: {}", in_one_line(error)));
    exit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_takes_the_place_of_an_old_file_or_leaves_it() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("new"), folder.path().join("old"));
        std::fs::write(&to, "old").unwrap();
        assert!(copy_over(&from, &to).is_err());
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "old");
        std::fs::write(&from, "new").unwrap();
        copy_over(&from, &to).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
