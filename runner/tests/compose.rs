//! Disks out of packages of the test's own: odd names, links, owners, and what must be refused.
//!
//! Needs e2fsprogs, which every Debian has; no network and no privileges.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

use hostler_runner::cache::{Cache, Digest};
use hostler_runner::debian::catalogue::Catalogue;
use hostler_runner::debian::release::Release;
use hostler_runner::debian::{Package, Repository, Selection, Suite};
use hostler_runner::disk::{self, ComposeError, ComposedDisk};
use hostler_runner::event::Silent;
use hostler_runner::recipe::Recipe;
use hostler_runner::stop::Stop;

/// An entry of a package: path, kind, link target or contents, owner, group and mode.
struct Entry(&'static str, tar::EntryType, &'static str, u64, u64, u32);

const DIRECTORY: tar::EntryType = tar::EntryType::Directory;
const FILE: tar::EntryType = tar::EntryType::Regular;
const SYMLINK: tar::EntryType = tar::EntryType::Symlink;
const LINK: tar::EntryType = tar::EntryType::Link;

fn tar_of(entries: &[Entry]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for Entry(path, kind, text, uid, gid, mode) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_uid(*uid);
        header.set_gid(*gid);
        header.set_mode(*mode);
        header.set_mtime(1_600_000_000);
        let contents = if *kind == FILE { text.as_bytes() } else { b"" };
        header.set_size(contents.len() as u64);
        // Raw, as the library itself refuses to write the paths that must be refused here.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        if matches!(*kind, SYMLINK | LINK) {
            header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_cksum();
        builder.append(&header, contents).unwrap();
    }
    builder.into_inner().unwrap()
}

struct World {
    directory: tempfile::TempDir,
    cache: Cache,
    index: String,
    names: Vec<&'static str>,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(&directory.path().join("cache")).unwrap();
        Self { directory, cache, index: String::new(), names: Vec::new() }
    }

    fn package(&mut self, name: &'static str, extra: &str, control: &[Entry], data: &[Entry]) {
        let fields = format!("Package: {name}\nVersion: 1\nArchitecture: amd64\n{extra}");
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(fields.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, "control", fields.as_bytes()).unwrap();
        let mut control_tar = builder.into_inner().unwrap();
        // Two archives in a row: without the end mark of the first.
        control_tar.truncate(control_tar.len() - 1024);
        control_tar.extend(tar_of(control));
        let mut builder = ar::Builder::new(Vec::new());
        for (member, bytes) in
            [("debian-binary", b"2.0\n".to_vec()), ("control.tar", control_tar), ("data.tar", tar_of(data))]
        {
            let header = ar::Header::new(member.as_bytes().to_vec(), bytes.len() as u64);
            builder.append(&header, bytes.as_slice()).unwrap();
        }
        let bytes = builder.into_inner().unwrap();
        let digest = self.cache.put(&bytes).unwrap();
        let size = bytes.len();
        self.index
            .push_str(&format!("{fields}Filename: pool/{name}.deb\nSize: {size}\nSHA256: {digest}\n\n"));
        self.names.push(name);
    }

    fn compose(&self) -> Result<ComposedDisk, ComposeError> {
        let recipe = Recipe::parse(
            "kind = \"debian\"\n[image]\nname = \"x\"\nsize = \"256MiB\"\nhostname = \"a.b\"\n[debian]\nsource = \"http://m.test/d\"\nsuite = \"s\"\narchitecture = \"amd64\"\npackages = []\n",
            Path::new("test.toml"),
        )
        .unwrap();
        let mut catalogue = Catalogue::default();
        catalogue.add(0, self.index.clone().into_bytes(), "amd64").unwrap();
        let packages = self.names.iter().map(|name| {
            let id = catalogue.candidate(name).unwrap();
            let file = catalogue.file(id).unwrap();
            Package {
                id,
                name: (*name).to_owned(),
                version: catalogue.version(id).to_owned(),
                file,
                automatic: *name != "first",
            }
        });
        let packages = packages.collect();
        let release = "Codename: s\nDate: Sat, 21 Nov 2026 00:53:02 UTC\nArchitectures: amd64\nSHA256:\n";
        let suite = Suite {
            name: "s".to_owned(),
            components: vec!["main".to_owned()],
            in_release: (Digest::of(b""), 0),
            release: Release::parse(release).unwrap(),
        };
        let repository = Repository {
            name: "d".to_owned(),
            uris: vec!["http://m.test/d".to_owned()],
            own: vec!["http://m.test/d".to_owned()],
            keyring: PathBuf::from("/none"),
            suites: vec![suite],
        };
        let selection = Selection {
            architecture: "amd64".to_owned(),
            repositories: vec![repository],
            catalogue,
            packages,
            own_keyring: false,
        };
        let scratch = self.directory.path().join("scratch");
        std::fs::create_dir(&scratch).unwrap();
        disk::compose((&recipe, &selection, None), None, &self.cache, &scratch, &Stop::default(), &Silent)
    }

    fn refused(&self) -> String {
        let error = self.compose().unwrap_err();
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text.push_str(&format!(": {error}"));
            cause = error.source();
        }
        text
    }
}

