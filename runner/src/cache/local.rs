//! Files that lie on this host and are handed out like all others: out of the cache, and checked.
//!
//! They are copied into it, since their owner may change them while they are read. No lock lists them: it has
//! the digest of the index that vouches for them.

use std::fs::File;
use std::io::Read as _;
use std::sync::Arc;

use crate::beside::BesideError;

use super::allowance::Allowance;
use super::fetch::Wanted;
use super::fetch_error::FetchError;
use super::offer::Local;
use super::transfer::{Begun, Core};

impl Core {
    /// The file out of the cache, copied into it where it is missing; that is taken from the allowance.
    pub(super) async fn take_in(
        self: &Arc<Self>,
        wanted: &Wanted,
        local: Local,
        allowance: Option<&Allowance>,
    ) -> Result<File, FetchError> {
        let _flight = match self.kept_or_flight(wanted).await? {
            Begun::Kept(file) => return Ok(file),
            Begun::Flight(flight) => flight,
        };
        // Not every index tells a size, and then the file itself does.
        let lies_there = || local.folder.file(&local.path).ok()?.metadata().ok();
        let size = wanted.size.or_else(|| Some(lies_there()?.len())).unwrap_or(0);
        Core::spend(allowance, wanted, size)?;
        let (core, copied) = (Arc::clone(self), wanted.clone());
        let copied = tokio::task::spawn_blocking(move || core.copy(&copied, &local)).await;
        copied.unwrap_or_else(|_| Err(FetchError::BrokenOff { name: wanted.name.clone() }))
    }

    fn copy(&self, wanted: &Wanted, local: &Local) -> Result<File, FetchError> {
        let name = || wanted.name.clone();
        let unkept = |source| FetchError::Store { name: name(), source };
        let unread = |source| FetchError::Local { name: name(), source };
        let mut input = local.folder.file(&local.path).map_err(unread)?;
        let mut writer = self.cache.writer().map_err(unkept)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            self.options.stop.check().map_err(|source| FetchError::Stopped { name: name(), source })?;
            let count = input
                .read(&mut buffer)
                .map_err(|source| unread(BesideError { path: local.folder.shown(&local.path), source }))?;
            if count == 0 {
                break;
            }
            writer.write(&buffer[..count]).map_err(unkept)?;
            // Before a disk is filled with what can only be wrong.
            if wanted.size.is_some_and(|size| writer.size() > size) {
                break;
            }
        }
        let size = writer.size();
        if writer.digest() != wanted.digest || wanted.size.is_some_and(|wanted| wanted != size) {
            return Err(FetchError::Changed { name: name() });
        }
        writer.commit(wanted.digest, size).map_err(unkept)
    }
}
