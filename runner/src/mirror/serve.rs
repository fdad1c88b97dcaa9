//! A mirror's current snapshot, as a web server's addresses.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::cache::offer::{Offer, Offered};

use super::directory::{Directory, DirectoryError};
use super::manifest::Manifest;

/// How long the link to the current snapshot is believed.
const FRESH: Duration = Duration::from_millis(500);

/// Offers what the current snapshot has; a new one is taken over as soon as it is there.
pub struct Served {
    directory: Directory,
    state: Mutex<State>,
}

struct State {
    snapshot: String,
    manifest: Arc<Manifest>,
    looked: Instant,
}

impl Served {
    /// Offers the mirror at `root`.
    ///
    /// # Errors
    /// It has no snapshot, or a damaged one.
    pub fn open(root: &Path) -> Result<Self, DirectoryError> {
        let directory = Directory::open(root)?;
        let snapshot = directory.current()?.ok_or_else(|| DirectoryError::Empty(root.to_owned()))?;
        let manifest = Arc::new(directory.manifest(&snapshot)?);
        let state = State { snapshot, manifest, looked: Instant::now() };
        Ok(Self { directory, state: Mutex::new(state) })
    }

    /// The manifest of the current snapshot.
    #[must_use]
    pub fn manifest(&self) -> Arc<Manifest> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= FRESH {
            state.looked = Instant::now();
            // Where it cannot be read just now, what was offered so far is still there.
            if let Ok(Some(current)) = self.directory.current()
                && current != state.snapshot
                && let Ok(manifest) = self.directory.manifest(&current)
            {
                state.snapshot = current;
                state.manifest = Arc::new(manifest);
            }
        }
        Arc::clone(&state.manifest)
    }
}

impl Offer for Served {
    fn find(&self, path: &str) -> Option<Offered> {
        let manifest = self.manifest();
        let wanted = manifest.wanted(path.strip_prefix('/')?)?;
        Some(Offered { wanted, local: None, modified: Some(manifest.time) })
    }
}
