//! Whole images, each built, booted and proven for real: far too long for every change, so `make test-images` runs
//! them (about half an hour on two cores that emulate).
//!
//! Needs root, as the tests of builds do, and the archive that the host's apt sources name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hostler_tests::builds::{Running, users_cache};
use hostler_tests::failure::OrFail;
use hostler_tests::place::Place;
use hostler_tests::{program, scenario};

/// For one build of an image, also on a host that does other things as well.
const LIMIT: Duration = Duration::from_secs(90 * 60);

fn build(place: &Place, recipe: &Path, out: &str) -> Command {
    let mut command = place.command_of_user(program::path("hostler"));
    command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
    command.arg("build").arg(recipe).arg("--output").arg(place.directory_of_user(out));
    command.arg("--cache").arg(users_cache());
    command
}

fn succeed(place: &Place, command: Command) -> String {
    let mut running = Running::start(place, command);
    let ended = running.finish(LIMIT);
    let said = running.said();
    assert_eq!(ended.code(), Some(0), "{said}");
    said
}

fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../runner/examples").join(name);
    fs::read_to_string(path).or_fail("an example")
}

/// The digests of a build's files, by name.
fn digests(out: &Path, name: &str) -> BTreeMap<String, String> {
    let text = fs::read_to_string(out.join(format!("{name}.sha256"))).or_fail("the digests");
    let lines = text.lines().filter_map(|line| line.split_once("  "));
    lines.map(|(digest, name)| (name.to_owned(), digest.to_owned())).collect()
}

#[test]
fn two_builds_from_one_lock_for_one_time_are_the_same_bytes() {
    scenario::privileged_within("again", 3 * LIMIT, |place| {
        let recipe = place.path("debian-12.toml");
        let formats = r#"formats = ["qcow2", "tar", "squashfs", "ova"]"#;
        let text = example("debian-12.toml").replace(r#"formats = ["qcow2"]"#, formats);
        assert!(text.contains(formats));
        fs::write(&recipe, text).or_fail("the recipe");
        let lock = place.directory_of_user("lock").join("debian-12.lock");
        for (out, locked) in [("one", None), ("two", Some("--locked"))] {
            let mut command = build(place, &recipe, out);
            command.env("SOURCE_DATE_EPOCH", "1763000000").arg("--lock").arg(&lock).args(locked);
            succeed(place, command);
        }
        let [one, two] = ["one", "two"].map(|out| digests(&place.path(out), "debian-12"));
        let differ: Vec<&String> = one.keys().filter(|name| one.get(*name) != two.get(*name)).collect();
        // What made it is told in there: its versions, and the consoles' digests.
        assert_eq!(differ, ["debian-12.provenance.json"], "{one:#?}\n{two:#?}");
        check_bill(place, &place.path("one").join("debian-12.spdx.json"));
    });
}

/// Has SPDX's own tools judge a bill of materials.
fn check_bill(place: &Place, bill: &Path) {
    let venv = place.path("venv");
    program::finish(Command::new("python3").args(["-m", "venv"]).arg(&venv)).succeeded();
    let mut install = Command::new(venv.join("bin/pip"));
    program::finish(install.args(["install", "--quiet", "spdx-tools==0.8.5"])).succeeded();
    program::finish(Command::new(venv.join("bin/pyspdxtools")).arg("--infile").arg(bill)).succeeded();
}

#[test]
fn debians_installer_installs_or_a_person_reads_which_file_the_archive_does_not_have() {
    scenario::privileged_within("installer", 3 * LIMIT, |place| {
        let folder = place.directory("debian-installer");
        fs::write(folder.join("preseed.cfg"), example("debian-installer/preseed.cfg")).or_fail("the answers");
        let recipe = place.path("debian-installer.toml");
        fs::write(&recipe, example("debian-installer.toml")).or_fail("the recipe");
        let mut running = Running::start(place, build(place, &recipe, "out"));
        let ended = running.finish(LIMIT);
        let said = running.said();
        if ended.code() == Some(0) {
            assert!(place.path("out/debian-installed.qcow2").exists(), "{said}");
            return;
        }
        // The archive's fault, and nobody's else.
        let told = said.lines().find(|line| line.starts_with("hostler: [")).or_fail("the failure");
        assert!(told.starts_with("hostler: [download_failed]"), "{said}");
        assert!(told.contains(".udeb: upstream answered 404"), "{said}");
    });
}

/// A system with cloud-init, made here: no archive of packages has cloud images.
const BASE: &str = r#"
kind = "debian"
[image]
name = "base"
size = "2GiB"
hostname = "base"
[debian]
source = "host-apt"
suite = "bookworm"
architecture = "amd64"
packages = ["linux-image-cloud-amd64", "grub-pc", "systemd-sysv", "dbus", "udev", "cloud-init", "cloud-guest-utils", "locales"]
[guest]
memory = "1GiB"
[limits]
total = "80min"
[verify]
boot = false
"#;

#[test]
fn a_cloud_image_is_customised_and_as_fresh_as_before() {
    scenario::privileged_within("cloud", 3 * LIMIT, |place| {
        let recipe = place.path("base.toml");
        fs::write(&recipe, BASE).or_fail("the recipe");
        succeed(place, build(place, &recipe, "base"));
        let folder = place.directory("cloud-image");
        fs::write(folder.join("user-data"), example("cloud-image/user-data")).or_fail("the answers");
        let recipe = place.path("cloud-image.toml");
        let text = example("cloud-image.toml").replace("debian-12-generic-amd64.qcow2", "base/base.qcow2");
        fs::write(&recipe, text.replace("30min", "80min")).or_fail("the recipe");
        let said = succeed(place, build(place, &recipe, "out"));
        assert!(said.contains("verify: done"), "{said}");
    });
}
