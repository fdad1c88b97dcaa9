//! The builder guest looks into an image that was made elsewhere: with file systems of their own for what its
//! packages' list is in, named in each way that fstab(5) has.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hostler_runner::build::finish::{GuestPrograms, Task, Tell, Work, initramfs};
use hostler_runner::cancel::Cancel;
use hostler_runner::child::find_program;
use hostler_runner::event::{Silent, Stage};
use hostler_runner::media::seed;
use hostler_runner::vm::NO_TIMER_CHECK;
use hostler_runner::vm::argv::{Accelerator, Boot, CONTROL_PORT, Disk, DiskFormat, Network, VmSpec};
use hostler_runner::vm::outcome::Outcome;
use hostler_runner::vm::run::{Downloads, PowerOff, Report, Run, run};

use super::{limits, programs, tools};

/// Each partition's size in bytes; they lie one behind the other, the first at this offset.
const SIZE: u64 = 48 << 20;
const SECTOR: u64 = 512;
const STATUS: &str = "Package: a\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n";
const DISK_ID: [u8; 4] = [0x78, 0x56, 0x34, 0x12];

/// Puts a program of the host's into the system, with the libraries that it needs.
fn install(root: &Path, program: &str) {
    let listed = Command::new("ldd").arg(program).output().unwrap();
    let libraries = String::from_utf8(listed.stdout).unwrap();
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    for file in libraries.chain([program]) {
        let copy = root.join(&file[1..]);
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(file, copy).unwrap();
    }
}

/// The root file system of a small system; what is in `/usr` and `/var` lies in folders beside it.
fn system(folder: &Path, fstab: &str) {
    let root = folder.join("root");
    for name in ["bin", "etc", "usr", "var", "home", "dev", "proc", "sys", "run", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(&tools().busybox, root.join("bin/busybox")).unwrap();
    fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    for applet in ["cat", "mkdir", "find", "cp", "sort", "tail"] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    for program in ["/bin/dash", "/bin/tar"] {
        install(&root, program);
    }
    symlink("dash", root.join("bin/sh")).unwrap();
    fs::write(root.join("etc/os-release"), "ID=test\n").unwrap();
    fs::write(root.join("etc/fstab"), fstab).unwrap();
    // Only where /usr is mounted is there a way to run anything.
    let usr = folder.join("usr/bin");
    fs::create_dir_all(&usr).unwrap();
    symlink("/bin/busybox", usr.join("env")).unwrap();
    for name in ["var/lib/dpkg", "home"] {
        fs::create_dir_all(folder.join(name)).unwrap();
    }
    fs::write(folder.join("var/lib/dpkg/status"), STATUS).unwrap();
    fs::write(folder.join("home/file"), "x").unwrap();
}

/// What tells where the partitions are.
#[derive(Clone, Copy, PartialEq)]
enum Table {
    Mbr,
    Gpt,
}

/// A disk with a partition for each of these folders: ext4 made with these options, or a FAT volume.
fn disk(folder: &Path, table: Table, partitions: &[(&str, &[&str])]) -> PathBuf {
    let image = folder.join("disk.raw");
    let count = u64::try_from(partitions.len()).unwrap();
    let file = File::create(&image).unwrap();
    file.set_len((2 << 20) + count * SIZE).unwrap();
    let mut record = [0_u8; 512];
    record[440..444].copy_from_slice(&DISK_ID);
    record[510..].copy_from_slice(b"\x55\xaa");
    let mut entries = [0_u8; 128 * 128];
    for (number, (name, options)) in (0..).zip(partitions) {
        let offset = (1 << 20) + number * SIZE;
        let place = usize::try_from(number).unwrap();
        let entry = &mut record[446 + 16 * (place % 4)..];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&u32::try_from(offset / SECTOR).unwrap().to_le_bytes());
        entry[12..16].copy_from_slice(&u32::try_from(SIZE / SECTOR).unwrap().to_le_bytes());
        let entry = &mut entries[128 * place..];
        entry[..16].fill(7);
        entry[16..32].copy_from_slice(&partition_id(u8::try_from(number + 1).unwrap()));
        entry[32..40].copy_from_slice(&(offset / SECTOR).to_le_bytes());
        entry[40..48].copy_from_slice(&((offset + SIZE) / SECTOR - 1).to_le_bytes());
        if *options == ["vfat"] {
            file.write_all_at(&seed::volume(&[("a long name.efi", b"x")]).unwrap(), offset).unwrap();
            continue;
        }
        let made = Command::new(find_program("mke2fs").unwrap())
            .args(["-q", "-F", "-t", "ext4", "-d"])
            .arg(folder.join(name))
            .args(*options)
            .arg("-E")
            .arg(format!("offset={offset},root_owner=0:0"))
            .arg(&image)
            .arg(format!("{}k", SIZE / 1024))
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
    }
    if table == Table::Gpt {
        record[446..510].fill(0);
        record[450] = 0xee;
        record[454] = 1;
        record[458..462].fill(0xff);
        file.write_all_at(&header(&entries, file.metadata().unwrap().len() / SECTOR - 1), SECTOR).unwrap();
        file.write_all_at(&entries, 2 * SECTOR).unwrap();
    }
    file.write_all_at(&record, 0).unwrap();
    image
}

