//! A release tree that createrepo_c has made, on the mirror of a guest that takes anaconda's part: it asks for
//! what anaconda asks for, at the addresses that it is given, and does what the answers end with.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use hostler_runner::beside::Beside;
use hostler_runner::build::delivery::Folder;
use hostler_runner::build::preflight::Workspace;
use hostler_runner::build::registrar::Unregistered;
use hostler_runner::build::{Debugging, Environment, Request, build};
use hostler_runner::cache::{Supply, default_directory};
use hostler_runner::cancel::Cancel;
use hostler_runner::event::{Event, Sink, Stage};
use hostler_runner::recipe::Recipe;
use hostler_runner::vm::initramfs::Initramfs;
use hostler_runner::vm::modules;
use sha2::{Digest as _, Sha256};

use super::tools;

const SPEC: &str = "Name: NAME\nVersion: 1\nRelease: 1\nSummary: x\nLicense: MIT\nBuildArch: noarch\n%description\nx\n%files\n";

const RECIPE: &str = r#"
kind = "installer"
[image]
name = "tree"
size = "256MiB"
[installer]
family = "anaconda"
tree = "tree"
answers = "ks.cfg"
[guest]
memory = "512MiB"
[limits]
total = "5min"
no_progress = "1min"
[verify]
boot = false
"#;

/// What stands in for dracut and anaconda: busybox.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
while [ -z "$(ls /sys/class/virtio-ports 2>/dev/null)" ]; do sleep 0.1; done
set -- $(cat /proc/cmdline)
for argument in "$@"; do
    case $argument in
    inst.repo=*) repo=${argument#*=} ;;
    inst.stage2=*) stage2=${argument#*=} ;;
    ip=dhcp) dhcp=yes ;;
    esac
done
say() { echo "tree: $*"; }
die() { say "failed: $*"; sleep 1; poweroff -f; sleep 60; }
[ "$dhcp" = yes ] || die "no ip=dhcp"
ip link set eth0 up
udhcpc -i eth0 -n -q -s /lease || die "no lease"
get() { wget -q -O /got "$1/$2" && { set -- "$2" $(sha256sum /got); say "$1 $2"; }; }
get "$stage2" .treeinfo || die .treeinfo
image=$(sed -n 's/^mainimage = //p' /got)
get "$stage2" "$image" || die "$image"
get "$repo" repodata/repomd.xml || die repomd.xml
primary=$(sed -n 's/.*href="\([^"]*-primary.xml.[a-z]*\)".*/\1/p' /got | head -n 1)
get "$repo" "$primary" || die "$primary"
get "$repo" noarch/whole-1-1.noarch.rpm || die "the package"
if get "$repo" noarch/altered-1-1.noarch.rpm; then die "an altered package came"; fi
if get "$repo" unnamed; then die "a file came that nothing names"; fi
sed -n '/^%post --nochroot/,/^%end/p' /ks.cfg | sed '1d;$d' >/post
sh /post || die "the answers' end"
poweroff -f
"#;

const LEASE: &str = "#!/bin/sh\n[ \"$1\" != bound ] || ip addr add \"$ip/24\" dev \"$interface\"\n";

fn run(program: &str, arguments: &[&std::ffi::OsStr]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

fn digest(path: &Path) -> String {
    Sha256::digest(fs::read(path).unwrap()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn make_tree(folder: &Path) {
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("images/pxeboot")).unwrap();
    for name in ["whole", "altered"] {
        let spec = folder.join(format!("{name}.spec"));
        fs::write(&spec, SPEC.replace("NAME", name)).unwrap();
        let define = |name: &str, path: &Path| format!("{name} {}", path.display());
        let (top, rpms) = (define("_topdir", &folder.join("rpmbuild")), define("_rpmdir", &tree));
        let arguments = ["--define", &top, "--define", &rpms, "-bb"].map(std::ffi::OsStr::new);
        run("rpmbuild", &[&arguments[..], &[spec.as_os_str()]].concat());
    }
    run("createrepo_c", &[tree.as_os_str()]);
    let package = tree.join("noarch/altered-1-1.noarch.rpm");
    let mut bytes = fs::read(&package).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(package, bytes).unwrap();
    fs::write(tree.join("unnamed"), "x").unwrap();

    fs::copy(&tools().kernel, tree.join("images/pxeboot/vmlinuz")).unwrap();
    let mut initramfs = Initramfs::new(fs::read(&tools().busybox).unwrap(), INIT);
    initramfs.file("lease", 0o755, LEASE);
    let mut order = String::new();
    let wanted = ["virtio_pci", "virtio_console", "virtio_net", "af_packet"];
    for module in modules::load_ordered(&tools().modules, &wanted).unwrap() {
        order.push_str(&format!("{}.ko\n", module.name));
        initramfs.file(&format!("modules/{}.ko", module.name), 0o644, module.bytes);
    }
    initramfs.file("modules/order", 0o644, order);
    initramfs.write(File::create(tree.join("images/pxeboot/initrd.img")).unwrap()).unwrap();
    // More than one read of it.
    fs::write(tree.join("images/install.img"), vec![7; 3 << 20]).unwrap();
    let mut info = String::from(
        "[general]\nname = Test 1\n[images-x86_64]\nkernel = images/pxeboot/vmlinuz\ninitrd = images/pxeboot/initrd.img\n[stage2]\nmainimage = images/install.img\n[variant-Test]\nrepository = .\n[checksums]\n",
    );
    for path in
        ["images/install.img", "images/pxeboot/initrd.img", "images/pxeboot/vmlinuz", "repodata/repomd.xml"]
    {
        info.push_str(&format!("{path} = sha256:{}\n", digest(&tree.join(path))));
    }
    fs::write(tree.join(".treeinfo"), info).unwrap();
}

#[derive(Default)]
struct Stages(Mutex<Vec<Stage>>);

impl Sink for Stages {
    fn event(&self, event: Event) {
        if let Event::Finished(stage) = event {
            self.0.lock().unwrap().push(stage);
        }
    }
}

#[test]
fn an_installer_has_what_its_tree_vouches_for_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    make_tree(folder.path());
    let recipe = folder.path().join("tree.toml");
    fs::write(folder.path().join("ks.cfg"), "lang C\n").unwrap();
    let out = folder.path().join("out");
    let request = Request {
        recipe: Recipe::parse(RECIPE, &recipe).unwrap(),
        workspace: Workspace { folder: out.clone(), shown: out.clone(), option: "--output" },
        beside: Beside::of(&recipe).unwrap(),
        cache: default_directory(|name| std::env::var_os(name)).unwrap(),
        apt_root: "/".into(),
        debugging: Debugging::default(),
        supply: Supply::default(),
        locks: false,
        time: None,
    };
    let stages = Arc::new(Stages::default());
    let environment = Environment {
        shim: env!("CARGO_BIN_EXE_hostler").into(),
        registrar: Arc::new(Unregistered),
        cancel: Arc::new(Cancel::new().unwrap()),
        sink: stages.clone(),
        delivery: Arc::new(Folder(out.clone())),
    };
    let failed = build(&request, &environment).unwrap_err();
    let consoles = || {
        let logs = fs::read_dir(out.join("tree.failure")).unwrap().map(|entry| entry.unwrap().path());
        let logs = logs.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
        logs.map(|path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()).collect::<String>()
    };
    // What this installer installed is an empty disk, which the next stage finds out.
    let done = stages.0.lock().unwrap().clone();
    assert!(done.contains(&Stage::Guest), "{}\n{}", failed.error, consoles());
    assert!(!done.contains(&Stage::Inspect), "an empty disk has no system");
}
