//! A configuration: what is wrong with it is said, with its line.
#![no_main]

use hostler_watchdog::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match Config::parse(text) {
        Ok(config) => assert!(config.limits.requests_per_second > 0),
        Err(error) => assert!(!error.is_empty()),
    }
});
