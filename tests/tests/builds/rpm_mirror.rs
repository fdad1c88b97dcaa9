//! A mirror of a tree of rpms that createrepo_c has made, of which dnf installs, with the tree's signature
//! checked.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;

use hostler_tests::failure::OrFail;
use hostler_tests::place::{Place, USER};
use hostler_tests::{program, scenario};

use super::mirror::{Serving, succeed};

const SPEC: &str = "Name: NAME\nVersion: 1\nRelease: 1\nSummary: x\nLicense: MIT\nBuildArch: noarch\nREQUIRES\n%description\nx\n%install\nmkdir -p %{buildroot}/opt\necho NAME > %{buildroot}/opt/NAME\n%files\n/opt/NAME\n";

/// A tree of three packages, of which one needs another, and of an image; signed. And its key.
fn tree(place: &Place) -> (PathBuf, PathBuf) {
    let tree = place.directory("tree");
    for (name, requires) in [("alpha", "Requires: /opt/beta"), ("beta", ""), ("gamma", "")] {
        let spec = place.path(format!("{name}.spec"));
        fs::write(&spec, SPEC.replace("NAME", name).replace("REQUIRES", requires)).or_fail("writing a spec");
        let mut build = place.command("rpmbuild");
        build.arg("--define").arg(format!("_topdir {}", place.path("rpmbuild").display()));
        build.arg("--define").arg(format!("_rpmdir {}", tree.join("Packages").display()));
        succeed(place, "rpmbuild.log", build.arg("-bb").arg(&spec));
    }
    succeed(place, "createrepo.log", place.command("createrepo_c").arg("--zck").arg(&tree));
    fs::create_dir(tree.join("images")).or_fail("making a folder");
    fs::write(tree.join("images/boot.iso"), "an image").or_fail("writing an image");
    let digest = |path: &str| {
        let said = program::succeed("sha256sum", [tree.join(path)]);
        said.split_whitespace().next().or_fail("a digest").to_owned()
    };
    let info = format!(
        "[checksums]\nimages/boot.iso = sha256:{}\nrepodata/repomd.xml = sha256:{}\n[general]\nfamily = Test\n",
        digest("images/boot.iso"),
        digest("repodata/repomd.xml")
    );
    fs::write(tree.join(".treeinfo"), info).or_fail("writing .treeinfo");

    let home = place.directory("keys");
    let gpg = |arguments: &[&str]| {
        let mut command = place.command("gpg");
        command.arg("--homedir").arg(&home);
        command
            .args(["--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""])
            .args(arguments);
        command
    };
    succeed(
        place,
        "gpg.log",
        &mut gpg(&["--quick-gen-key", "tree@hostler.test", "ed25519", "sign", "never"]),
    );
    succeed(place, "gpg.log", gpg(&["--armor", "--detach-sign"]).arg(tree.join("repodata/repomd.xml")));
    let key = place.path("key.asc");
    succeed(place, "gpg.log", gpg(&["--armor", "--output"]).arg(&key).arg("--export"));
    succeed(place, "gpg.log", place.command("gpgconf").arg("--homedir").arg(&home).args(["--kill", "all"]));
    (tree, key)
}

fn sync(place: &Place, into: &str, upstream: &str, key: &Path, more: &[&str]) -> (Option<i32>, String) {
    let mut command = place.command(program::path("hostler"));
    command.args(["mirror", "sync", "rpm", "--name", "demo", "--source", upstream, "--keyring"]).arg(key);
    command.arg("--into").arg(place.path(into)).args(more);
    let output = command.output().or_fail("running the sync");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

fn dnf(place: &Place, address: &str, key: &Path, package: &str) -> Command {
    let mut command = place.command("dnf");
    command.arg(format!("--installroot={}", place.path("target").display()));
    command.arg(format!("--repofrompath=demo,{address}/demo"));
    for option in
        ["reposdir=/nonexistent", "demo.repo_gpgcheck=1", "demo.gpgcheck=0", "pluginpath=/nonexistent"]
    {
        command.arg(format!("--setopt={option}"));
    }
    command.arg(format!("--setopt=demo.gpgkey=file://{}", key.display()));
    command.args(["--releasever=1", "--repo=demo", "-y", "install", package]);
    command
}

#[test]
fn dnf_installs_from_a_mirror_of_what_is_needed() {
    scenario::build("rpm-mirror", |place| {
        let (tree, key) = tree(place);
        for name in ["mirror", "other"] {
            chown(place.directory(name), Some(USER), Some(USER)).or_fail("giving a mirror to its user");
        }
        let mut server = place.command("python3");
        server.args(["-u", "-m", "http.server", "--bind", "127.0.0.1", "0", "--directory"]).arg(&tree);
        let upstream = Serving::start_saying(server, "(http://", "/)");

        let address = format!("http://{}", upstream.address);
        let (code, said) = sync(place, "mirror", &address, &key, &["--packages", "alpha", "--images"]);
        assert_eq!(code, Some(0), "{said}");
        let files = place.path("mirror/current/demo");
        assert!(files.join("images/boot.iso").exists() && files.join(".treeinfo").exists(), "{said}");
        assert!(files.join("Packages/noarch/beta-1-1.noarch.rpm").exists());
        assert!(!files.join("Packages/noarch/gamma-1-1.noarch.rpm").exists());
        // Other forms of the indices are for clients that this host has none of.
        let packed = fs::read_dir(files.join("repodata")).or_fail("the indices");
        let is_zchunk = |name: &Path| name.extension().is_some_and(|suffix| suffix == "zck");
        assert_eq!(packed.filter(|entry| is_zchunk(&entry.as_ref().or_fail("an entry").path())).count(), 3);

        let mut serve = place.command(program::path("hostler"));
        serve.args(["mirror", "serve", "--listen", "127.0.0.1:0"]).arg(place.path("mirror"));
        let serving = Serving::start(serve);
        let said = succeed(place, "dnf.log", &mut dnf(place, &serving.address, &key, "alpha"));
        assert!(said.contains("Complete!"), "{said}");
        assert_eq!(fs::read_to_string(place.path("target/opt/beta")).or_fail("what was installed"), "beta\n");
        drop(serving);
        // dnf leaves an agent for the keys that it checked with.
        for cache in fs::read_dir(place.path("target/var/cache/dnf")).or_fail("dnf's cache") {
            let home = cache.or_fail("an entry").path().join("pubring");
            if home.exists() {
                succeed(
                    place,
                    "gpg.log",
                    place.command("gpgconf").arg("--homedir").arg(home).args(["--kill", "all"]),
                );
            }
        }

        // Another key, and a byte that is not as it was.
        let stranger = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        let (code, said) = sync(place, "other", &address, stranger, &[]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("cannot trust repodata/repomd.xml"), "{said}");
        let package = tree.join("Packages/noarch/gamma-1-1.noarch.rpm");
        let mut bytes = fs::read(&package).or_fail("a package");
        bytes[500] ^= 1;
        fs::write(&package, bytes).or_fail("altering it");
        let (code, said) = sync(place, "other", &address, &key, &[]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("altered Packages/noarch/gamma-1-1.noarch.rpm"), "{said}");
        assert!(!place.path("other/current").exists());
    });
}
