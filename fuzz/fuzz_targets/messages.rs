//! A client's message, as its reader reads it; what a reader says, as the daemon reads it; and the lines of
//! a journal, which a disk may alter.
#![no_main]

use hostler_protocol::message::Call;
use hostler_watchdog::journal::recover;
use hostler_watchdog::reader::calls::{Read, read};
use hostler_watchdog::reader::message::{Asked, FromReader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(call) = serde_json::from_slice::<Call>(bytes) {
        match read(call, &[40, 41]) {
            Read::Ask(asked) => {
                let passed = match *asked {
                    Asked::OpenLease(ref call) => call.owner,
                    Asked::Adopt(ref call) => Some(call.process),
                    Asked::ClaimDirectory(ref call) => Some(call.directory),
                    Asked::RegisterLoop(ref call) => Some(call.device),
                    _ => None,
                };
                assert!(passed.is_none_or(|number| [40, 41].contains(&number)));
                let text = serde_json::to_vec(&asked).expect("plain data");
                assert_eq!(serde_json::from_slice::<Asked>(&text).expect("what was just written"), *asked);
            }
            Read::Say(reply) => assert!(serde_json::to_vec(&reply).is_ok()),
        }
    }
    let _ = serde_json::from_slice::<FromReader>(bytes);
    let recovered = recover(bytes);
    assert!(recovered.leases.keys().all(|lease| lease.0 < recovered.next_lease));
});
