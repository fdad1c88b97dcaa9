//! The mirror that one guest sees, from the moment its machine has a socket to the last look at what it gave.

use std::io;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};

use crate::cache::offer::{Archives, Offer, WithFiles};
use crate::cache::{Clients, Failure, Fetcher, Mirror, Wanted};
use crate::contents::provenance::Artifact;
use crate::debian::Selection;
use crate::vm::outcome::Refused;
use crate::vm::run::Downloads;

use super::session::Packages;

/// What may be downloaded for a guest whatever its disk has: commands may fetch, use and remove.
const LEAST_DOWNLOADS: u64 = 2 << 30;

/// A mirror that is started with its guest.
pub(super) struct GuestMirror {
    selection: Arc<Selection>,
    fetcher: Arc<Fetcher>,
    /// What an installer may ask for, until the mirror has it.
    installers: Mutex<Option<Box<dyn Offer>>>,
    downloads: Vec<(String, Wanted)>,
    clients: Clients,
    running: Mutex<Option<Mirror>>,
}

impl GuestMirror {
    /// One that has what was chosen, or what an installer needs, for a guest with a disk of so many bytes: an
    /// archive has more than any guest needs, and than most hosts have room for.
    pub(super) fn new(packages: &Packages, installers: Option<Box<dyn Offer>>, disk: u64) -> Self {
        Self {
            clients: Clients::Guest { limit: disk.max(LEAST_DOWNLOADS) },
            selection: Arc::clone(&packages.selection),
            fetcher: Arc::clone(&packages.fetcher),
            installers: Mutex::new(installers),
            downloads: packages.downloads.clone(),
            running: Mutex::default(),
        }
    }

    /// Serves on this socket from now on.
    pub(super) fn start(&self, listener: TcpListener) -> io::Result<()> {
        let fetcher = Arc::clone(&self.fetcher);
        let installers = self.installers.lock().unwrap_or_else(PoisonError::into_inner).take();
        let started = match installers {
            Some(offer) => Mirror::start(listener, offer, self.clients, fetcher),
            None => {
                let archives = Archives::new(Arc::clone(&self.selection));
                let offer = WithFiles::new("downloads", &self.downloads, archives);
                Mirror::start(listener, offer, self.clients, fetcher)
            }
        };
        let started = started.map_err(io::Error::other)?;
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(started);
        Ok(())
    }

    /// What the guest downloaded so far.
    pub(super) fn downloads(&self) -> Downloads {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mirror) = running.as_ref() else { return Downloads::default() };
        let report = mirror.report();
        // What upstream sends counts as well: a file is served once all of it is there.
        let counted = self.fetcher.counted();
        let bytes = report.served_bytes + counted.upstream_bytes + counted.metadata_bytes;
        Downloads { bytes, refused: report.failures.into_iter().map(refused).collect() }
    }

    /// Stops; what the guest was given.
    pub(super) fn stop(self) -> Vec<Artifact> {
        let running = self.running.into_inner().unwrap_or_else(PoisonError::into_inner);
        let served = running.map(|mirror| mirror.stop().served).unwrap_or_default();
        let artifact = |(path, digest): (String, crate::cache::Digest)| Artifact {
            name: path.trim_start_matches('/').to_owned(),
            sha256: digest.to_string(),
        };
        served.into_iter().map(artifact).collect()
    }
}

/// The mirror's record of a file that it could not give, for the judge of the run.
fn refused(failure: Failure) -> Refused {
    Refused {
        path: failure.path,
        refusal: failure.refusal,
        status: failure.upstream_status,
        reason: failure.reason,
    }
}
