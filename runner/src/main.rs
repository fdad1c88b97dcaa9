//! `hostler`: the command line of the runner.

use std::ffi::OsString;
use std::process::ExitCode;

use hostler_runner::{cli, command};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    // This program also plays parts of its own that nobody types; they are told apart before
    // anything else happens.
    let status = match arguments.get(1).and_then(|part| part.to_str()) {
        Some(command::LAUNCH) => command::become_command(&arguments[2..]),
        _ => cli::main(arguments),
    };
    ExitCode::from(status)
}
