//! `hostler build --explain-confinement`: what holds the machine's process, as it was tried just now.

use std::path::Path;
use std::sync::Arc;

use hostler_runner::build::preflight::{Fitness, Needs, Workspace, examine};
use hostler_runner::build::scratch::Scratch;
use hostler_runner::cancel::Cancel;
use hostler_runner::recipe::Recipe;
use hostler_runner::stop::Stop;
use hostler_runner::vm::probe::{self, Found, Held};
use serde_json::json;

use super::arguments::Global;
use super::build::{fail, tell};
use super::exit::Exit;
use super::print;

/// Tries it, and says it. What does not hold is not fit.
pub(crate) fn explain(global: &Global, recipe: &Recipe, workspace: &Workspace, cancel: Arc<Cancel>) -> Exit {
    let stop = Stop::new(cancel);
    let needs = Needs { memory: recipe.guest.memory, space: 0, tools: &[] };
    let (findings, host) = examine(Path::new("/proc/self/exe"), workspace, needs, &stop);
    let Some(host) = host else {
        for finding in findings.iter().filter(|finding| finding.fitness == Fitness::Unfit) {
            tell(&format!("hostler: {}", finding.found));
        }
        return Exit::Unfit;
    };
    let scratch = match std::fs::create_dir_all(&workspace.folder)
        .map_err(|source| source.to_string())
        .and_then(|()| Scratch::create(&workspace.folder).map_err(|error| error.to_string()))
    {
        Ok(scratch) => scratch,
        Err(error) => {
            tell(&format!("hostler: {error}"));
            return Exit::Failed;
        }
    };
    let found = match probe::examine(&host.programs, recipe.guest.memory >> 20, scratch.path()) {
        Ok(found) => found,
        Err(error) => return fail(&error, Exit::Unfit),
    };
    if let Err(error) = scratch.remove() {
        return fail(&error, Exit::Failed);
    }
    show(global, &found);
    if found.held.iter().all(|held| held.holds) { Exit::Done } else { Exit::Unfit }
}

fn show(global: &Global, Found { held, group }: &Found) {
    let user = rustix::process::geteuid().as_raw();
    let limits = match group {
        Ok(limits) => limits.clone(),
        Err(why) => format!("{why}; {INSTEAD}"),
    };
    let text = if global.json {
        let group = json!({ "holds": group.is_ok(), "how": limits });
        format!("{}\n", json!({ "user": user, "held": held, "control_group": group }))
    } else {
        let mut text = format!("qemu would run as user {user}. Each of these was tried just now:\n");
        for Held { what, holds, how } in held {
            text.push_str(&format!("{:7} {what}: {how}\n", if *holds { "holds" } else { "OPEN" }));
        }
        let holds = if group.is_ok() { "holds" } else { "none" };
        text.push_str(&format!("{holds:7} control group: {limits}\n"));
        text.push_str(LEASED);
        text
    };
    // The exit status still tells.
    let _ = print(&text);
}

/// What there is without a group.
const INSTEAD: &str = "its memory is the guest's and what qemu needs, bounded by the address space";
/// What is different in a build with a watchdog.
const LEASED: &str = "With a watchdog, it is in the lease's control group instead, and has the limits of the groups above that.\n";
