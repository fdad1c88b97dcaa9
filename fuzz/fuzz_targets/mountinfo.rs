//! The kernel's mount table, whose paths and sources users choose.
#![no_main]

use hostler_watchdog::kernel::mountinfo::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
    match parse(bytes) {
        // None is left out: a list with a line left out would hide a mount.
        Ok(entries) => assert_eq!(entries.len(), lines),
        Err(error) => assert!((1..=lines).contains(&error.line)),
    }
});
