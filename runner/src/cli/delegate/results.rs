//! What a build leaves, in root's output directory.
//!
//! Root copies each file. The build user had the original open, and so may some process of a
//! subverted build that is not gone yet: it could change the original at any time, but never the
//! copy. The output directory is opened once, before the build, so that whoever may rename things
//! around it cannot send root somewhere else in the meantime; in there, no name is followed.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use hostler_runner::build::image::copy_with_holes;
use hostler_runner::stop::Stop;
use hostler_runner::vm::nonce::nonce;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, fchmod, fsync, linkat, mkdirat, openat, renameat, unlinkat};
use rustix::io::Errno;

/// The output directory.
pub(super) struct Results {
    directory: File,
    path: PathBuf,
    /// Where the build's lock goes, and under which name.
    lock: Option<Box<(Self, String)>>,
}

impl Results {
    /// Makes the directory where it is missing, and opens it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Self { directory: directory.into(), path: path.to_owned(), lock: None })
    }

    /// The same, with the place where the build's lock goes.
    pub(super) fn with_lock_at(self, lock: &Path) -> io::Result<Self> {
        let name = lock.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| io::Error::other("it names no file"))?.to_owned();
        let folder = match lock.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        Ok(Self { lock: Some(Box::new((Self::open(folder)?, name))), ..self })
    }

    /// Copies a file of the build's, into the folder of this name where there is one; its path.
    pub(super) fn take(
        &self,
        name: &str,
        folder: Option<&str>,
        file: &File,
        stop: &Stop,
    ) -> io::Result<PathBuf> {
        let refused = || io::Error::other("a build makes no file of such a name");
        if let (None, Some(lock)) = (folder, &self.lock)
            && is_plain(name)
            && name.ends_with(".lock")
        {
            let (results, name) = lock.as_ref();
            return results.copy(name, file, stop);
        }
        match folder {
            None if is_a_result(name) => self.copy(name, file, stop),
            Some(folder) if is_a_folder(folder) && is_plain(name) => {
                self.folder(folder)?.copy(name, file, stop)
            }
            _ => Err(refused()),
        }
    }

    /// The folder of this name, made where it is missing.
    fn folder(&self, name: &str) -> io::Result<Self> {
        match mkdirat(&self.directory, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(&self.directory, name, flags, Mode::empty())?;
        Ok(Self { directory: directory.into(), path: self.path.join(name), lock: None })
    }

    fn copy(&self, name: &str, file: &File, stop: &Stop) -> io::Result<PathBuf> {
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a plain file"));
        }
        match self.nameless()? {
            Some(copy) => {
                copy_to_disk(file, &copy, stop)?;
                self.publish(&copy, name, |beside| {
                    let descriptor = format!("/proc/self/fd/{}", copy.as_raw_fd());
                    linkat(CWD, descriptor, &self.directory, beside, AtFlags::SYMLINK_FOLLOW)
                })
            }
            None => {
                let (copy, beside) = self.named()?;
                let copied =
                    copy_to_disk(file, &copy, stop).and_then(|()| self.publish_named(&copy, name, &beside));
                if copied.is_err() {
                    // The copy may be in its place already.
                    let _ = unlinkat(&self.directory, &beside, AtFlags::empty());
                }
                copied
            }
        }
    }

    /// A file without a name, which is gone if this process is killed before it has one; `None`
    /// where the file system has none such.
    fn nameless(&self) -> io::Result<Option<File>> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match openat(&self.directory, ".", flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Ok(Some(file.into())),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn named(&self) -> io::Result<(File, String)> {
        let name = format!(".hostler-result.{}", &nonce()?[..12]);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(&self.directory, &name, flags, Mode::RUSR | Mode::WUSR)?;
        Ok((file.into(), name))
    }

    /// Gives a finished copy its name, in the place of what may have that name.
    fn publish(
        &self,
        copy: &File,
        name: &str,
        link: impl Fn(&str) -> Result<(), Errno>,
    ) -> io::Result<PathBuf> {
        seal(copy)?;
        match link(name) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let beside = format!(".hostler-result.{}", &nonce()?[..12]);
                link(&beside)?;
                renameat(&self.directory, &beside, &self.directory, name)?;
            }
            Err(error) => return Err(error.into()),
        }
        fsync(&self.directory)?;
        Ok(self.path.join(name))
    }

    fn publish_named(&self, copy: &File, name: &str, beside: &str) -> io::Result<PathBuf> {
        seal(copy)?;
        renameat(&self.directory, beside, &self.directory, name)?;
        fsync(&self.directory)?;
        Ok(self.path.join(name))
    }
}

