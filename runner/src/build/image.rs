//! What is done to image files on the host: conversion, overlay, digest.
//!
//! `qemu-img` reads a disk that a guest wrote, so it never guesses a format and has a deadline. Deliberately absent: any look into the file system of an image.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::child::{Finished, Tool, ToolError};
use crate::stop::{Stop, Stopped};
use crate::vm::argv::DiskFormat;

/// How long `qemu-img` may take; it writes a few gigabytes.
const CONVERT_DEADLINE: Duration = Duration::from_secs(20 * 60);

/// Why an image file is not what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// `qemu-img` failed.
    #[error("could not {action} the image")]
    Tool {
        /// What was to be done.
        action: &'static str,
        /// Why.
        #[source]
        source: ToolError,
    },
    /// A file could not be read or written.
    #[error("could not {action} {path}")]
    File {
        /// What was to be done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody wants it any more.
    #[error("the image's digest was not finished")]
    Stopped(#[source] Stopped),
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::File { action, path, source }
}

/// How densely a qcow2 file is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// To be kept or sent.
    Compressed,
    /// To be used soon: written in a moment.
    Plain,
}

/// Converts the raw disk `source` to a qcow2 file.
///
/// # Errors
/// When `qemu-img` fails, takes too long or is to stop; `target` may be there then.
pub fn convert(
    qemu_img: &Path,
    source: &Path,
    target: &Path,
    packing: Packing,
    stop: &Stop,
) -> Result<(), ImageError> {
    let mut tool = Tool::at(qemu_img.to_owned()).arguments(["convert", "-q", "-f", "raw", "-O", "qcow2"]);
    if packing == Packing::Compressed {
        tool = tool.arguments(["-c", "-o", "compression_type=zstd"]);
    }
    let tool = tool
        .arguments(["-m", "4", "-t", "unsafe", "-T", "unsafe", "--"])
        .argument(named(source))
        .argument(named(target));
    run("convert", &tool, stop)
}

/// Converts the raw disk `source` to another program's format, in its variant.
///
/// # Errors
/// As above.
pub fn convert_to(
    qemu_img: &Path,
    source: &Path,
    target: &Path,
    (format, variant): (&OsStr, &str),
    stop: &Stop,
) -> Result<(), ImageError> {
    let tool = Tool::at(qemu_img.to_owned())
        .arguments(["convert", "-q", "-f", "raw", "-O"])
        .argument(format)
        .argument("-o")
        .argument(format!("subformat={variant}"))
        .arguments(["-t", "unsafe", "-T", "unsafe", "--"])
        .argument(named(source))
        .argument(named(target));
    run("convert", &tool, stop)
}

/// Makes the raw disk `target` of a disk in another layout.
///
/// # Errors
/// As above.
pub fn to_raw(
    qemu_img: &Path,
    source: &Path,
    format: DiskFormat,
    target: &Path,
    stop: &Stop,
) -> Result<(), ImageError> {
    let tool = Tool::at(qemu_img.to_owned())
        .arguments(["convert", "-q", "-f", format.name(), "-O", "raw", "-t", "unsafe", "-T", "unsafe", "--"])
        .argument(named(source))
        .argument(named(target));
    run("unpack", &tool, stop)
}

/// Makes `target` a qcow2 file of its own that shows what the overlay `source` shows.
///
/// # Errors
/// As above.
pub fn to_whole(qemu_img: &Path, source: &Path, target: &Path, stop: &Stop) -> Result<(), ImageError> {
    let tool = Tool::at(qemu_img.to_owned())
        .arguments(["convert", "-q", "-f", "qcow2", "-O", "qcow2", "-t", "unsafe", "-T", "unsafe", "--"])
        .argument(named(source))
        .argument(named(target));
    run("make whole", &tool, stop)
}

/// How much is copied before `go_on` is asked again, in bytes.
const PIECE: u64 = 16 << 20;

/// Copies what `from` has, and its holes as holes. `go_on` is asked before each piece.
///
/// # Errors
/// When reading or writing fails, or `go_on` does.
pub fn copy_with_holes(mut from: &File, mut to: &File, go_on: impl Fn() -> io::Result<()>) -> io::Result<()> {
    let size = from.metadata()?.len();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(from, rustix::fs::SeekFrom::Hole(start))?.min(size);
        let end = end.min(start + PIECE);
        go_on()?;
        from.seek(io::SeekFrom::Start(start))?;
        to.seek(io::SeekFrom::Start(start))?;
        io::copy(&mut from.take(end - start), &mut to)?;
        at = end.max(at + 1);
    }
    to.set_len(size)
}

