//! What is done to image files on the host: conversion, overlay, digest.
//!
//! `qemu-img` reads a disk that a guest wrote, so it never guesses a format and has a deadline. Deliberately absent: any look into the file system of an image.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::child::{Finished, Tool, ToolError};
use crate::stop::{Stop, Stopped};

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
        .arguments(["-W", "-m", "4", "-t", "unsafe", "-T", "unsafe", "--"])
        .argument(named(source))
        .argument(named(target));
    run("convert", &tool, stop)
}

/// Makes `target` a qcow2 file that shows `base` and takes the writes in its stead. Both lie in the
/// same folder.
///
/// # Errors
/// When `qemu-img` fails, takes too long or is to stop.
pub fn overlay(qemu_img: &Path, base: &Path, target: &Path, stop: &Stop) -> Result<(), ImageError> {
    // The name of the base is looked up from the folder of the overlay.
    let base = Path::new(base.file_name().unwrap_or(base.as_os_str()));
    let tool = Tool::at(qemu_img.to_owned())
        .arguments(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
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
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
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
            overlay(&slow, &disk, &target, &stop).unwrap_err(),
            digest(&disk, &stop).unwrap_err(),
        ] {
            assert_eq!(Stopped::cause_of(&error), Some(Stopped::Late), "{error}");
        }
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}
