//! The total limit of a recipe ends a build, whatever it does at the time.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hostler_tests::builds::{Confined, PLAYED_QEMU, Running, own_cache, recipe, stand_ins, users_cache};
use hostler_tests::failure::OrFail;
use hostler_tests::place::Place;
use hostler_tests::{program, scenario};

fn build(place: &Place, more: &str, cache: &Path) -> Command {
    let mut command = place.command_of_user(program::path("hostler"));
    command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
    command.arg("build").arg(recipe(place, "limited", more));
    command.arg("--output").arg(place.directory_of_user("out")).arg("--cache").arg(cache);
    command
}

fn left(place: &Place) -> Vec<String> {
    let entries = fs::read_dir(place.path("out")).or_fail("the output directory");
    entries.map(|entry| entry.or_fail("an entry").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn a_guest_is_ended_with_its_last_screen() {
    scenario::build("limit-guest", |place| {
        // With an accelerator it would be done in time.
        let more = "[guest]\nmemory = \"512MiB\"\nrun = [\"sleep 600\"]\n[limits]\ntotal = \"1min\"\n";
        let begun = Instant::now();
        let mut running = Running::start(place, build(place, more, &users_cache()));
        running.wait_for_stage("guest");
        let status = running.finish(Duration::from_secs(100));
        let (took, said) = (begun.elapsed(), running.said());
        println!("a build with a limit of 60 s ended after {:.1} s", took.as_secs_f64());
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(took > Duration::from_secs(58) && took < Duration::from_secs(90), "{took:?}");
        let told = said.lines().find(|line| line.starts_with("hostler: [")).or_fail("the failure");
        assert!(told.starts_with("hostler: [timeout] the builder guest failed: "), "{said}");
        assert!(told.contains("not done within the build's total limit of 1m; it was "), "{said}");
        // On a busy host it may not have come to its first step, and then has not said anything.
        let has_begun = told.contains("it was in step ");
        assert!(has_begun || told.ends_with("it was before its first step"), "{said}");
        assert!(!has_begun || said.contains("the last on its screen:\n  | "), "{said}");
        assert_eq!(left(place), ["limited.failure"]);
        let bundle = place.path("out/limited.failure");
        let page = bundle.join("index.html");
        assert!(said.contains(&format!("hostler: all that is known of it: {}", page.display())), "{said}");
        let mut files: Vec<String> = fs::read_dir(&bundle)
            .or_fail("the bundle")
            .map(|entry| entry.or_fail("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        files.sort();
        assert_eq!(
            files,
            ["console.log", "failure.json", "index.html", "qemu.txt", "screen.png", "screen.txt"]
        );
        let picture = fs::read(bundle.join("screen.png")).or_fail("the picture");
        assert!(picture.starts_with(b"\x89PNG\r\n"));
        let text = fs::read_to_string(bundle.join("failure.json")).or_fail("the document");
        let document: serde_json::Value = serde_json::from_str(&text).or_fail("JSON");
        assert_eq!(document["class"], "timeout");
        assert_eq!(document["stages"].as_array().map(Vec::len), Some(6), "{text}");
        assert!(document["guest"]["disk"]["operations"].as_u64() > Some(0), "{text}");
        assert!(Confined::all(place).is_empty());
    });
}

#[test]
fn a_conversion_is_ended_and_its_stage_named() {
    scenario::build("limit-convert", |place| {
        let slow = "#!/bin/sh\ncase $1 in convert) exec sleep 600 ;; esac\nexec qemu-img \"$@\"\n";
        let folder = stand_ins(place, &[("qemu-system-x86_64", PLAYED_QEMU), ("qemu-img", slow)]);
        let cache = own_cache(place);
        let more = "[guest]\nmemory = \"512MiB\"\n[limits]\ntotal = \"40s\"\n";
        let mut command = build(place, more, &cache);
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()));
        let begun = Instant::now();
        let mut running = Running::start(place, command);
        running.wait_for_stage("convert");
        let status = running.finish(Duration::from_secs(60));
        let (took, said) = (begun.elapsed(), running.said());
        println!("a build with a limit of 40 s ended after {:.1} s", took.as_secs_f64());
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(took < Duration::from_secs(50), "{took:?}");
        let told = said.lines().find(|line| line.starts_with("hostler: [")).or_fail("the failure");
        assert!(
            told.starts_with(
                "hostler: [timeout] the build was not done within its total limit of 40s; it was in stage convert: raise limits.total"
            ),
            "{said}"
        );
        assert_eq!(left(place), ["limited.failure"]);
        assert!(place.path("out/limited.failure/index.html").exists());
        assert!(Confined::all(place).is_empty());
    });
}
