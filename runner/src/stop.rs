//! When to give up: someone asks, or the time is over.
//!
//! Whatever waits takes a [`Stop`], and fails with an error that has [`Stopped`] among its causes. So
//! the one who set the time can tell a failure from having given up, wherever that happened.

use std::error::Error;
use std::io::{self, Read};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cancel::Cancel;

/// When to give up. The default is never.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    cancel: Option<Arc<Cancel>>,
    until: Option<Instant>,
}

/// Why something was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stopped {
    /// Someone asked.
    #[error("it was told to stop")]
    Asked,
    /// The time is over.
    #[error("the time for it is over")]
    Late,
}

impl Stopped {
    /// Whether something was given up because of this, wherever among an error's causes it says so.
    #[must_use]
    pub fn cause_of(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(stopped) = error.downcast_ref() {
                return Some(*stopped);
            }
            // An I/O error does not count what it wraps among its causes.
            cause = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
                Some(wrapped) => Some(wrapped),
                None => error.source(),
            };
        }
        None
    }
}

impl Stop {
    /// When someone asks.
    #[must_use]
    pub fn new(cancel: Arc<Cancel>) -> Self {
        Self { cancel: Some(cancel), until: None }
    }

    /// The same, and at `instant` at the latest.
    #[must_use]
    pub fn at(&self, instant: Instant) -> Self {
        let until = self.until.map_or(instant, |until| until.min(instant));
        Self { cancel: self.cancel.clone(), until: Some(until) }
    }

    /// The same, and after `time` at the latest.
    #[must_use]
    pub fn within(&self, time: Duration) -> Self {
        // A time beyond what the clock can tell is none.
        Instant::now().checked_add(time).map_or_else(|| self.clone(), |instant| self.at(instant))
    }

    /// Is it time to give up?
    ///
    /// # Errors
    /// It is.
    pub fn check(&self) -> Result<(), Stopped> {
        if self.cancel.as_ref().is_some_and(|cancel| cancel.is_cancelled()) {
            return Err(Stopped::Asked);
        }
        if self.until.is_some_and(|until| Instant::now() >= until) {
            return Err(Stopped::Late);
        }
        Ok(())
    }

    /// How much of `wait` is left until the time is over.
    #[must_use]
    pub fn left(&self, wait: Duration) -> Duration {
        self.until.map_or(wait, |until| until.saturating_duration_since(Instant::now()).min(wait))
    }

    /// A reader of the same that fails once it is time to give up.
    pub fn reading<R: Read>(&self, inner: R) -> Heeding<'_, R> {
        Heeding { stop: self, inner }
    }

    /// What becomes readable once someone asks.
    #[must_use]
    pub fn wish(&self) -> Option<BorrowedFd<'_>> {
        self.cancel.as_ref().map(|cancel| cancel.as_fd())
    }
}

/// A reader that heeds the wish to stop.
#[derive(Debug)]
pub struct Heeding<'a, R> {
    stop: &'a Stop,
    inner: R,
}

impl<R: Read> Read for Heeding<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stop.check().map_err(io::Error::other)?;
        self.inner.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wish_and_the_earlier_time_count() {
        assert_eq!(Stop::default().check(), Ok(()));
        let cancel = Arc::new(Cancel::new().unwrap());
        let stop = Stop::new(Arc::clone(&cancel)).within(Duration::from_secs(60));
        assert_eq!(stop.check(), Ok(()));
        assert!(stop.left(Duration::from_secs(100)) <= Duration::from_secs(60));
        assert_eq!(stop.left(Duration::from_secs(1)), Duration::from_secs(1));
        assert_eq!(stop.within(Duration::ZERO).check(), Err(Stopped::Late));
        assert_eq!(stop.within(Duration::MAX).check(), Ok(()));
        assert_eq!(stop.within(Duration::ZERO).within(Duration::from_secs(9)).check(), Err(Stopped::Late));
        cancel.cancel();
        assert_eq!(stop.check(), Err(Stopped::Asked));
    }

    #[test]
    fn a_cause_is_found_at_any_depth() {
        #[derive(Debug, thiserror::Error)]
        #[error("it failed")]
        struct Failed(#[source] Stopped);
        #[derive(Debug, thiserror::Error)]
        #[error("it could not be read")]
        struct Unread(#[source] io::Error);
        for error in [
            io::Error::other(Failed(Stopped::Late)),
            io::Error::other(Stopped::Late),
            io::Error::other(Unread(io::Error::other(Stopped::Late))),
        ] {
            assert_eq!(Stopped::cause_of(&error), Some(Stopped::Late), "{error:?}");
        }
        assert_eq!(Stopped::cause_of(&Stopped::Asked), Some(Stopped::Asked));
        assert_eq!(Stopped::cause_of(&io::Error::other("else")), None);
        assert_eq!(Stopped::cause_of(&io::Error::from_raw_os_error(2)), None);
    }

    #[test]
    fn a_reader_fails_once_someone_asks() {
        let cancel = Arc::new(Cancel::new().unwrap());
        let stop = Stop::new(Arc::clone(&cancel));
        let mut reader = stop.reading(io::repeat(1));
        let mut buffer = [0; 8];
        assert_eq!(reader.read(&mut buffer).unwrap(), 8);
        cancel.cancel();
        let error = reader.read(&mut buffer).unwrap_err();
        assert_eq!(Stopped::cause_of(&error), Some(Stopped::Asked));
    }
}