fn partition_id(number: u8) -> [u8; 16] {
    [number, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
}

/// The header of a GPT whose entries follow it.
fn header(entries: &[u8], last: u64) -> [u8; 92] {
    let checksum = |bytes: &[u8]| {
        !bytes.iter().fold(u32::MAX, |sum, byte| {
            (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0xedb8_8320 * (sum & 1)))
        })
    };
    let mut header = [0_u8; 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[10] = 1;
    header[12] = 92;
    for (place, sector) in [(24, 1), (32, last), (40, 34), (48, last - 33), (72, 2)] {
        header[place..place + 8].copy_from_slice(&u64::to_le_bytes(sector));
    }
    for (place, number) in [(80, 128), (84, 128), (88, checksum(entries))] {
        header[place..place + 4].copy_from_slice(&u32::to_le_bytes(number));
    }
    let sum = checksum(&header);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    header
}

/// What the guest tells, and the archives that it wrote: of the packages, and of the root file system.
fn inspect(folder: &Path, image: &Path) -> (Report, PathBuf, PathBuf) {
    let results = ["results", "archive"].map(|name| {
        let path = folder.join(name);
        File::create(&path).unwrap().set_len(64 << 20).unwrap();
        path
    });
    let tell = Tell { results: "/dev/vdb", root: Some("/dev/vdc"), kernel: false };
    let work = Work {
        nonce: "5fe7",
        root_partition: 0,
        root_uuid: "",
        sources: None,
        time: None,
        task: Task::Inspect { tell, verify: false },
    };
    let path = folder.join("inspect.cpio");
    let guest = GuestPrograms { busybox: &tools().busybox, modules: &tools().modules };
    initramfs(guest, &work).unwrap().write(File::create(&path).unwrap()).unwrap();
    let disks = [image, &results[0], &results[1]];
    let spec = VmSpec {
        accelerator: Accelerator::Tcg,
        processors: 1,
        memory_mib: 256,
        boot: Boot::Kernel {
            kernel: tools().kernel.clone(),
            initramfs: path,
            command_line: format!("console=ttyS0 panic=-1 mitigations=off loglevel=4 {NO_TIMER_CHECK}"),
        },
        disks: disks.map(|path| Disk::new(path.to_owned(), DiskFormat::Raw)).to_vec(),
        network: Network::None,
        port_name: CONTROL_PORT,
        log_port: None,
        smbios_serial: None,
    };
    let mut asked = Run {
        programs: &programs(),
        spec: &spec,
        nonce: "5fe7",
        limits: limits(Duration::from_secs(60)),
        register: &|_| Ok(()),
        serve: &|_| Ok(()),
        downloads: &Downloads::default,
        viewers: None,
        holds: false,
        installer_log: None,
        power_off: PowerOff { within: Duration::from_secs(15), is_needed: false },
        picture: None,
        cancel: &Cancel::new().unwrap(),
        sink: &Silent,
        stage: Stage::Inspect,
    };
    let report = run(&mut asked, File::create(folder.join("console.log")).unwrap()).unwrap();
    let [results, archive] = results;
    (report, results, archive)
}

fn names(archive: &Path) -> Vec<String> {
    let mut archive = tar::Archive::new(File::open(archive).unwrap());
    let entries = archive.entries().unwrap();
    entries.map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
}

/// The packages' list that was told.
fn told_status(results: &Path) -> String {
    let mut told = tar::Archive::new(File::open(results).unwrap());
    let mut entries = told.entries().unwrap().map(Result::unwrap);
    let mut entry = entries.find(|entry| entry.path().unwrap() == Path::new("dpkg-status")).unwrap();
    let mut status = String::new();
    entry.read_to_string(&mut status).unwrap();
    status
}

/// Without a partition for it, `/usr` is what the root file system has.
fn usr_in_root(folder: &Path, programs: &[&str]) {
    let folder = folder.join("root/usr/bin");
    fs::create_dir_all(&folder).unwrap();
    for program in programs {
        symlink("/bin/busybox", folder.join(program)).unwrap();
    }
}

#[test]
fn all_of_a_system_is_told_wherever_it_lies() {
    let folder = tempfile::tempdir().unwrap();
    let uuid = "0f0e0d0c-0b0a-4908-8706-050403020100";
    let fstab = [
        "# what is where",
        "/dev/sda1 / ext4 defaults 0 1",
        "LABEL=var#1 /var xfs,ext4 defaults 0 2",
        &format!("UUID={uuid} /usr/ ext4 ro 0 2"),
        "PARTUUID=12345678-04 /home auto noauto,x-systemd.automount 0 2",
        "tmpfs /tmp tmpfs defaults 0 0",
        "/dev/sr0 /media/cdrom udf,iso9660 user,noauto 0 0",
        "UUID=absent none swap sw 0 0",
        "LABEL=absent /data ext4 nofail 0 2",
        "server:/srv /srv nfs defaults 0 0",
        "/home /mnt ext4 rw,bind 0 0",
        "",
    ];
    system(folder.path(), "");
    let etc = folder.path().join("root/etc");
    fs::remove_file(etc.join("fstab")).unwrap();
    fs::write(etc.join("fstab.here"), fstab.join("\n")).unwrap();
    symlink("/etc/fstab.here", etc.join("fstab")).unwrap();
    fs::create_dir_all(etc.join("systemd/system")).unwrap();
    symlink("/dev/null", etc.join("systemd/system/var-lib.mount")).unwrap();
    let partitions: [(&str, &[&str]); 4] =
        [("root", &[]), ("usr", &["-U", uuid]), ("var", &["-L", "var#1"]), ("home", &[])];
    let image = disk(folder.path(), Table::Mbr, &partitions);
    let (report, results, archive) = inspect(folder.path(), &image);
    assert_eq!(report.outcome, Outcome::Proven, "{}", report.screen);
    assert_eq!(told_status(&results), STATUS);
    let names = names(&archive);
    for name in ["./bin/sh", "./usr/bin/env", "./var/lib/dpkg/status", "./home/file"] {
        assert!(names.iter().any(|one| one == name), "{name} is not in {names:?}");
    }
    let is_below = |name: &String| {
        ["./proc/", "./run/", "./dev/", "./sys/"].iter().any(|of| name.starts_with(of) && name != of)
    };
    assert!(!names.iter().any(is_below), "{names:?}");
}

#[test]
fn file_systems_below_each_other_are_found_by_a_gpt() {
    let folder = tempfile::tempdir().unwrap();
    let fstab = [
        // Lines in another order than they are to be mounted in.
        "PARTUUID=03020103-0504-0706-0809-0a0b0c0d0e0f /var/lib ext4 defaults 0 2",
        "PARTUUID=03020102-0504-0706-0809-0A0B0C0D0E0F /var ext4 defaults 0 2",
        "/dev/disk/by-partuuid/03020104-0504-0706-0809-0a0b0c0d0e0f /boot/efi vfat umask=0077 0 1",
        "/dev/sda5 /srv/my\\040data ext4 defaults 0 2",
        "",
    ];
    system(folder.path(), &fstab.join("\n"));
    usr_in_root(folder.path(), &["env"]);
    for name in ["root/boot/efi", "root/srv/my data", "outer/lib/hidden"] {
        fs::create_dir_all(folder.path().join(name)).unwrap();
    }
    let partitions: [(&str, &[&str]); 5] =
        [("root", &[]), ("outer", &[]), ("var/lib", &[]), ("efi", &["vfat"]), ("home", &[])];
    let image = disk(folder.path(), Table::Gpt, &partitions);
    let (report, results, archive) = inspect(folder.path(), &image);
    assert_eq!(report.outcome, Outcome::Proven, "{}", report.screen);
    assert_eq!(told_status(&results), STATUS);
    let names = names(&archive);
    for name in ["./var/lib/dpkg/status", "./boot/efi/a long name.efi", "./srv/my data/file"] {
        assert!(names.iter().any(|one| one == name), "{name} is not in {names:?}");
    }
    assert!(!names.iter().any(|name| name.contains("hidden")), "{names:?}");
}

#[test]
fn a_list_that_would_lack_packages_is_a_failure_that_names_the_file_system() {
    let folder = tempfile::tempdir().unwrap();
    let fstab = "/dev/sda2 /usr ext4 defaults 0 1\nserver:/var /var nfs defaults 0 2\n";
    system(folder.path(), fstab);
    // What lies below the mount point is another list.
    fs::create_dir_all(folder.path().join("root/var/lib/dpkg")).unwrap();
    let mut file = File::create(folder.path().join("root/var/lib/dpkg/status")).unwrap();
    file.write_all(b"Package: old\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n").unwrap();
    let image = disk(folder.path(), Table::Mbr, &[("root", &[]), ("usr", &[])]);
    let (report, _, _) = inspect(folder.path(), &image);
    let told = super::failure(&report).to_string();
    assert!(told.contains("step mount-file-systems"), "{told}");
    assert!(report.screen.contains("server:/var for /var"), "{}", report.screen);
}

#[test]
fn a_mount_point_that_leads_out_of_the_image_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    system(folder.path(), "/dev/sda2 /var ext4 defaults 0 1\n");
    usr_in_root(folder.path(), &["env"]);
    fs::remove_dir(folder.path().join("root/var")).unwrap();
    symlink("/proc/1/root/bin", folder.path().join("root/var")).unwrap();
    let image = disk(folder.path(), Table::Mbr, &[("root", &[]), ("var", &[])]);
    let (report, _, _) = inspect(folder.path(), &image);
    let told = super::failure(&report).to_string();
    assert!(told.contains("step mount-file-systems"), "{told}");
    assert!(report.screen.contains("the mount point /var, which is no folder"), "{}", report.screen);
}

#[test]
fn a_system_that_has_the_tools_and_no_database_has_no_packages() {
    let folder = tempfile::tempdir().unwrap();
    system(folder.path(), "");
    usr_in_root(folder.path(), &["env", "dpkg", "rpm"]);
    let image = disk(folder.path(), Table::Mbr, &[("root", &[])]);
    let (report, results, _) = inspect(folder.path(), &image);
    assert_eq!(report.outcome, Outcome::Proven, "{}", report.screen);
    assert_eq!(told_status(&results), "");
}
