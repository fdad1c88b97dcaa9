//! What an image's disk is made into.
//!
//! `qemu-img` converts a disk that a guest wrote, `sqfstar` an archive that one wrote: both run as the user
//! that builds, with a deadline, and never guess a format.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::child::{Finished, HostTool, Tool};
use crate::contents::appliance::{self, Appliance};
use crate::recipe::{Format, Output};
use crate::stop::Stop;

use super::image::{self, ImageError, Packing};

const SQFSTAR: HostTool = HostTool { name: "sqfstar", package: "squashfs-tools" };

/// The host's programs that these outputs need beside `qemu-img`, with their packages.
#[must_use]
pub fn tools(output: &Output) -> &'static [(&'static str, &'static str)] {
    if output.has(Format::Squashfs) { &[(SQFSTAR.name, SQFSTAR.package)] } else { &[] }
}

/// How long it may take; it compresses a few gigabytes.
const SQUASH_DEADLINE: Duration = Duration::from_secs(30 * 60);

const GIBIBYTE: u64 = 1 << 30;

/// What there is to make files of.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// The raw disk.
    pub disk: &'a Path,
    /// The root file system as an archive.
    pub root: Option<&'a Path>,
    /// Kernel and initramfs.
    pub kernel: Option<(&'a Path, &'a Path)>,
    /// `ID` of os-release(5).
    pub distribution: &'a str,
    /// The machine that the image was made for: memory in MiB, and processors.
    pub machine: (u64, u32),
    /// Seconds since 1970 for what has a time in it.
    pub time: u64,
}

/// Makes the files of one format, called `name` and a suffix, in `folder`.
///
/// # Errors
/// See [`ImageError`].
pub fn make(
    format: Format,
    sources: Sources<'_>,
    (folder, name): (&Path, &str),
    qemu_img: &Path,
    stop: &Stop,
) -> Result<Vec<PathBuf>, ImageError> {
    let target = |suffix: &str| folder.join(format!("{name}.{suffix}"));
    match format {
        Format::Qcow2 => {
            let target = target("qcow2");
            image::convert(qemu_img, sources.disk, &target, Packing::Compressed, stop)?;
            Ok(vec![target])
        }
        Format::Vmdk => convert(qemu_img, sources.disk, &target("vmdk"), "monolithicSparse", stop),
        Format::Vhdx => convert(qemu_img, sources.disk, &target("vhdx"), "dynamic", stop),
        Format::Raw => {
            let target = target("raw");
            copy_sparse(sources.disk, &target, stop).map_err(failed("write", &target))?;
            Ok(vec![target])
        }
        Format::Ova => Ok(vec![ova(sources, (folder, name), qemu_img, stop)?]),
        Format::Tar => Ok(sources.root.map(Path::to_owned).into_iter().collect()),
        Format::Squashfs => {
            let target = target("squashfs");
            let root = sources.root.unwrap_or(Path::new(""));
            squash(root, &target, sources.time, stop)?;
            Ok(vec![target])
        }
        Format::Kernel => {
            Ok(sources.kernel.map(|(kernel, initrd)| vec![kernel.into(), initrd.into()]).unwrap_or_default())
        }
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::File { action, path, source }
}

fn convert(
    qemu_img: &Path,
    disk: &Path,
    target: &Path,
    subformat: &str,
    stop: &Stop,
) -> Result<Vec<PathBuf>, ImageError> {
    let format = target.extension().unwrap_or_default();
    image::convert_to(qemu_img, disk, target, (format, subformat), stop)?;
    Ok(vec![target.to_owned()])
}

/// Copies a file, and its holes as holes. By a link where that can be: nobody writes to either any more.
fn copy_sparse(from: &Path, to: &Path, stop: &Stop) -> io::Result<()> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    let go_on = || stop.check().map_err(io::Error::other);
    image::copy_with_holes(&File::open(from)?, &File::create_new(to)?, go_on)
}

