//! `hostler doctor`: is this host fit, and what to do where it is not.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hostler_runner::build::fetch_options;
use hostler_runner::build::preflight::{Finding, Fitness, Host, Needs, Subject, Workspace, examine};
use hostler_runner::cache::{Cache, Fetcher};
use hostler_runner::cancel::Cancel;
use hostler_runner::causes::in_one_line;
use hostler_runner::disk::builder_tools;
use hostler_runner::event::Silent;
use hostler_runner::recipe::Recipe;
use hostler_runner::stop::{Stop, Stopped};
use hostler_runner::vm::argv::Accelerator;
use hostler_runner::vm::canary::Canary;
use hostler_runner::watchdog::{Watchdog, WatchdogError};
use serde_json::json;

use super::arguments::{Doctor, Global};
use super::build::{cache_directory, fail, output_workspace};
use super::delegate::{self, Delegated, Task};
use super::exit::Exit;
use super::{print, signals};

/// What the example recipe needs.
const NEEDS: Needs = Needs { memory: 1 << 30, space: 4 << 30, tools: &[] };

/// The recipe whose archive gives the canary's kernel.
const RECIPE: &str = include_str!("../../examples/debian-12.toml");

/// Runs the command.
pub(crate) fn main(global: &Global, wanted: &Doctor) -> Exit {
    if rustix::process::geteuid().is_root() {
        let task = Task::Examine { limit: wanted.limit };
        return delegate::main(global, &Delegated { task, cache: wanted.cache.as_deref() });
    }
    let cache = match cache_directory(wanted.cache.as_deref()) {
        Ok(cache) => cache,
        Err(error) => return fail(&error, Exit::Usage),
    };
    let cancel = match signals::cancel() {
        Ok(cancel) => cancel,
        Err(error) => return fail(&error, Exit::Failed),
    };
    examine_host(global, &output_workspace(&wanted.output), &cache, wanted.limit, cancel)
}

/// Examines the host as the user that this process is.
pub(crate) fn examine_host(
    global: &Global,
    workspace: &Workspace,
    cache: &Path,
    limit: Duration,
    cancel: Arc<Cancel>,
) -> Exit {
    let stop = Stop::new(cancel);
    let (mut findings, host) = examine(Path::new("/proc/self/exe"), workspace, NEEDS, &stop);
    if let Some(host) = host {
        findings.push(acceleration(&host, cache, &stop.within(limit)));
    }
    findings.push(watchdog(&global.socket));
    show(global, &findings);
    if let Some(signal) = signals::received() {
        return Exit::Stopped(signal);
    }
    let unfit = findings.iter().any(|finding| finding.fitness == Fitness::Unfit);
    if unfit { Exit::Unfit } else { Exit::Done }
}

fn show(global: &Global, findings: &[Finding]) {
    let mut text = String::new();
    if global.json {
        text = format!("{}\n", json!({ "findings": findings }));
    } else {
        for finding in findings {
            let word = match finding.fitness {
                Fitness::Fit => "fit",
                Fitness::Poor => "poor",
                Fitness::Unfit => "UNFIT",
            };
            text.push_str(&format!("{word:5}  {}\n", finding.found));
            if let Some(advice) = &finding.advice {
                text.push_str(&format!("       do: {advice}\n"));
            }
        }
    }
    // The exit status still tells.
    let _ = print(&text);
}

fn acceleration(host: &Host, cache: &Path, stop: &Stop) -> Finding {
    match judge(host, cache, stop) {
        Ok(finding) => finding,
        Err(error) => {
            let advice = match Stopped::cause_of(error.as_ref()) {
                Some(Stopped::Late) => {
                    "see whether the archive can be reached, or give this more time with --limit"
                }
                Some(Stopped::Asked) | None => "mend this first, then run hostler doctor again",
            };
            let found = format!("no canary could be booted: {}", in_one_line(error.as_ref()));
            Finding::bad(Subject::Acceleration, Fitness::Poor, found, advice)
        }
    }
}

fn judge(host: &Host, cache: &Path, stop: &Stop) -> Result<Finding, Box<dyn std::error::Error>> {
    let recipe = Recipe::parse(RECIPE, Path::new("debian-12.toml"))?;
    let fetcher = Fetcher::new(Arc::new(Cache::open(cache)?), fetch_options(stop))?;
    let scratch = fetcher.cache().scratch()?;
    let selection = hostler_runner::debian::select(&recipe, &fetcher, Path::new("/"), &Silent)?;
    let tools = builder_tools(&selection, &fetcher, scratch.path(), &Silent)?;
    let canary = Canary {
        programs: &host.programs,
        qemu_version: &host.qemu_version,
        kernel: &tools.kernel,
        busybox: &tools.busybox,
        scratch: scratch.path(),
        register: &|_| Ok(()),
        stop,
    };
    let memory = cache.join("acceleration");
    let remembered = canary.remembered(Some(&memory))?;
    let when = match remembered {
        Some(_) => " (remembered; tried anew after a reboot, and with another qemu, processor or kernel)",
        None => " (tried just now, and remembered until the next reboot)",
    };
    let verdicts = remembered.map_or_else(|| canary.judge(Some(&memory)), Ok)?;
    let found = format!("{verdicts}{when}");
    Ok(match verdicts.best() {
        Some(Accelerator::Kvm) => Finding::fit(Subject::Acceleration, found),
        Some(Accelerator::Tcg) => Finding::bad(
            Subject::Acceleration,
            Fitness::Poor,
            found,
            "emulated builds take some minutes; for fast ones use a host that lends out its virtualization",
        ),
        None => Finding::bad(
            Subject::Acceleration,
            Fitness::Unfit,
            found,
            "reinstall qemu-system-x86 and seabios, or try another host",
        ),
    })
}

fn watchdog(socket: &Path) -> Finding {
    match Watchdog::connect(socket) {
        Ok(_) => Finding::fit(Subject::Watchdog, format!("a watchdog listens on {}", socket.display())),
        Err(error) => Finding::bad(
            Subject::Watchdog,
            Fitness::Poor,
            match error {
                WatchdogError::Unreachable { path, source } => {
                    format!("no watchdog listens on {}: {source}", path.display())
                }
                other => in_one_line(&other),
            },
            "start hostlerd, or give its socket with --socket; builds work without it",
        ),
    }
}
