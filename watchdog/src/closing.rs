//! Closes what may hang whoever closes it, on threads that do nothing else.
//!
//! A client's socket may have descriptors queued in it that nobody has taken out. Whoever closes the last
//! copy of the socket closes these too, and that takes as long as the file behind one of them likes.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// How many threads may hang. What comes then is kept open.
const THREAD_LIMIT: usize = 8;

/// Closes descriptors. All clones are one.
#[derive(Clone, Debug, Default)]
pub struct Closer {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<OwnedFd>,
    threads: usize,
    /// Those of them that wait for something to close.
    idle: usize,
}

impl Closer {
    /// Closes a descriptor soon. Never waits.
    pub fn close(&self, descriptor: OwnedFd) {
        let mut state = self.shared.state();
        state.queue.push_back(descriptor);
        if state.queue.len() <= state.idle {
            self.shared.wake.notify_one();
        } else if state.threads < THREAD_LIMIT {
            let shared = Arc::clone(&self.shared);
            let started = std::thread::Builder::new().name("closing".to_owned()).spawn(move || shared.run());
            match started {
                Ok(_) => state.threads += 1,
                Err(error) => {
                    tracing::warn!("a thread that closes connections could not be started: {error}");
                }
            }
        }
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.state();
        loop {
            while let Some(descriptor) = state.queue.pop_front() {
                drop(state);
                drop(descriptor);
                state = self.state();
            }
            if state.idle > 0 {
                // One that waits is enough.
                state.threads -= 1;
                return;
            }
            state.idle += 1;
            while state.queue.is_empty() {
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;

    /// A connection with data that nobody reads, whose closing waits for that.
    fn lingering(listener: &TcpListener) -> TcpStream {
        let mut stream = TcpStream::connect(listener.local_addr().expect("bound")).expect("listening");
        let linger = libc::linger { l_onoff: 1, l_linger: 3600 };
        nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger).expect("settable");
        stream.set_nonblocking(true).expect("settable");
        let full = loop {
            if let Err(error) = stream.write(&[0; 65536]) {
                break error;
            }
        };
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
        stream
    }

    #[test]
    fn what_hangs_holds_up_neither_the_caller_nor_what_comes_after() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let closer = Closer::default();
        let begun = Instant::now();
        for _ in 0..THREAD_LIMIT - 1 {
            closer.close(lingering(&listener).into());
        }
        let closed: Vec<UnixStream> = (0..100)
            .map(|_| {
                let (ours, theirs) = UnixStream::pair().expect("a pair");
                closer.close(theirs.into());
                ours
            })
            .collect();
        for mut stream in closed {
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("settable");
            assert_eq!(stream.read(&mut [0]).expect("its end"), 0);
        }
        assert!(begun.elapsed() < Duration::from_secs(20));
        // All but one hang, and that one waits.
        assert_eq!(closer.shared.state().threads, THREAD_LIMIT);
        // Ends the waiting of the others.
        drop(listener);
    }
}
