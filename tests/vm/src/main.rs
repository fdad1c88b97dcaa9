//! `hostler-vm`: runs a command as root in a virtual machine that is thrown away, for the tests.
//!
//! Boots the image of the test host (`tests/vm/host.toml`) on an overlay, with the command and the
//! files it needs on a second disk, through the runner's own machinery: qemu is confined, is watched,
//! and is gone when this program is. What the command says is shown line by line; that it succeeded
//! is the machine's nonce and nothing else. Needs no root.
//!
//! Deliberately absent: the making of the image and the choice of tests, which are `tests/vm.sh`'s;
//! any network.

mod machine;
mod payload;
mod signals;
mod transcript;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use hostler_protocol::text::without_controls;
use hostler_runner::cancel::Cancel;
use hostler_runner::vm::outcome::{Failure, Outcome};
use hostler_runner::vm::shim;

use machine::Ended;
use payload::Put;

/// Runs a command as root in a virtual machine of the test host that is thrown away afterwards.
#[derive(Debug, Parser)]
struct Arguments {
    /// The folder with the image: disk.raw, vmlinuz, initrd.img, busybox.
    #[arg(long)]
    image: PathBuf,
    /// Where the overlay lies while the machine runs, and the console's log afterwards.
    #[arg(long)]
    work: PathBuf,
    /// A file that the command finds below /mnt, as FILE=NAME; may be given often.
    #[arg(long = "put", value_name = "FILE=NAME")]
    puts: Vec<Put>,
    /// For everything; with kvm and without the same.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "30min")]
    total: Duration,
    /// Without any sign of life of the machine.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "4min")]
    no_progress: Duration,
    /// Memory of the machine, in MiB.
    #[arg(long, default_value_t = 1536)]
    memory: u64,
    /// More for the kernel's command line, such as systemd.unified_cgroup_hierarchy=0.
    #[arg(long, default_value = "")]
    append: String,
    /// The command and its arguments; it runs in /mnt.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    // This program is its own shim: see `hostler_runner::vm::shim`.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "__vm") {
        return shim::main();
    }
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(status) => status,
        Err(error) => {
            tell(&format!("hostler-vm: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let cancel = Arc::new(Cancel::new()?);
    signals::watch(&cancel)?;
    let ended = machine::boot(arguments, &cancel)?;
    if let Some(signal) = signals::received() {
        tell(&format!("hostler-vm: stopped by signal {signal}; the machine is gone"));
        return Ok(ExitCode::from(128_u8.saturating_add(signal)));
    }
    let Ended { outcome, took, log, tail } = ended;
    let took = humantime::format_duration(Duration::from_secs(took.as_secs()));
    match outcome {
        Outcome::Proven => {
            println!("hostler-vm: the command succeeded; the machine ran for {took}");
            return Ok(ExitCode::SUCCESS);
        }
        // What it had to say has been shown; the console adds nothing.
        Outcome::Failed(Failure::StepFailed { step, status, .. }) if step == payload::COMMAND => {
            tell(&format!("hostler-vm: the command failed with status {status}; the machine ran for {took}"));
        }
        Outcome::Failed(failure) => {
            if !tail.is_empty() {
                tell("hostler-vm: the last on the machine's console:");
                for line in tail {
                    tell(&format!("  | {line}"));
                }
            }
            tell(&format!("hostler-vm: [{}] {failure}; the machine ran for {took}", failure.class()));
        }
    }
    tell(&format!("hostler-vm: the console's log is {}", log.display()));
    Ok(ExitCode::FAILURE)
}

/// Shows text in which a guest may have had a say: nothing in it acts on a terminal.
fn tell(text: &str) {
    eprintln!("{}", without_controls(text));
}
