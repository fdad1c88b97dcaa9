//! The `hostler` program: the edge where arguments come in, text goes out, and signals arrive.

use std::process::ExitCode;

use hostler_runner::command;
use hostler_runner::vm::{probe, shim};

mod cli;

fn main() -> ExitCode {
    // Before anything else happens in this process: the shim has to be single-threaded and plain.
    let arguments: Vec<_> = std::env::args_os().collect();
    match arguments.get(1).and_then(|part| part.to_str()) {
        Some("__vm") => shim::main(),
        Some(probe::PROBE) => probe::main(&arguments[2..]),
        Some(command::LAUNCH) => ExitCode::from(command::become_command(&arguments[2..])),
        _ => cli::main(),
    }
}
