//! The `hostler` program as a script sees it: exit statuses, streams, and what it leaves behind.
//! No network, no guest.

#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Output};

use hostler_runner::cache::Cache;
use hostler_runner::lock::{Lock, LockedFile};

const RECIPE: &str = r#"
kind = "debian"
[image]
name = "x"
size = "1GiB"
hostname = "x"
[debian]
source = "http://127.0.0.1:9/debian"
suite = "bookworm"
architecture = "amd64"
components = ["main"]
packages = []
[guest]
run = []
memory = "512MiB"
cpus = 1
[limits]
total = "1min"
no_progress = "30s"
[verify]
boot = false
"#;

fn hostler(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hostler"))
        .args(arguments)
        .current_dir(folder)
        .env_remove("HOSTLER_SOCKET")
        .env("HOSTLER_CACHE", folder.join("cache"))
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn wrong_usage_ends_with_2() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [&[][..], &["build"], &["fly"], &["build", "--fast", "x.toml"]] {
        let output = hostler(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty());
    }
    assert_eq!(hostler(folder.path(), &["--version"]).status.code(), Some(0));
}

#[test]
fn a_wrong_recipe_is_told_with_its_line_and_ends_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = RECIPE.replace("hostname", "hostnam");
    std::fs::write(folder.path().join("x.toml"), recipe).unwrap();
    let output = hostler(folder.path(), &["build", "x.toml"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("x.toml") && said.contains("hostnam"), "{said}");
    let missing = hostler(folder.path(), &["build", "none.toml"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("none.toml"));
}

#[test]
fn a_build_whose_archive_is_away_ends_with_1_and_leaves_what_is_known_of_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x.toml"), RECIPE).unwrap();
    let output = hostler(folder.path(), &["--json", "build", "x.toml", "--output", "out"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&document["result"], &document["class"]), (&"failed".into(), &"download_failed".into()));
    let entries: Vec<_> =
        std::fs::read_dir(folder.path().join("out")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let [bundle] = entries.as_slice() else { panic!("{entries:?}") };
    assert!(bundle.to_string_lossy().ends_with(".failure"), "{bundle:?}");
    let page = std::fs::read_to_string(bundle.join("index.html")).unwrap();
    assert!(page.contains("<code>download_failed</code>") && page.contains("What to do: "), "{page}");
    assert!(document["page"].as_str().is_some_and(|path| path.ends_with("index.html")), "{document}");
}

#[test]
fn a_dead_builds_scratch_directory_is_swept_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x.toml"), RECIPE).unwrap();
    // A first build makes the directory that builds work in: the output, or where root builds, the
    // build user's part of the cache.
    hostler(folder.path(), &["build", "x.toml", "--output", "out"]);
    let users = std::fs::read_dir(folder.path().join("cache")).unwrap().map(|entry| entry.unwrap());
    let is_number = |name: &str| name.parse::<u32>().is_ok();
    let part = users.into_iter().find(|entry| entry.file_name().to_str().is_some_and(is_number));
    let workspace = part.map_or_else(|| folder.path().join("out"), |part| part.path());
    let dead = workspace.join(".hostler-build.0123456789ab");
    std::fs::create_dir_all(dead.join("tree")).unwrap();
    let owner = std::fs::metadata(&workspace).unwrap().uid();
    for path in [dead.join("tree"), dead.clone()] {
        std::os::unix::fs::chown(path, Some(owner), None).unwrap();
    }
    hostler(folder.path(), &["build", "x.toml", "--output", "out"]);
    assert!(!dead.exists());
}

