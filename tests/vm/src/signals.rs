//! An end that is asked for by a signal, by the death of whoever started this, or by a closed output.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use hostler_runner::cancel::Cancel;
use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::signal::unix::{SignalKind, signal};

static RECEIVED: AtomicU8 = AtomicU8::new(0);

/// The first signal that came, if one did.
pub(crate) fn received() -> Option<u8> {
    Some(RECEIVED.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
}

/// Cancels at the first signal that asks for an end, from now on. The death of the parent sends one:
/// a `make` that is killed must not leave a machine running.
pub(crate) fn watch(cancel: &Arc<Cancel>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate, mut hang_up) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
    };
    set_parent_process_death_signal(Some(Signal::TERM))?;
    let cancel = Arc::clone(cancel);
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let number = runtime.block_on(async {
            tokio::select! {
                Some(()) = interrupt.recv() => 2,
                Some(()) = terminate.recv() => 15,
                Some(()) = hang_up.recv() => 1,
                else => 15,
            }
        });
        RECEIVED.store(number, Ordering::SeqCst);
        cancel.cancel();
    })?;
    Ok(())
}
