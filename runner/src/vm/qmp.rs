//! A small client of qemu's machine protocol, as a pure state machine.
//!
//! Bytes from the socket go into [`Client::push`], which says what happened and puts what is to be
//! sent into [`Client::take_output`]. One command is under way at a time. Deliberately absent: the
//! socket, the clock, and every command but the few that a build needs. qemu runs what a guest may
//! have subverted, so its lines are bounded and unknown content is ignored.

use serde_json::{Value, json};

/// The longest line that is read, in bytes: `query-blockstats` gives a few kilobytes per disk.
const LONGEST_LINE: usize = 1024 * 1024;

/// The number under which qemu keeps the file for a picture.
const PICTURE_SET: u32 = 1;

/// What qemu said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// The handshake is over: commands may be sent.
    Ready,
    /// The answer to [`Client::ask_block_statistics`].
    Blocks(BlockTotals),
    /// A disk's file could not be written or read; the machine stopped.
    DiskError {
        /// Whether the host's disk is full.
        no_space: bool,
    },
    /// The guest's kernel reported a panic to the machine.
    GuestPanicked,
    /// The file for the picture was taken over.
    FileTaken,
    /// The picture of the screen is written.
    Picture,
    /// The machine is being shut down.
    Shutdown {
        /// Whether the guest wanted it: it switched itself off, or began anew, which ends it too.
        by_guest: bool,
    },
    /// qemu refused the command that was under way.
    Refused(String),
}

/// What all disks did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockTotals {
    /// Bytes read.
    pub read: u64,
    /// Bytes written.
    pub written: u64,
    /// Operations of any kind, trims and flushes too.
    pub operations: u64,
}

/// Why the conversation cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// A line without an end.
    #[error("qemu sent a control line of more than {LONGEST_LINE} bytes")]
    Overlong,
    /// Not JSON.
    #[error("qemu sent a control line that is no JSON object")]
    Malformed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expecting {
    Greeting,
    Capabilities,
    Nothing,
    Blocks,
    File,
    Picture,
    Quit,
}

/// The conversation.
#[derive(Debug)]
pub struct Client {
    line: Vec<u8>,
    output: Vec<u8>,
    expecting: Expecting,
}

impl Default for Client {
    fn default() -> Self {
        Self { line: Vec::new(), output: Vec::new(), expecting: Expecting::Greeting }
    }
}

impl Client {
    /// Whether an answer is outstanding, so that silence means that qemu hangs.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.expecting != Expecting::Nothing
    }

    /// Asks what the disks did. Does nothing, and says so, while an answer is outstanding.
    pub fn ask_block_statistics(&mut self) -> bool {
        self.ask(&json!({ "execute": "query-blockstats" }), Expecting::Blocks)
    }

    /// Hands over the file for a picture of the screen: its descriptor goes with what
    /// [`Client::take_output`] gives next. So qemu needs no right to any path.
    pub fn ask_to_take_file(&mut self) -> bool {
        let command = json!({ "execute": "add-fd", "arguments": { "fdset-id": PICTURE_SET } });
        self.ask(&command, Expecting::File)
    }

    /// Asks for a picture of the screen as PNG in the file that was handed over.
    pub fn ask_picture(&mut self) -> bool {
        let path = format!("/dev/fdset/{PICTURE_SET}");
        let command = json!({ "execute": "screendump", "arguments": { "filename": path, "format": "png" } });
        self.ask(&command, Expecting::Picture)
    }

    /// Asks qemu to end.
    pub fn ask_quit(&mut self) -> bool {
        self.ask(&json!({ "execute": "quit" }), Expecting::Quit)
    }

    /// What is to be written to the socket.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Takes bytes from the socket.
    ///
    /// # Errors
    /// When they are not the protocol; the conversation is over then.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Said>, QmpError> {
        let mut said = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                if !line.iter().all(u8::is_ascii_whitespace) {
                    said.extend(self.read(&line)?);
                }
            } else if self.line.len() < LONGEST_LINE {
                self.line.push(byte);
            } else {
                return Err(QmpError::Overlong);
            }
        }
        Ok(said)
    }

    fn ask(&mut self, command: &Value, expecting: Expecting) -> bool {
        if self.is_waiting() {
            return false;
        }
        self.send(command, expecting);
        true
    }

    fn send(&mut self, command: &Value, expecting: Expecting) {
        self.output.extend(command.to_string().into_bytes());
        self.output.push(b'\n');
        self.expecting = expecting;
    }

    fn read(&mut self, line: &[u8]) -> Result<Option<Said>, QmpError> {
        let value: Value = serde_json::from_slice(line).map_err(|_| QmpError::Malformed)?;
        let object = value.as_object().ok_or(QmpError::Malformed)?;
        if let Some(event) = object.get("event").and_then(Value::as_str) {
            return Ok(event_said(event, object.get("data")));
        }
        if object.contains_key("QMP") && self.expecting == Expecting::Greeting {
            self.send(&json!({ "execute": "qmp_capabilities" }), Expecting::Capabilities);
            return Ok(None);
        }
        if let Some(error) = object.get("error") {
            self.expecting = Expecting::Nothing;
            let text = error.get("desc").and_then(Value::as_str).unwrap_or("");
            let cleaned = text.chars().filter(|character| !character.is_control());
            return Ok(Some(Said::Refused(cleaned.take(200).collect())));
        }
        let Some(answer) = object.get("return") else {
            return Ok(None);
        };
        let answered = std::mem::replace(&mut self.expecting, Expecting::Nothing);
        Ok(match answered {
            Expecting::Capabilities => Some(Said::Ready),
            Expecting::File => Some(Said::FileTaken),
            Expecting::Picture => Some(Said::Picture),
            Expecting::Blocks => Some(Said::Blocks(block_totals(answer))),
            Expecting::Greeting | Expecting::Nothing | Expecting::Quit => None,
        })
    }
}

