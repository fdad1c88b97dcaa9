//! The `hostler` program: the edge where arguments come in, text goes out, and signals arrive.

use std::process::ExitCode;

use hostler_runner::vm::shim;

mod cli;

fn main() -> ExitCode {
    // Before anything else happens in this process: the shim has to be single-threaded and plain.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "__vm") {
        return shim::main();
    }
    cli::main()
}
