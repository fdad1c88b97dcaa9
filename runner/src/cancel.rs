//! A wish to stop, which every wait can see.
//!
//! One event descriptor that becomes readable for good once someone asks: poll loops add it to what
//! they wait for, other code asks [`Cancel::is_cancelled`]. Deliberately absent: signals; the
//! program's edge turns them into [`Cancel::cancel`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// The wish.
#[derive(Debug)]
pub struct Cancel {
    event: OwnedFd,
    asked: AtomicBool,
}

impl Cancel {
    /// Nobody has asked yet.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            asked: AtomicBool::new(false),
        })
    }

    /// Asks to stop; more than once is the same as once.
    pub fn cancel(&self) {
        self.asked.store(true, Ordering::SeqCst);
        // Only a counter at its maximum refuses, and that is readable as well.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// Whether someone has asked.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }
}

impl AsFd for Cancel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
