//! The recipe's own downloads, for the guest's commands.

use crate::cache::{FetchError, Fetcher, StoreError, Wanted};
use crate::event::{Event, Sink, Stage};
use crate::recipe::Download;

/// Brings all of them into the cache; under which name the guest finds each.
pub(super) fn bring(
    downloads: &[Download],
    fetcher: &Fetcher,
    sink: &dyn Sink,
) -> Result<Vec<(String, Wanted)>, FetchError> {
    let mut brought = Vec::new();
    for Download { name: short, urls, sha256 } in downloads {
        let name = format!("downloads/{short}");
        let wanted = match sha256 {
            Some(digest) => {
                let wanted = Wanted { name, urls: urls.clone(), size: None, digest: *digest };
                fetcher.fetch_all(vec![wanted.clone()], Stage::Fetch, sink)?;
                wanted
            }
            None => {
                let (digest, file) = fetcher.unvouched(&name, urls)?;
                let size = file.metadata().map_err(|source| FetchError::Store {
                    name: name.clone(),
                    source: StoreError::Read { path: fetcher.cache().root().to_owned(), source },
                })?;
                if fetcher.lock().is_none() {
                    sink.event(Event::Warning(format!(
                        "nothing vouches for {name}: if it is what you want, write sha256 = \"{digest}\" in its [[download]]"
                    )));
                }
                Wanted { name, urls: urls.clone(), size: Some(size.len()), digest }
            }
        };
        brought.push((short.clone(), wanted));
    }
    fetcher.tell_news(sink);
    Ok(brought)
}
