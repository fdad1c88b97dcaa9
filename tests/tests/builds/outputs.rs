//! Every format that a disk is made into, read by the programs that others read it with; and what is told of it.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hostler_tests::builds::{Running, unfinished, users_cache};
use hostler_tests::failure::OrFail;
use hostler_tests::place::Place;
use hostler_tests::{program, scenario};
use serde_json::Value;

/// Makes the smallest system that a guest can look into, with what archives tend to lose.
const MAKE: &str = r#"
truncate --size=100M /artifacts/disk.img
mkfs.ext4 -q /artifacts/disk.img
mkdir /mnt/image
mount -o loop /artifacts/disk.img /mnt/image
cd /mnt/image
mkdir -p usr/bin usr/lib usr/lib64 etc boot var/lib/dpkg proc sys dev run tmp srv
for name in bin lib lib64; do ln -s usr/$name $name; done
for name in sh env cat cp find mkdir sort tail tar; do
    file=$(readlink -f "$(command -v $name)")
    cp "$file" usr/bin/$name
    for library in $(ldd "$file" | grep -o '/[^ ]*'); do cp --parents -L "$library" .; done
done
cp -L /etc/os-release etc/os-release
cp /var/lib/dpkg/status var/lib/dpkg/status
for release in 6.1.0-9 6.1.0-10; do echo "kernel $release" >boot/vmlinuz-$release; echo "initrd $release" >boot/initrd.img-$release; done
echo secret >srv/owned && chown 1000:1000 srv/owned && chmod 4750 srv/owned
ln srv/owned srv/zlinked
mknod srv/device b 7 200
truncate --size=20M srv/sparse
cd / && umount /mnt/image
"#;
const FORMATS: [&str; 8] = ["qcow2", "raw", "vmdk", "vhdx", "ova", "tar", "squashfs", "kernel"];

fn build(place: &Place) -> Command {
    fs::write(place.directory("work").join("make.sh"), MAKE).or_fail("the workspace");
    let recipe = place.path("outputs.toml");
    let text = format!(
        "kind = \"builder\"\n[image]\nname = \"outputs\"\nsize = \"1GiB\"\n[debian]\nsource = \"host-apt\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\npackages = [\"e2fsprogs\", \"mount\"]\n[builder]\nworkspace = \"work\"\ndisk = \"disk.img\"\n[guest]\nmemory = \"512MiB\"\nrun = [\"sh -eu /workspace/make.sh\"]\n[output]\nformats = {FORMATS:?}\n[verify]\nboot = false\n"
    );
    fs::write(&recipe, text).or_fail("the recipe");
    let mut command = place.command_of_user(program::path("hostler"));
    command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
    command.arg("build").arg(recipe).arg("--output").arg(place.directory_of_user("out"));
    command.arg("--cache").arg(users_cache());
    command
}

fn said(folder: &Path, program: &str, arguments: &[&str]) -> String {
    program::finish(Command::new(program).args(arguments).current_dir(folder)).succeeded()
}

fn json(folder: &Path, name: &str) -> Value {
    let text = fs::read_to_string(folder.join(name)).or_fail(name);
    serde_json::from_str(&text).or_fail(name)
}

/// What a listing of an archive has to say of the files that archives tend to get wrong.
fn check_listing(listing: &str) {
    let line = |end: &str| {
        let found = listing.lines().find(|line| line.ends_with(end));
        found.unwrap_or_else(|| panic!("no {end} in {listing}")).to_owned()
    };
    let owned = line("srv/owned");
    assert!(owned.starts_with("-rwsr-x---") && owned.contains("1000/1000"), "{owned}");
    let device = line("srv/device").replace(' ', "");
    assert!(device.starts_with('b') && device.contains("7,200"), "{device}");
    assert!(line("bin -> usr/bin").starts_with('l'));
    assert!(!listing.contains("hostler"), "what is mounted on the root is no part of it: {listing}");
}

