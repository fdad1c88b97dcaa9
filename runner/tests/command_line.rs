//! The `hostler` program as a script sees it: exit statuses, streams, and what it leaves behind.
//! No network, no guest.

#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Output};

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
fn a_build_whose_archive_is_away_ends_with_1_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x.toml"), RECIPE).unwrap();
    let output = hostler(folder.path(), &["--json", "build", "x.toml", "--output", "out"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["result"], "failed");
    assert_eq!(std::fs::read_dir(folder.path().join("out")).unwrap().count(), 0);
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