#[test]
fn a_cache_is_carried_looked_at_damaged_found_so_and_pruned() {
    let folder = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let from = Cache::open(other.path()).unwrap();
    let hello = from.put(b"hello").unwrap();
    from.put(b"other").unwrap();
    let archive = folder.path().join("cache.tar");
    from.export(None, std::fs::File::create(&archive).unwrap()).unwrap();
    let run = |arguments: &[&str], status: i32| {
        let output = hostler(folder.path(), &[&["cache"], arguments].concat());
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {}", text(&output.stderr));
        output
    };

    assert_eq!(text(&run(&["import", "cache.tar"], 0).stdout), "took 2 files, 10 B\n");
    let said: serde_json::Value = serde_json::from_slice(&run(&["stat", "--json"], 0).stdout).unwrap();
    assert_eq!((&said["files"], &said["bytes"]), (&2.into(), &10.into()));
    assert_eq!(text(&run(&["verify"], 0).stdout), "2 files are intact, 10 B\n");
    assert!(run(&["export", "-"], 0).stdout == std::fs::read(&archive).unwrap(), "not the same archive");

    // Root's own cache has one in it for the user that builds for root.
    let directory = Path::new(said["directory"].as_str().unwrap()).join("sha256");
    let name = hello.to_string();
    std::fs::write(folder.path().join(directory).join(&name[..2]).join(&name), "jello").unwrap();
    let output = run(&["verify"], 1);
    assert_eq!(text(&output.stdout), "1 files are intact, 5 B\n");
    assert!(text(&output.stderr).contains(&format!("damaged, and removed: {hello}")));
    assert_eq!(text(&run(&["import", "cache.tar"], 0).stdout), "took 1 files, 5 B; 1 were there already\n");

    assert_eq!(text(&run(&["prune", "--unused-for", "1day"], 0).stdout), "removed 0 files, 0 B; 10 B stay\n");
    assert_eq!(text(&run(&["prune", "--limit", "7B"], 0).stdout), "removed 1 files, 5 B; 5 B stay\n");
    assert_eq!(run(&["import", "missing.tar"], 1).stdout, b"");
    std::fs::write(folder.path().join("cut.tar"), &std::fs::read(&archive).unwrap()[..700]).unwrap();
    run(&["prune", "--limit", "0B"], 0);
    // What the cache lacks is called as the lock calls it, and the half of an archive is gone or told of.
    let file = LockedFile {
        name: "pool/hello.deb".to_owned(),
        sha256: hello,
        size: 5,
        urls: Vec::new(),
        verified: true,
    };
    let lock = Lock { files: vec![file], ..Lock::new() };
    std::fs::write(folder.path().join("x.lock"), lock.text().unwrap()).unwrap();
    let output = run(&["export", "half.tar", "--lock", "x.lock"], 1);
    assert!(text(&output.stderr).contains("cannot export pool/hello.deb"), "{}", text(&output.stderr));
    let is_told = text(&output.stderr).contains("half.tar is not whole, remove it");
    assert_ne!(folder.path().join("half.tar").exists(), !is_told, "{}", text(&output.stderr));
    let output = run(&["import", "cut.tar"], 1);
    assert!(text(&output.stderr).contains("was it cut off?"), "{}", text(&output.stderr));
}

#[test]
fn a_cache_limit_that_is_none_is_told_before_anything_is_downloaded() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x.toml"), RECIPE).unwrap();
    // Also for a caller that ignores SIGCHLD, as some supervisors do: root's build is a child's.
    for option in ["--default-signal=CHLD", "--ignore-signal=CHLD"] {
        let output = Command::new("env")
            .arg(option)
            .args([env!("CARGO_BIN_EXE_hostler"), "build", "x.toml"])
            .current_dir(folder.path())
            .env("HOSTLER_CACHE", folder.path().join("cache"))
            .env("HOSTLER_CACHE_LIMIT", "much")
            .output()
            .unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{option}: {said}");
        assert!(said.contains("HOSTLER_CACHE_LIMIT is \"much\""), "{option}: {said}");
    }
}

#[test]
fn what_is_wrong_with_a_cache_is_told_beside_the_answer() {
    let folder = tempfile::tempdir().unwrap();
    let stat = |folder: &Path| {
        let output = hostler(folder, &["--json", "cache", "stat"]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        output
    };
    assert_eq!(text(&stat(folder.path()).stderr), "");
    // Root has one for each user that it builds as.
    let cache = folder.path().join("cache");
    let each = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path());
    let cache = each.chain([cache.clone()]).find(|place| place.join("uses").is_dir()).unwrap();
    // What root cannot read either.
    std::fs::create_dir(cache.join("uses/unreadable")).unwrap();
    let output = stat(folder.path());
    let told = text(&output.stderr);
    assert!(told.contains("counts as in use") && told.contains("uses/unreadable"), "{told}");
    serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
}
