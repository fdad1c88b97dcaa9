//! The kind `builder`: commands with loop devices and mounts in a throwaway machine.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hostler_tests::builds::{Confined, Running, unfinished, users_cache};
use hostler_tests::failure::OrFail;
use hostler_tests::place::Place;
use hostler_tests::{program, scenario};

const LIMIT: Duration = Duration::from_secs(300);

fn build(place: &Place, commands: &[&str], more: &[&str]) -> Command {
    let work = place.directory("work");
    fs::write(work.join("greeting"), "hello from the workspace\n").or_fail("the workspace");
    let recipe = place.path("throwaway.toml");
    let text = format!(
        "kind = \"builder\"\n[image]\nname = \"throwaway\"\nsize = \"1GiB\"\n[debian]\nsource = \"host-apt\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\npackages = [\"e2fsprogs\", \"mount\"]\n[builder]\nworkspace = \"work\"\nartifacts = [\"disk.img\", \"said\"]\n[guest]\nmemory = \"512MiB\"\nrun = {commands:?}\n"
    );
    fs::write(&recipe, text).or_fail("the recipe");
    let mut command = place.command_of_user(program::path("hostler"));
    command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
    command.arg("build").arg(recipe).arg("--output").arg(place.directory_of_user("out"));
    command.arg("--cache").arg(users_cache()).args(more);
    command
}

fn run(place: &Place, commands: &[&str], more: &[&str], status: i32) -> String {
    let mut running = Running::start(place, build(place, commands, more));
    let ended = running.finish(LIMIT);
    let said = running.said();
    assert_eq!(ended.code(), Some(status), "{said}");
    assert!(unfinished(&place.path("out")).is_empty());
    assert!(Confined::all(place).is_empty());
    said
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).or_fail("a folder");
    let mut names: Vec<String> =
        entries.map(|entry| entry.or_fail("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Whether the first partition of a disk has a file system with this file.
fn holds(disk: &Path, file: &str) -> bool {
    let mut record = [0; 512];
    fs::File::open(disk).and_then(|mut file| file.read_exact(&mut record)).or_fail("the boot record");
    let start = u32::from_le_bytes([record[454], record[455], record[456], record[457]]);
    let offset = u64::from(start) * 512;
    let system = format!("{}?offset={offset}", disk.display());
    let told = Command::new("/sbin/debugfs").args(["-R", &format!("stat {file}"), &system]).output();
    String::from_utf8_lossy(&told.or_fail("debugfs").stdout).contains("Type: regular")
}

#[test]
fn commands_use_loops_and_mounts_and_leave_them_behind_in_the_machine() {
    scenario::build("throwaway", |place| {
        // Each leaves something that would be a leak on the host.
        let commands = [
            "truncate --size=300M /artifacts/disk.img && mkfs.ext4 -q /artifacts/disk.img",
            "mkdir /mnt/image && mount -o loop /artifacts/disk.img /mnt/image && cp greeting /mnt/image/ && sync; sleep 9000 </dev/null >/dev/null 2>&1 &",
            "unshare --user --map-root-user --mount sh -c 'mount -t tmpfs tmpfs /mnt && id -u' >/artifacts/said",
            "losetup --list >>/artifacts/said; modprobe overlay; apt-cache policy apt >>/artifacts/said",
        ];
        run(place, &commands, &[], 0);
        let out = place.path("out");
        let made =
            ["throwaway.artifacts", "throwaway.console.log", "throwaway.provenance.json", "throwaway.sha256"];
        assert_eq!(names(&out), made);
        let mut check = Command::new("sha256sum");
        program::finish(check.args(["--check", "throwaway.sha256"]).current_dir(&out)).succeeded();
        let artifacts = out.join("throwaway.artifacts");
        let said = fs::read_to_string(artifacts.join("said")).or_fail("what was said");
        assert!(said.starts_with("0\n"), "no root in a user namespace: {said}");
        assert!(said.contains("/dev/loop"), "the loop device is gone already: {said}");
        let disk = artifacts.join("disk.img");
        let read = Command::new("/sbin/debugfs").args(["-R", "cat greeting"]).arg(&disk).output();
        let read = read.or_fail("reading the artifact");
        assert_eq!(String::from_utf8_lossy(&read.stdout), "hello from the workspace\n");
        let loops = fs::read_to_string("/proc/self/mountinfo").or_fail("the host's mounts");
        assert!(!loops.contains("/mnt/image"));

        // The machine itself was made once. A file that is not there is no success.
        let said = run(place, &["touch /artifacts/said /root/kept"], &["--keep"], 1);
        assert!(said.contains("was prepared by an earlier build"), "{said}");
        assert!(!said.contains("compose: start"), "{said}");
        assert!(said.contains("the commands left no file /artifacts/disk.img"), "{said}");
        let last = said.lines().find(|line| line.starts_with("hostler: [")).or_fail("the failure");
        assert!(last.contains("step artifacts in the guest failed with status 1"), "{said}");

        // What is kept needs nothing that is not kept as well.
        let kept = out.join("throwaway.failure");
        let told = program::succeed("qemu-img", ["info".as_ref(), kept.join("overlay.qcow2").as_os_str()]);
        assert!(!told.contains("backing file"), "{told}");
        let raw = place.path("kept.raw");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "raw"]).arg(kept.join("overlay.qcow2")).arg(&raw);
        program::finish(&mut convert).succeeded();
        assert!(holds(&raw, "/root/kept"), "the machine's disk is not as the commands left it");
        for name in ["builder.cpio", "workspace.tar", "results.tar"] {
            assert!(kept.join(name).exists(), "{name} was not kept: {:?}", names(&kept));
        }
        assert!(names(&kept).iter().any(|name| name.contains("vmlinuz")), "{:?}", names(&kept));
    });
}
