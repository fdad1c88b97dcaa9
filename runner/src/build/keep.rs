//! What is kept of a build that failed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::causes::in_one_line;
use crate::event::Event;
use crate::stop::Stop;
use crate::vm::argv::{Attachment, Boot, Disk, DiskFormat};

use super::bundle::{self, Bundle};
use super::error::{BuildError, GuestError};
use super::image;
use super::preflight::Host;
use super::session::Session;

/// How long making a disk whole may take: the build's own time may be over already.
const WHOLE_DEADLINE: Duration = Duration::from_secs(10 * 60);

type AnyError = Box<dyn std::error::Error>;

impl Session<'_> {
    /// Delivers what is known of a failure; the page. Nothing failed in a build that somebody stopped, and
    /// that a bundle cannot be delivered is told and changes nothing.
    pub(super) fn keep(&self, host: &Host, error: &BuildError) -> Option<PathBuf> {
        if error.is_cancelled() {
            return None;
        }
        let guest = match error {
            BuildError::Guest(guest) => Some(guest.as_ref()),
            _ => None,
        };
        let name = &self.request.recipe.image.name;
        let folder = format!("{name}{}", bundle::ENDING);
        let warn = |what: &str, error: &AnyError| {
            let told = format!("could not keep {what}: {}", in_one_line(error.as_ref()));
            self.environment.sink.event(Event::Warning(told));
        };
        if let Some(guest) = guest.filter(|_| self.request.debugging.keeps) {
            let _ =
                self.keep_machine(host, guest, &folder).inspect_err(|error| warn("the guest's disks", error));
        }
        let bundle = Bundle {
            name,
            class: error.class(),
            message: in_one_line(error),
            stages: self.stages.clone(),
            took: self.started.elapsed(),
            guest: guest.map(|guest| bundle::Guest {
                report: &guest.report,
                console_log: &guest.logs.console,
                installer_log: Some(&guest.logs.installer),
                picture: guest.report.has_picture.then_some(guest.logs.picture.as_path()),
            }),
        };
        let deliver = || -> Result<PathBuf, AnyError> {
            let mut page = PathBuf::new();
            for file in bundle.write(&self.scratch.path().join(&folder))? {
                page = self.environment.delivery.deliver(&file, Some(&folder))?;
            }
            Ok(page)
        };
        deliver().inspect_err(|error| warn("what is known of the failure", error)).ok()
    }

    /// Keeps what boots a guest once more: its disks, each in one file, and what it was booted from.
    fn keep_machine(&self, host: &Host, guest: &GuestError, folder: &str) -> Result<(), AnyError> {
        let deliver = |file: &Path| self.environment.delivery.deliver(file, Some(folder));
        for disk in &guest.disks {
            match disk {
                // The medium is its owner's.
                Disk { attachment: Attachment::Disc, .. } => {}
                Disk { format: DiskFormat::Raw, path, .. } => drop(deliver(path)?),
                // What it lies on is the cache's, or goes with the scratch directory.
                Disk { format: DiskFormat::Qcow2, path, .. } => drop(deliver(&self.whole(host, path)?)?),
            }
        }
        if let Boot::Kernel { kernel, initramfs, .. } = &guest.boot {
            deliver(kernel)?;
            deliver(initramfs)?;
        }
        Ok(())
    }

    /// Makes an overlay a file that needs no other, in its place.
    fn whole(&self, host: &Host, overlay: &Path) -> Result<PathBuf, AnyError> {
        let stop = Stop::new(Arc::clone(&self.environment.cancel)).at(Instant::now() + WHOLE_DEADLINE);
        let whole = overlay.with_extension("whole");
        image::to_whole(&host.qemu_img, overlay, &whole, &stop)?;
        std::fs::rename(&whole, overlay)?;
        Ok(overlay.to_owned())
    }
}