/// Makes `target` a qcow2 file that shows `base` and takes the writes in its stead. The base lies in the same
/// folder, or below it.
///
/// # Errors
/// When `qemu-img` fails, takes too long or is to stop.
pub fn overlay(
    qemu_img: &Path,
    base: &Path,
    format: DiskFormat,
    target: &Path,
    stop: &Stop,
) -> Result<(), ImageError> {
    // The name of the base is looked up from the folder of the overlay.
    let folder = target.parent().unwrap_or(Path::new(""));
    let base = base.strip_prefix(folder).unwrap_or(base);
    let tool = Tool::at(qemu_img.to_owned())
        .arguments(["create", "-q", "-f", "qcow2", "-F", format.name(), "-b"])
        .argument(named(base))
        .argument("--")
        .argument(named(target));
    run("make a scratch copy of", &tool, stop)
}

fn run(action: &'static str, tool: &Tool, stop: &Stop) -> Result<(), ImageError> {
    let ended = tool.run(CONVERT_DEADLINE, stop).and_then(Finished::success);
    ended.map(drop).map_err(|source| ImageError::Tool { action, source })
}

/// A path that qemu does not take for a protocol (`nbd:…`).
fn named(path: &Path) -> PathBuf {
    if path.is_absolute() { path.to_owned() } else { Path::new(".").join(path) }
}

/// The SHA-256 digest of bytes in hexadecimal.
#[must_use]
pub fn digest_of_bytes(bytes: &[u8]) -> String {
    hexadecimal(Sha256::digest(bytes).as_slice())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file's SHA-256 digest in hexadecimal.
///
/// # Errors
/// When it cannot be read, or the build is to stop.
pub fn digest(file: &Path, stop: &Stop) -> Result<String, ImageError> {
    let mut input = File::open(file).map_err(file_error("open", file))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1024 * 1024];
    loop {
        stop.check().map_err(ImageError::Stopped)?;
        match input.read(&mut buffer).map_err(file_error("read", file))? {
            0 => break,
            length => hasher.update(&buffer[..length]),
        }
    }
    Ok(hexadecimal(hasher.finalize().as_slice()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_digest_is_that_of_the_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image.qcow2");
        fs::write(&image, "abc").unwrap();
        assert_eq!(
            digest(&image, &Stop::default()).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn holes_stay_holes() {
        use std::os::unix::fs::{FileExt as _, MetadataExt as _};
        let folder = tempfile::tempdir().unwrap();
        let from = File::create_new(folder.path().join("from")).unwrap();
        from.set_len(100 << 20).unwrap();
        from.write_all_at(b"data", 50 << 20).unwrap();
        let to =
            File::options().read(true).write(true).create_new(true).open(folder.path().join("to")).unwrap();
        let from = File::open(folder.path().join("from")).unwrap();
        copy_with_holes(&from, &to, || Ok(())).unwrap();
        let data = to.metadata().unwrap();
        assert_eq!(data.len(), 100 << 20);
        assert!(data.blocks() * 512 < 1 << 20, "{} blocks", data.blocks());
        let mut read = [0; 4];
        to.read_exact_at(&mut read, 50 << 20).unwrap();
        assert_eq!(&read, b"data");
    }

    #[test]
    fn neither_tool_nor_digest_outlasts_the_builds_time() {
        use std::os::unix::fs::PermissionsExt as _;
        use std::time::Instant;
        let folder = tempfile::tempdir().unwrap();
        let slow = folder.path().join("qemu-img");
        fs::write(&slow, "#!/bin/sh\nexec sleep 60\n").unwrap();
        fs::set_permissions(&slow, fs::Permissions::from_mode(0o755)).unwrap();
        let disk = folder.path().join("disk.raw");
        fs::write(&disk, "").unwrap();
        let started = Instant::now();
        let stop = Stop::default().within(Duration::from_millis(300));
        let target = folder.path().join("image.qcow2");
        for error in [
            convert(&slow, &disk, &target, Packing::Compressed, &stop).unwrap_err(),
            overlay(&slow, &disk, DiskFormat::Qcow2, &target, &stop).unwrap_err(),
            digest(&disk, &stop).unwrap_err(),
        ] {
            assert_eq!(Stopped::cause_of(&error), Some(Stopped::Late), "{error}");
        }
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}
