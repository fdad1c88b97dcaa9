//! Commands of `hostler`.
//!
//! Only this module prints. Each command returns an [`Exit`]; an error is shown once, with its
//! chain of causes, and tells its own exit status.

mod arguments;
mod build;
mod doctor;
mod exit;
mod privileges;
mod progress;
mod signals;

use std::process::ExitCode;

use clap::Parser as _;

use arguments::{Arguments, Command};
use exit::Exit;

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way as well. A closed output has no reader to tell.
            let _ = error.print();
            let wrong = error.exit_code() != 0;
            return if wrong { Exit::Usage.into() } else { Exit::Done.into() };
        }
    };
    let exit = match arguments.command {
        Command::Build(wanted) => build::main(&arguments.global, &wanted),
        Command::BuildUnprivileged(wanted) => privileges::unprivileged(&arguments.global, &wanted),
        Command::Doctor(wanted) => doctor::main(&arguments.global, &wanted),
    };
    exit.into()
}
