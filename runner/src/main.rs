//! The `hostler` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    hostler_runner::vm::shim::main()
}
