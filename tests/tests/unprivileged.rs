//! Tests that need cargo and nothing else: what both programs promise on the command line, and that
//! `hostler run` is not noticed by what it runs.

#[path = "unprivileged/command_line.rs"]
mod command_line;
#[path = "unprivileged/run.rs"]
mod run;
#[path = "unprivileged/tty.rs"]
mod tty;