fn debugfs(disk: &ComposedDisk, command: &str) -> String {
    let place = format!("{}?offset={}", disk.image.display(), disk.partition.offset);
    let output =
        Command::new("/usr/sbin/debugfs").args(["-R", command]).arg(place).env_clear().output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(errors.lines().count(), 1, "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Mode, owner and group of a path.
fn stat(disk: &ComposedDisk, path: &str) -> (String, String, String) {
    let text = debugfs(disk, &format!("stat \"{}\"", path.replace('"', "\"\"")));
    let words: Vec<&str> = text.split_whitespace().collect();
    let after = |name: &str| {
        let place = words.iter().position(|word| *word == name).unwrap();
        words[place + 1].to_owned()
    };
    (after("Mode:"), after("User:"), after("Group:"))
}

fn tuple(mode: &str, uid: &str, gid: &str) -> (String, String, String) {
    (mode.to_owned(), uid.to_owned(), gid.to_owned())
}

#[test]
fn owners_modes_links_and_dpkgs_database() {
    let mut world = World::new();
    let base = [
        Entry("./", DIRECTORY, "", 0, 0, 0o755),
        Entry("./etc/", DIRECTORY, "", 0, 0, 0o755),
        Entry("./tmp/", DIRECTORY, "", 0, 0, 0o1777),
        Entry("./root/", DIRECTORY, "", 0, 0, 0o700),
        Entry("./bin/", DIRECTORY, "", 0, 0, 0o755),
        Entry("./bin/sh", FILE, "shell", 0, 0, 0o755),
        Entry("./bin/hard", LINK, "./bin/sh", 0, 0, 0o755),
        Entry("./bin/su", FILE, "su", 0, 0, 0o4755),
        Entry("./etc/secret", FILE, "s", 7, 70_000, 0o2040),
        Entry("./etc/none", FILE, "n", 0, 0, 0),
        Entry("./etc/own", FILE, "conf", 0, 0, 0o644),
        Entry("./etc/link", SYMLINK, "/bin/sh", 0, 0, 0o777),
        Entry("./etc/we ird\\x2d\"q'\u{e9}", FILE, "w", 3, 4, 0o600),
        Entry("./etc/shared", FILE, "old", 0, 0, 0o644),
    ];
    let control = [
        Entry("./conffiles", FILE, "/etc/own\nremove-on-upgrade /etc/gone\n", 0, 0, 0o644),
        Entry("./preinst", FILE, "#!/bin/sh\n", 0, 0, 0o755),
        Entry("./triggers", FILE, "interest-noawait /etc\ninterest now\n", 0, 0, 0o644),
    ];
    world.package("first", "Essential: yes\n", &control, &base);
    let second = [
        Entry("./", DIRECTORY, "", 0, 0, 0o700),
        Entry("./etc/", DIRECTORY, "", 0, 0, 0o700),
        Entry("./etc/shared", FILE, "newer", 5, 6, 0o640),
    ];
    world.package("second", "Multi-Arch: same\nReplaces: first (<< 2)\n", &[], &second);
    let disk = world.compose().unwrap();

    for (path, expected) in [
        ("/", tuple("0755", "0", "0")),
        ("/tmp", tuple("01777", "0", "0")),
        ("/root", tuple("0700", "0", "0")),
        ("/usr/bin/sh", tuple("0755", "0", "0")),
        ("/usr/bin/su", tuple("04755", "0", "0")),
        ("/etc/secret", tuple("02040", "7", "70000")),
        ("/etc/none", tuple("0000", "0", "0")),
        ("/etc/link", tuple("0777", "0", "0")),
        ("/etc/we ird\\x2d\"q'\u{e9}", tuple("0600", "3", "4")),
        ("/etc/shared", tuple("0640", "5", "6")),
        ("/etc/fstab", tuple("0644", "0", "0")),
        ("/var/lib/dpkg/info/first.preinst", tuple("0755", "0", "0")),
    ] {
        assert_eq!(stat(&disk, path), expected, "{path}");
    }
    assert!(debugfs(&disk, "stat /usr/bin/sh").contains("Links: 2"));
    assert!(debugfs(&disk, "stat /bin").contains("\"usr/bin\""));
    assert!(debugfs(&disk, "stat /etc/own").contains("0x5f5e1000"), "time");
    let cat = |path: &str| debugfs(&disk, &format!("cat {path}"));
    assert_eq!(cat("/etc/shared"), "newer");
    assert_eq!(cat("/etc/hosts").lines().nth(1), Some("127.0.1.1 a.b a"));
    assert_eq!(cat("/etc/apt/sources.list"), "deb http://m.test/d s main\n");
    assert_eq!(cat("/etc/fstab"), format!("UUID={} / ext4 errors=remount-ro 0 1\n", disk.root_uuid));
    assert_eq!(
        cat("/var/lib/dpkg/status"),
        "Package: first\nStatus: install ok unpacked\nVersion: 1\nArchitecture: amd64\nEssential: yes\nConffiles:\n /etc/own 3a8e4c06e471595f6eb262bb9b5582d9\n\nPackage: second\nStatus: install ok unpacked\nVersion: 1\nArchitecture: amd64\nMulti-Arch: same\nReplaces: first (<< 2)\n\n"
    );
    assert_eq!(cat("/var/lib/dpkg/info/second:amd64.list"), "/.\n/etc\n/etc/shared\n");
    assert!(!cat("/var/lib/dpkg/info/first.list").contains("/etc/shared"));
    assert_eq!(cat("/var/lib/dpkg/triggers/File"), "/etc first/noawait\n");
    assert_eq!(cat("/var/lib/dpkg/triggers/now"), "first\n");
    assert_eq!(
        cat("/var/lib/apt/extended_states"),
        "Package: second\nArchitecture: amd64\nAuto-Installed: 1\n\n"
    );
    assert_eq!(disk.preinst.len(), 1);
    assert_eq!(disk.preinst[0].script, "/var/lib/dpkg/info/first.preinst");
    let stats = debugfs(&disk, "stats");
    let blocks = stats.lines().find_map(|line| line.strip_prefix("Block count:")).unwrap();
    assert_eq!(blocks.trim().parse::<u64>().unwrap() * 4096, disk.partition.length);
    let record = std::fs::read(&disk.image).unwrap();
    assert_eq!(record[..512], disk.partition.boot_record());
}

#[test]
fn entries_that_escape_are_refused() {
    let root = || Entry("./etc/", DIRECTORY, "", 0, 0, 0o755);
    for (entries, reason) in [
        (vec![Entry("../evil", FILE, "x", 0, 0, 0o644)], "\"..\""),
        (vec![Entry("/etc/evil", FILE, "x", 0, 0, 0o644)], "absolute"),
        (
            vec![
                root(),
                Entry("./etc/link", SYMLINK, "/tmp", 0, 0, 0o777),
                Entry("./etc/link/evil", FILE, "x", 0, 0, 0o644),
            ],
            "leads through etc/link",
        ),
        (vec![root(), Entry("./etc/x", LINK, "../../etc/passwd", 0, 0, 0o644)], "\"..\""),
        (vec![root(), Entry("./etc/x", LINK, "./etc/absent", 0, 0, 0o644)], "is a hard link to etc/absent"),
        (vec![root(), Entry("./etc/x", tar::EntryType::Char, "", 0, 0, 0o644)], "is a device"),
    ] {
        let mut world = World::new();
        world.package("evil", "", &[], &entries);
        let error = world.refused();
        assert!(error.starts_with("cannot unpack package evil") && error.contains(reason), "{error}");
    }
}

#[test]
fn packages_that_share_a_file_without_saying_so_are_refused() {
    let mut world = World::new();
    let entries = || [Entry("./etc/", DIRECTORY, "", 0, 0, 0o755), Entry("./etc/x", FILE, "x", 0, 0, 0o644)];
    world.package("one", "", &[], &entries());
    world.package("two", "", &[], &entries());
    let error = world.refused();
    assert!(error.contains("etc/x also comes from"), "{error}");
}

#[test]
fn a_package_that_lies_about_itself_is_refused() {
    let mut world = World::new();
    world.package("honest", "", &[], &[]);
    world.index = world.index.replace("Version: 1", "Version: 2");
    let error = world.refused();
    assert!(error.contains("is not the one its index names"), "{error}");
}

#[test]
fn a_disk_too_small_is_told_before_anything_is_written() {
    let mut world = World::new();
    world.package("big", "Installed-Size: 1000000\n", &[], &[]);
    let error = world.refused();
    assert!(error.contains("raise image.size"), "{error}");
    assert_eq!(std::fs::read_dir(world.directory.path().join("scratch")).unwrap().count(), 0);
}

/// The root file system of a finished image, as its guest archives it.
fn archive() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut append =
        |path: &str, kind: tar::EntryType, target: &str, (uid, mode): (u64, u32), contents: &str| {
            if path == "./usr/bin/ping" {
                // As GNU tar writes it.
                let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
                let field = [("SCHILY.xattr.security.capability", &capability[..])];
                builder.append_pax_extensions(field).unwrap();
            }
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(kind);
            header.set_uid(uid);
            header.set_gid(uid);
            header.set_mode(mode);
            header.set_mtime(1_600_000_000);
            header.set_size(contents.len() as u64);
            match kind {
                tar::EntryType::Symlink | tar::EntryType::Link => {
                    builder.append_link(&mut header, path, target).unwrap();
                }
                _ => builder.append_data(&mut header, path, contents.as_bytes()).unwrap(),
            }
        };
    use tar::EntryType as Type;
    append("./", Type::Directory, "", (0, 0o755), "");
    append("./bin", Type::Symlink, "usr/bin", (0, 0o777), "");
    append("./lost+found/", Type::Directory, "", (0, 0o700), "");
    append("./usr/", Type::Directory, "", (0, 0o755), "");
    append("./usr/bin/", Type::Directory, "", (0, 0o755), "");
    append("./usr/bin/ping", Type::Regular, "", (0, 0o755), "ping");
    append("./usr/bin/su", Type::Regular, "", (0, 0o4755), "su");
    append("./usr/bin/sudo", Type::Link, "./usr/bin/su", (0, 0o4755), "");
    append("./usr/one's \"own\"", Type::Regular, "", (1000, 0o600), &"x".repeat(100_000));
    builder.into_inner().unwrap()
}

#[test]
fn a_disk_that_is_written_anew_depends_on_nothing_but_its_files_and_their_time() {
    let mut world = World::new();
    world.package("first", "Essential: yes\n", &[], &[Entry("./", DIRECTORY, "", 0, 0, 0o755)]);
    let composed = world.compose().unwrap();
    let root = world.directory.path().join("root.tar");
    std::fs::write(&root, archive()).unwrap();
    let before = std::fs::read(&composed.image).unwrap();
    let again = |name: &str| {
        let scratch = world.directory.path().join(name);
        std::fs::create_dir(&scratch).unwrap();
        let image = scratch.join("disk.raw");
        std::fs::write(&image, &before).unwrap();
        let disk = ComposedDisk { image, ..composed.clone() };
        disk::rewrite(&disk, &root, 1_700_000_000, &scratch, &Stop::default()).unwrap();
        disk
    };
    let first = again("one");
    // The clocks of file systems and of e2fsprogs go on by then.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let second = again("two");
    let (bytes, others) = (std::fs::read(&first.image).unwrap(), std::fs::read(&second.image).unwrap());
    let differ: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != others[*at]).collect();
    assert!(
        differ.is_empty(),
        "{} bytes of {} differ, the first at {}",
        differ.len(),
        bytes.len(),
        differ[0]
    );

    let start = usize::try_from(first.partition.offset).unwrap();
    assert_eq!(bytes[..start], before[..start], "the boot loader");
    assert_eq!(stat(&first, "/usr/bin/su"), tuple("04755", "0", "0"));
    assert_eq!(stat(&first, "/usr/one's \"own\""), tuple("0600", "1000", "1000"));
    assert!(debugfs(&first, "stat /bin").contains("usr/bin"));
    assert!(debugfs(&first, "stat /usr/bin/sudo").contains("Links: 2"));
    assert!(debugfs(&first, "ea_list /usr/bin/ping").contains("security.capability (20)"));
    let told = debugfs(&first, "show_super_stats -h");
    assert!(told.contains(&first.root_uuid), "{told}");
}

#[test]
fn an_archive_that_leads_out_of_the_tree_is_refused() {
    let mut world = World::new();
    world.package("first", "Essential: yes\n", &[], &[Entry("./", DIRECTORY, "", 0, 0, 0o755)]);
    let composed = world.compose().unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "out", "/tmp").unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    builder.append_data(&mut header, "out/hostler-was-here", &b"x"[..]).unwrap();
    let root = world.directory.path().join("root.tar");
    std::fs::write(&root, builder.into_inner().unwrap()).unwrap();
    let scratch = world.directory.path().join("one");
    std::fs::create_dir(&scratch).unwrap();
    let error = disk::rewrite(&composed, &root, 0, &scratch, &Stop::default()).unwrap_err();
    assert!(error.to_string().contains("SOURCE_DATE_EPOCH"), "{error}");
    assert!(!Path::new("/tmp/hostler-was-here").exists());
}