fn event_said(event: &str, data: Option<&Value>) -> Option<Said> {
    match event {
        "BLOCK_IO_ERROR" => Some(Said::DiskError {
            no_space: data.and_then(|data| data.get("nospace")).and_then(Value::as_bool).unwrap_or(false),
        }),
        "GUEST_PANICKED" => Some(Said::GuestPanicked),
        "SHUTDOWN" => Some(Said::Shutdown {
            by_guest: data.and_then(|data| data.get("guest")).and_then(Value::as_bool).unwrap_or(false),
        }),
        _ => None,
    }
}

fn block_totals(answer: &Value) -> BlockTotals {
    let mut totals = BlockTotals::default();
    for device in answer.as_array().into_iter().flatten() {
        let number = |name: &str| {
            device
                .get("stats")
                .and_then(|statistics| statistics.get(name))
                .and_then(Value::as_u64)
                .unwrap_or(0)
        };
        totals.read = totals.read.saturating_add(number("rd_bytes"));
        totals.written = totals.written.saturating_add(number("wr_bytes"));
        for name in ["rd_operations", "wr_operations", "flush_operations", "unmap_operations"] {
            totals.operations = totals.operations.saturating_add(number(name));
        }
    }
    totals
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GREETING: &[u8] = b"{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";

    fn ready() -> Client {
        let mut client = Client::default();
        assert_eq!(client.push(GREETING).unwrap(), []);
        assert_eq!(client.take_output(), b"{\"execute\":\"qmp_capabilities\"}\n");
        assert_eq!(client.push(b"{\"return\": {}}\r\n").unwrap(), [Said::Ready]);
        client
    }

    #[test]
    fn the_statistics_of_all_disks_are_added() {
        let mut client = ready();
        assert!(client.ask_block_statistics());
        assert!(client.is_waiting());
        assert!(!client.ask_block_statistics());
        let answer = br#"{"return": [{"stats": {"rd_bytes": 5, "wr_bytes": 7, "rd_operations": 1}},
            {"stats": {"rd_bytes": 1, "wr_operations": 2, "flush_operations": 3}}, {"stats": 4}, 9]}"#;
        let mut line = answer.to_vec();
        line.retain(|&byte| byte != b'\n');
        line.push(b'\n');
        assert_eq!(
            client.push(&line).unwrap(),
            [Said::Blocks(BlockTotals { read: 6, written: 7, operations: 6 })]
        );
        assert!(!client.is_waiting());
    }

    #[test]
    fn events_come_at_any_time() {
        let mut client = ready();
        client.ask_block_statistics();
        assert_eq!(
            client
                .push(b"{\"event\":\"BLOCK_IO_ERROR\",\"data\":{\"nospace\":true}}\n{\"event\":\"RTC_CHANGE\"}\n")
                .unwrap(),
            [Said::DiskError { no_space: true }]
        );
        assert!(client.is_waiting());
    }

    #[test]
    fn a_refusal_ends_the_command() {
        let mut client = ready();
        client.ask_quit();
        assert_eq!(
            client.push(b"{\"error\":{\"desc\":\"no\\u001b[2J\"}}\n").unwrap(),
            [Said::Refused("no[2J".into())]
        );
        assert!(!client.is_waiting());
    }

    #[test]
    fn rubbish_and_endless_lines_are_errors() {
        assert_eq!(Client::default().push(b"hello\n"), Err(QmpError::Malformed));
        assert_eq!(Client::default().push(b"[]\n"), Err(QmpError::Malformed));
        assert_eq!(Client::default().push(&vec![b' '; LONGEST_LINE + 1]), Err(QmpError::Overlong));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = ready().push(&bytes);
        }
    }
}
