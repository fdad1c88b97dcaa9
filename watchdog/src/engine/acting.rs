//! Who carries out plans at the moment.

use std::cell::Cell;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

/// A count of them.
#[derive(Debug, Default)]
pub(super) struct Acting {
    count: Cell<usize>,
    ended: Notify,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'acting>(&'acting Acting);

impl Acting {
    pub(super) fn begin(&self) -> Turn<'_> {
        self.count.set(self.count.get() + 1);
        Turn(self)
    }

    /// Waits for a moment at most until nobody does: leases that end together then look together at what is
    /// left, where many looks would take the processors from those that still act.
    pub(super) async fn pause(&self) {
        const MOMENT: Duration = Duration::from_millis(25);
        let all_ended = async {
            while self.count.get() > 0 {
                self.ended.notified().await;
            }
        };
        // Whoever takes longer is not waited for.
        let _ = timeout(MOMENT, all_ended).await;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.count.set(self.0.count.get() - 1);
        if self.0.count.get() == 0 {
            self.0.ended.notify_waiters();
        }
    }
}