/// Copies piece by piece, each to the disk for good: what the kernel still had to write of gigabytes would be
/// waited for at the end, and no wish to stop be heard.
fn copy_to_disk(from: &File, to: &File, stop: &Stop) -> io::Result<()> {
    copy_with_holes(from, to, || {
        stop.check().map_err(io::Error::other)?;
        to.sync_data()
    })
}

/// Readable for all, and on the disk for good.
fn seal(copy: &File) -> io::Result<()> {
    fchmod(copy, Mode::from_raw_mode(0o644))?;
    copy.sync_all()
}

/// Whether a build makes a file of this name: nothing else of what a subverted one hands over comes
/// near root's own files.
fn is_a_result(name: &str) -> bool {
    const ENDS: [&str; 18] = [
        ".console.log",
        ".installer.log",
        ".prepare.log",
        ".inspect.log",
        ".verify.log",
        ".qcow2",
        ".raw",
        ".vmdk",
        ".vhdx",
        ".ova",
        ".tar",
        ".squashfs",
        ".vmlinuz",
        ".initrd",
        ".packages.json",
        ".spdx.json",
        ".provenance.json",
        ".sha256",
    ];
    is_plain(name) && ENDS.iter().any(|end| name.ends_with(end))
}

/// Whether a build makes a folder of this name; what is in it may have any plain name.
fn is_a_folder(name: &str) -> bool {
    is_plain(name) && (name.ends_with(".artifacts") || name.ends_with(".failure"))
}

fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains('/')
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;

    fn file(folder: &Path, text: &str) -> File {
        let path = folder.join("original");
        fs::write(&path, text).unwrap();
        File::open(path).unwrap()
    }

    #[test]
    fn root_takes_results_and_nothing_else() {
        for name in ["debian-12.qcow2", "debian-12.sha256", "a.console.log", "a.verify.log"] {
            assert!(is_a_result(name), "{name}");
        }
        for name in ["Makefile", ".qcow2", ".profile.console.log", "deploy.sh", "../x.qcow2", "a/b.qcow2", ""]
        {
            assert!(!is_a_result(name), "{name}");
        }
    }

    #[test]
    fn a_result_is_a_copy_that_later_writes_to_the_original_do_not_reach() {
        let builders = tempfile::tempdir().unwrap();
        let output = tempfile::tempdir().unwrap();
        let results = Results::open(&output.path().join("new")).unwrap();
        let taken = results.take("x.qcow2", None, &file(builders.path(), "image"), &Stop::default()).unwrap();
        fs::write(builders.path().join("original"), "other").unwrap();
        assert_eq!(fs::read_to_string(&taken).unwrap(), "image");
        assert_eq!(fs::metadata(&taken).unwrap().mode() & 0o7777, 0o644);
        // Another build of the same name takes its place; nothing else is left.
        results.take("x.qcow2", None, &file(builders.path(), "newer"), &Stop::default()).unwrap();
        assert_eq!(fs::read_to_string(&taken).unwrap(), "newer");
        assert_eq!(fs::read_dir(output.path().join("new")).unwrap().count(), 1);
    }

    #[test]
    fn file_systems_without_nameless_files_serve_as_well() {
        let builders = tempfile::tempdir().unwrap();
        let output = tempfile::tempdir().unwrap();
        let results = Results::open(output.path()).unwrap();
        let (mut copy, beside) = results.named().unwrap();
        io::copy(&mut file(builders.path(), "image"), &mut copy).unwrap();
        let taken = results.publish_named(&copy, "x.qcow2", &beside).unwrap();
        assert_eq!(fs::read_to_string(taken).unwrap(), "image");
        assert_eq!(fs::read_dir(output.path()).unwrap().count(), 1);
    }

    #[test]
    fn artifacts_go_to_a_folder_of_their_own_whatever_they_are_called() {
        let builders = tempfile::tempdir().unwrap();
        let output = tempfile::tempdir().unwrap();
        let results = Results::open(output.path()).unwrap();
        let taken = results
            .take("Makefile", Some("x.artifacts"), &file(builders.path(), "a"), &Stop::default())
            .unwrap();
        assert_eq!(taken, output.path().join("x.artifacts/Makefile"));
        for (name, folder) in
            [("a", "x"), ("a", "../x.artifacts"), ("../a", "x.artifacts"), ("", "x.artifacts")]
        {
            let taken = results.take(name, Some(folder), &file(builders.path(), "a"), &Stop::default());
            assert!(taken.is_err(), "{folder}/{name}");
        }
        symlink(builders.path(), output.path().join("y.artifacts")).unwrap();
        assert!(
            results.take("a", Some("y.artifacts"), &file(builders.path(), "a"), &Stop::default()).is_err()
        );
        assert!(!builders.path().join("a").exists());
    }

    #[test]
    fn a_link_in_a_results_place_is_replaced_and_not_followed() {
        let builders = tempfile::tempdir().unwrap();
        let output = tempfile::tempdir().unwrap();
        let precious = builders.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, output.path().join("x.qcow2")).unwrap();
        let results = Results::open(output.path()).unwrap();
        results.take("x.qcow2", None, &file(builders.path(), "image"), &Stop::default()).unwrap();
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
        assert!(fs::symlink_metadata(output.path().join("x.qcow2")).unwrap().is_file());
    }

    #[test]
    fn an_output_directory_that_is_swapped_during_the_build_gets_nothing() {
        let builders = tempfile::tempdir().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let results = Results::open(&output).unwrap();
        fs::rename(&output, folder.path().join("moved")).unwrap();
        fs::create_dir(folder.path().join("roots-own")).unwrap();
        symlink(folder.path().join("roots-own"), &output).unwrap();
        results.take("x.qcow2", None, &file(builders.path(), "image"), &Stop::default()).unwrap();
        assert!(folder.path().join("moved/x.qcow2").exists());
        assert!(!folder.path().join("roots-own/x.qcow2").exists());
    }

    #[test]
    fn a_copy_that_nobody_waits_for_any_more_is_given_up_and_leaves_nothing() {
        use hostler_runner::cancel::Cancel;
        use hostler_runner::stop::Stopped;
        let builders = tempfile::tempdir().unwrap();
        let output = tempfile::tempdir().unwrap();
        let results = Results::open(output.path()).unwrap();
        let cancel = std::sync::Arc::new(Cancel::new().unwrap());
        cancel.cancel();
        let stop = Stop::new(cancel);
        let error = results.take("x.qcow2", None, &file(builders.path(), "image"), &stop).unwrap_err();
        assert_eq!(Stopped::cause_of(&error), Some(Stopped::Asked));
        assert_eq!(fs::read_dir(output.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_plain_file_is_not_read() {
        let output = tempfile::tempdir().unwrap();
        let results = Results::open(output.path()).unwrap();
        assert!(results.take("x.qcow2", None, &File::open("/dev/zero").unwrap(), &Stop::default()).is_err());
        assert!(results.take("x.qcow2", None, &File::open("/").unwrap(), &Stop::default()).is_err());
        assert_eq!(fs::read_dir(output.path()).unwrap().count(), 0);
    }
}