/// A virtual appliance.
fn ova(
    sources: Sources<'_>,
    (folder, name): (&Path, &str),
    qemu_img: &Path,
    stop: &Stop,
) -> Result<PathBuf, ImageError> {
    let disk_name = format!("{name}-disk1.vmdk");
    let disk = folder.join(&disk_name);
    // Importers take the capacity for whole GiB; a disk may be larger than what its partitions use.
    let size = fs::metadata(sources.disk).map_err(failed("look at", sources.disk))?.len();
    let capacity = size.div_ceil(GIBIBYTE);
    let resize = |size: u64| {
        let file = File::options().write(true).open(sources.disk);
        file.and_then(|file| file.set_len(size)).map_err(failed("resize", sources.disk))
    };
    resize(capacity * GIBIBYTE)?;
    let converted = convert(qemu_img, sources.disk, &disk, "streamOptimized", stop);
    resize(size)?;
    converted?;
    let data = fs::metadata(sources.disk).map_err(failed("look at", sources.disk))?;
    let description = appliance::describe(&Appliance {
        name,
        file: &disk_name,
        file_size: fs::metadata(&disk).map_err(failed("look at", &disk))?.len(),
        capacity,
        populated: std::os::unix::fs::MetadataExt::blocks(&data) * 512,
        memory: sources.machine.0,
        processors: sources.machine.1,
        distribution: sources.distribution,
    });
    let description_name = format!("{name}.ovf");
    let digests = appliance::digests(&[
        (&description_name, &image::digest_of_bytes(description.as_bytes())),
        (&disk_name, &image::digest(&disk, stop)?),
    ]);
    let target = folder.join(format!("{name}.ova"));
    // The description comes first, so that an importer need not read the disk to find it.
    let texts = [(description_name.as_str(), description.as_str()), (&format!("{name}.mf"), &digests)];
    pack(&texts, (&disk_name, &disk), &target, sources.time, stop).map_err(failed("write", &target))?;
    fs::remove_file(&disk).map_err(failed("remove", &disk))?;
    Ok(target)
}

/// Packs texts, and after them a disk, into the archive `target`.
fn pack(
    texts: &[(&str, &str)],
    (disk_name, disk): (&str, &Path),
    target: &Path,
    time: u64,
    stop: &Stop,
) -> io::Result<()> {
    let mut builder = tar::Builder::new(File::create_new(target)?);
    let header = |size: u64| {
        let mut header = tar::Header::new_ustar();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_mtime(time);
        header
    };
    for (member, text) in texts {
        builder.append_data(&mut header(text.len() as u64), member, text.as_bytes())?;
    }
    let file = File::open(disk)?;
    let size = file.metadata()?.len();
    builder.append_data(&mut header(size), disk_name, stop.reading(file))?;
    builder.finish()
}

