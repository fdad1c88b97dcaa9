//! A log that takes no more than it may, whatever is written to it.

use std::io::{self, Write};

/// Keeps the first bytes of what it is given, and says once that the rest is missing.
#[derive(Debug)]
pub(super) struct Bounded<W> {
    log: W,
    what: &'static str,
    limit: u64,
    bytes: u64,
}

impl<W: Write> Bounded<W> {
    /// Keeps `limit` bytes of `what`.
    pub(super) fn new(log: W, what: &'static str, limit: u64) -> Self {
        Self { log, what, limit, bytes: 0 }
    }

    /// Takes bytes.
    ///
    /// # Errors
    /// When they cannot be written.
    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = self.limit.saturating_sub(self.bytes);
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
        if room == 0 {
            return Ok(());
        }
        let fits = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
        let (kept, rest) = bytes.split_at(fits);
        self.log.write_all(kept)?;
        if !rest.is_empty() || room == bytes.len() as u64 {
            let Self { what, limit, .. } = self;
            write!(
                self.log,
                "\n[hostler: the {what} is longer than {limit} bytes; the rest was not kept]\n"
            )?;
        }
        self.log.flush()
    }

    /// Bytes so far, kept or not.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stops_at_its_limit_and_says_so_once() {
        let mut bounded = Bounded::new(Vec::new(), "console", 10);
        for part in ["0123456", "789abc", "def"] {
            bounded.push(part.as_bytes()).unwrap();
        }
        assert_eq!(
            String::from_utf8(bounded.log).unwrap(),
            "0123456789\n[hostler: the console is longer than 10 bytes; the rest was not kept]\n"
        );
        assert_eq!(bounded.bytes, 16);
    }
}
