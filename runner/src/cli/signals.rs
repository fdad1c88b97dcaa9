//! Turns the signals that ask for an end into a call.
//!
//! A thread of its own waits for SIGINT, SIGTERM and SIGHUP through tokio's handlers. Masks are not
//! used: children would inherit them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use hostler_runner::cancel::Cancel;
use tokio::signal::unix::{SignalKind, signal};

static RECEIVED: AtomicU8 = AtomicU8::new(0);

/// The first signal that came, if one did.
pub(crate) fn received() -> Option<u8> {
    match RECEIVED.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(signal),
    }
}

/// Takes a signal for received that reached another process of this program.
pub(crate) fn pretend(number: u8) {
    let _ = RECEIVED.compare_exchange(0, number, Ordering::SeqCst, Ordering::SeqCst);
}

/// A wish to stop that is made by the first signal that asks for an end.
pub(crate) fn cancel() -> io::Result<Arc<Cancel>> {
    let cancel = Arc::new(Cancel::new()?);
    let asked = Arc::clone(&cancel);
    watch(move |_| asked.cancel())?;
    Ok(cancel)
}

/// Calls `on_signal` with the number of each signal that asks for an end, from now on.
pub(crate) fn watch(on_signal: impl Fn(u8) + Send + 'static) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate, mut hang_up) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
    };
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            loop {
                let number = tokio::select! {
                    Some(()) = interrupt.recv() => 2,
                    Some(()) = terminate.recv() => 15,
                    Some(()) = hang_up.recv() => 1,
                    else => return,
                };
                pretend(number);
                on_signal(number);
            }
        });
    })?;
    Ok(())
}