#[test]
fn every_format_is_what_its_readers_expect_and_tells_what_is_in_it() {
    scenario::build("outputs", |place| {
        let mut running = Running::start(place, build(place));
        let ended = running.finish(Duration::from_secs(400));
        assert_eq!(ended.code(), Some(0), "{}", running.said());
        let out = place.path("out");
        assert!(unfinished(&out).is_empty());
        said(&out, "sha256sum", &["--check", "outputs.sha256"]);

        // Disks, each with the same contents.
        let raw = fs::metadata(out.join("outputs.raw")).or_fail("the raw disk");
        assert_eq!(raw.len(), 100 << 20);
        assert!(raw.blocks() * 512 < 60 << 20, "the raw disk has lost its holes: {} blocks", raw.blocks());
        said(&out, "tar", &["--extract", "--file=outputs.ova"]);
        for (file, format) in [
            ("outputs.qcow2", "qcow2"),
            ("outputs.vmdk", "vmdk"),
            ("outputs.vhdx", "vhdx"),
            ("outputs-disk1.vmdk", "vmdk"),
        ] {
            let identical =
                said(&out, "qemu-img", &["compare", "-f", "raw", "-F", format, "outputs.raw", file]);
            assert!(identical.contains("Images are identical."), "{file}: {identical}");
            said(&out, "qemu-img", &["check", "-q", "-f", format, file]);
        }
        said(&out, "/sbin/e2fsck", &["-f", "-n", "outputs.raw"]);
        for line in fs::read_to_string(out.join("outputs.mf")).or_fail("the appliance's digests").lines() {
            let (name, digest) = line.split_once(")= ").or_fail("a digest");
            let name = name.strip_prefix("SHA256(").or_fail("a name");
            assert!(said(&out, "sha256sum", &[name]).starts_with(digest), "{line}");
        }
        said(&out, "xmllint", &["--noout", "outputs.ovf"]);

        // The root file system.
        let listing = said(&out, "tar", &["--list", "--verbose", "--numeric-owner", "--file=outputs.tar"]);
        check_listing(&listing);
        check_listing(&said(&out, "unsquashfs", &["-lln", "outputs.squashfs"]));
        assert_eq!(
            fs::read_to_string(out.join("outputs.vmlinuz")).or_fail("the kernel"),
            "kernel 6.1.0-10\n"
        );
        assert_eq!(fs::read_to_string(out.join("outputs.initrd")).or_fail("the initrd"), "initrd 6.1.0-10\n");

        // Documents.
        let packages = json(&out, "outputs.packages.json");
        assert_eq!(
            (packages["distribution"].as_str(), packages["system"].as_str()),
            (Some("debian"), Some("dpkg"))
        );
        let names: Vec<&str> = packages["packages"]
            .as_array()
            .or_fail("packages")
            .iter()
            .filter_map(|package| package["name"].as_str())
            .collect();
        assert!(names.contains(&"libc6") && names.contains(&"e2fsprogs"), "{names:?}");
        let bill = json(&out, "outputs.spdx.json");
        assert_eq!(bill["packages"].as_array().map(Vec::len), Some(names.len() + 1));
        let statement = json(&out, "outputs.provenance.json");
        let digests = fs::read_to_string(out.join("outputs.sha256")).or_fail("digests");
        for subject in statement["subject"].as_array().or_fail("subjects") {
            let (name, digest) = (subject["name"].as_str(), subject["digest"]["sha256"].as_str());
            let line = format!("{}  {}", digest.or_fail("a digest"), name.or_fail("a name"));
            assert!(digests.lines().any(|one| one == line), "{line}");
        }
        let materials = statement["predicate"]["buildDefinition"]["resolvedDependencies"].to_string();
        for part in ["InRelease", "pkg:deb/debian/libc6@", "workspace:work"] {
            assert!(materials.contains(part), "{part} did not go in: {materials}");
        }
    });
}