fn squash(root: &Path, target: &Path, time: u64, stop: &Stop) -> Result<(), ImageError> {
    let run = |tool: Tool| {
        tool.arguments(["-quiet", "-no-progress", "-comp", "zstd", "-mem", "256M"])
            .argument(target)
            .variable("SOURCE_DATE_EPOCH", time.to_string())
            .input(root)
            .run(SQUASH_DEADLINE, stop)
            .and_then(Finished::success)
    };
    let ended = SQFSTAR.find().and_then(run);
    ended.map(drop).map_err(|source| ImageError::Tool { action: "squash the root file system of", source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::child::find_program;

    fn disk(folder: &Path) -> PathBuf {
        let path = folder.join("disk.raw");
        let file = File::create(&path).unwrap();
        file.set_len(3 << 30).unwrap();
        file.write_all_at(b"a disk", 1 << 30).unwrap();
        file.set_len((3 << 30) + (1 << 20)).unwrap();
        path
    }

    fn sources(disk: &Path) -> Sources<'_> {
        Sources {
            disk,
            root: None,
            kernel: None,
            distribution: "debian",
            machine: (1024, 2),
            time: 1_700_000_000,
        }
    }

    fn info(path: &Path) -> String {
        let tool = Tool::at(find_program("qemu-img").expect("qemu-utils is installed"));
        let ended = tool.arguments(["info", "--output=json"]).argument(path);
        let ended = ended.run(Duration::from_secs(60), &Stop::default()).unwrap().success().unwrap();
        String::from_utf8(ended.stdout).unwrap()
    }

    #[test]
    fn every_format_of_a_disk_is_what_it_says_and_as_large() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path());
        let qemu_img = find_program("qemu-img").expect("qemu-utils is installed");
        for (format, name, size) in [
            (Format::Qcow2, "qcow2", "3222274048"),
            (Format::Vmdk, "vmdk", "3222274048"),
            (Format::Vhdx, "vhdx", "3222274048"),
            (Format::Raw, "raw", "3222274048"),
        ] {
            let made =
                make(format, sources(&disk), (folder.path(), "x"), &qemu_img, &Stop::default()).unwrap();
            assert_eq!(made, [folder.path().join(format!("x.{name}"))]);
            let info = info(&made[0]);
            assert!(info.contains(&format!("\"virtual-size\": {size}")), "{info}");
            assert!(info.contains(&format!("\"format\": \"{name}\"")), "{info}");
            assert!(fs::metadata(&made[0]).unwrap().len() < 64 << 20 || format == Format::Raw, "{info}");
        }
    }

    #[test]
    fn neither_an_appliance_nor_a_copy_is_finished_once_someone_asks_to_stop() {
        use crate::cancel::Cancel;
        use crate::stop::Stopped;
        use std::sync::Arc;
        use std::time::Instant;
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.raw");
        // Its zeros take seconds.
        File::create(&disk).unwrap().set_len(6 << 30).unwrap();
        let cancel = Arc::new(Cancel::new().unwrap());
        let stop = Stop::new(Arc::clone(&cancel));
        let asked = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            cancel.cancel();
            Instant::now()
        });
        let target = folder.path().join("x.ova");
        let error = pack(&[("x.ovf", "x")], ("disk", &disk), &target, 0, &stop).unwrap_err();
        assert_eq!(Stopped::cause_of(&error), Some(Stopped::Asked), "{error}");
        assert!(asked.join().unwrap().elapsed() < Duration::from_secs(1));
        // No name here can lead there.
        let elsewhere = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&elsewhere, b"a disk").unwrap();
        let elsewhere = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&elsewhere));
        let error = copy_sparse(Path::new(&elsewhere), &folder.path().join("x"), &stop).unwrap_err();
        assert_eq!(Stopped::cause_of(&error), Some(Stopped::Asked), "{error}");
    }

    #[test]
    fn an_appliance_has_its_description_first_and_digests_that_hold() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path());
        let qemu_img = find_program("qemu-img").expect("qemu-utils is installed");
        let made =
            make(Format::Ova, sources(&disk), (folder.path(), "x"), &qemu_img, &Stop::default()).unwrap();
        assert_eq!(fs::metadata(&disk).unwrap().len(), (3 << 30) + (1 << 20), "the disk is as it was");
        let mut archive = tar::Archive::new(File::open(&made[0]).unwrap());
        archive.unpack(folder.path().join("unpacked")).unwrap();
        let mut archive = tar::Archive::new(File::open(&made[0]).unwrap());
        let names: Vec<String> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["x.ovf", "x.mf", "x-disk1.vmdk"]);
        let digests = fs::read_to_string(folder.path().join("unpacked/x.mf")).unwrap();
        for line in digests.lines() {
            let (name, digest) = line.strip_prefix("SHA256(").unwrap().split_once(")= ").unwrap();
            let path = folder.path().join("unpacked").join(name);
            assert_eq!(image::digest(&path, &Stop::default()).unwrap(), digest);
        }
        // 3 GiB and 1 MiB are 4 GiB to an importer.
        let info = info(&folder.path().join("unpacked/x-disk1.vmdk"));
        assert!(info.contains("\"virtual-size\": 4294967296") && info.contains("streamOptimized"), "{info}");
        let described = fs::read_to_string(folder.path().join("unpacked/x.ovf")).unwrap();
        assert!(described.contains("ovf:capacity=\"4\""), "{described}");
    }
}
