//! Two builds at once on one host: they share nothing but the cache.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use hostler_tests::builds::{Confined, Running, unfinished, users_cache};
use hostler_tests::failure::OrFail;
use hostler_tests::place::Place;
use hostler_tests::{program, scenario};

const NAMES: [&str; 2] = ["one", "two"];
const LIMIT: Duration = Duration::from_secs(400);

fn start(place: &Place, name: &str) -> Running {
    let recipe = place.path(format!("{name}.toml"));
    let text = format!(
        "kind = \"builder\"\n[image]\nname = \"{name}\"\nsize = \"1GiB\"\n[debian]\nsource = \"host-apt\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\npackages = [\"e2fsprogs\", \"mount\"]\n[builder]\nartifacts = [\"said\"]\n[guest]\nmemory = \"512MiB\"\nrun = [\"sleep 5; hostname >/dev/null; echo {name} >/artifacts/said\"]\n"
    );
    fs::write(&recipe, text).or_fail("the recipe");
    let mut command = place.command_of_user(program::path("hostler"));
    command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
    command.arg("build").arg(recipe).arg("--cache").arg(users_cache());
    let out = place.directory_of_user(format!("out-{name}"));
    command.arg("--junit").arg(out.join("report.xml")).arg("--output").arg(out);
    Running::start_logging_to(place.path(format!("{name}.log")), command)
}

/// What one build has, seen from its processes.
#[derive(Debug, Default)]
struct Seen {
    /// What any of them can write to.
    writable: BTreeSet<PathBuf>,
    /// The network namespaces of its machines.
    networks: BTreeSet<PathBuf>,
    processes: BTreeSet<u32>,
}

/// The build that a process comes from.
fn root_of(parents: &BTreeMap<u32, u32>, pid: u32, roots: [u32; 2]) -> Option<usize> {
    let mut pid = pid;
    for _ in 0..parents.len() + 1 {
        if let Some(index) = roots.iter().position(|root| *root == pid) {
            return Some(index);
        }
        pid = *parents.get(&pid)?;
    }
    None
}

/// The files that a process has open for writing.
fn writable(pid: u32) -> Vec<PathBuf> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let is_writable = |info: &str| {
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        // O_WRONLY or O_RDWR.
        flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok()).is_some_and(|flags| flags & 3 != 0)
    };
    descriptors
        .filter(|entry| fs::read_to_string(entry.path()).is_ok_and(|info| is_writable(&info)))
        .filter_map(|entry| fs::read_link(format!("/proc/{pid}/fd/{}", entry.file_name().display())).ok())
        // Sockets and pipes have no path; their names are numbers that nobody else can open.
        .filter(|path| path.is_absolute() && !path.starts_with("/dev") && !path.starts_with("/proc"))
        .collect()
}

fn look(place: &Place, roots: [u32; 2], seen: &mut [Seen; 2]) {
    let all = Confined::all(place);
    let parents = all.iter().map(|one| (one.process.pid, one.field("PPid").parse().or_fail("a parent")));
    let parents: BTreeMap<u32, u32> = parents.collect();
    for one in &all {
        let Some(index) = root_of(&parents, one.process.pid, roots) else { continue };
        seen[index].processes.insert(one.process.pid);
        seen[index].writable.extend(writable(one.process.pid));
        if one.program().starts_with("qemu-system") && one.mentions("disk0") {
            seen[index].networks.insert(one.network.clone());
        }
    }
}

#[test]
fn two_builds_at_once_share_nothing_but_the_cache() {
    scenario::build("together", |place| {
        let mut builds = NAMES.map(|name| start(place, name));
        let roots = [builds[0].pid(), builds[1].pid()];
        let mut seen: [Seen; 2] = Default::default();
        let (begun, mut were_both) = (Instant::now(), false);
        while !builds.iter_mut().all(Running::has_ended) {
            assert!(begun.elapsed() < LIMIT, "{}\n{}", builds[0].said(), builds[1].said());
            look(place, roots, &mut seen);
            let machines = |index: usize| {
                let mut networks = seen[index].networks.iter();
                networks.any(|network| Confined::all(place).iter().any(|one| one.network == *network))
            };
            were_both = were_both || machines(0) && machines(1);
            std::thread::sleep(Duration::from_millis(100));
        }
        for (name, build) in NAMES.iter().zip(&mut builds) {
            assert_eq!(build.finish(LIMIT).code(), Some(0), "{}", build.said());
            let out = place.path(format!("out-{name}"));
            assert!(unfinished(&out).is_empty());
            let artifact = out.join(format!("{name}.artifacts/said"));
            assert_eq!(fs::read_to_string(artifact).or_fail("the artifact"), format!("{name}\n"));
            let report = out.join("report.xml");
            let count = |what: &str| {
                let mut ask = Command::new("xmllint");
                let told = program::finish(ask.args(["--xpath", what]).arg(&report)).succeeded();
                told.trim().parse::<u32>().or_fail("a number")
            };
            assert_eq!(count("count(//failure) + count(//error)"), 0);
            assert!(count("count(//testcase)") >= 5, "a test case for each stage");
            assert_eq!(count(&format!("count(//testsuite[contains(@name, '{name}')])")), 1);
        }
        assert!(were_both, "their machines did not run at the same time: {seen:#?}");
        let shared: Vec<&PathBuf> = seen[0].writable.intersection(&seen[1].writable).collect();
        println!("{} and {} files; both: {shared:?}", seen[0].writable.len(), seen[1].writable.len());
        assert!(seen.iter().all(|one| one.writable.len() >= 3), "the test sees too little: {seen:#?}");
        let cache = users_cache();
        assert!(shared.iter().all(|path| path.starts_with(&cache)), "{shared:?}");
        assert!(seen[0].networks.is_disjoint(&seen[1].networks), "{seen:#?}");
        assert!(seen[0].processes.is_disjoint(&seen[1].processes));
        assert!(Confined::all(place).is_empty());
    });
}
