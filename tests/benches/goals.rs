//! `make bench`: measures what Hostler promises about time, and prints it as a table. Needs root and a
//! machine that does nothing else meanwhile.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use hostler_tests::bench::{Measurement, Sizes, report};

/// Measures Hostler against what it is to be compared with.
#[derive(Debug, Parser)]
struct Arguments {
    /// Write the table to this file too.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Only these: reclaim, burst, snapshot, idle, cache.
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = measurement)]
    only: Vec<Measurement>,
    /// In small, to see that it works. The numbers mean nothing.
    #[arg(long)]
    small: bool,
    /// How often one stack is taken back.
    #[arg(long, value_name = "N")]
    repetitions: Option<usize>,
    /// How many stacks leak at once.
    #[arg(long, value_name = "N")]
    stacks: Option<usize>,
    /// How often that, and a look at a busy host, is measured.
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

fn measurement(name: &str) -> Result<Measurement, String> {
    let found = Measurement::ALL.into_iter().find(|measurement| measurement.name() == name);
    found.ok_or_else(|| "one of: reclaim, burst, snapshot, idle, cache".to_owned())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut sizes = if arguments.small { Sizes::SMALL } else { Sizes::FULL };
    sizes.repetitions = arguments.repetitions.unwrap_or(sizes.repetitions);
    sizes.stacks = arguments.stacks.unwrap_or(sizes.stacks);
    sizes.rounds = arguments.rounds.unwrap_or(sizes.rounds);
    let all = if arguments.only.is_empty() { Measurement::ALL.to_vec() } else { arguments.only };

    // Where it cannot be written is to be known before minutes have passed.
    let mut output = match arguments.output.map(|path| (File::create(&path), path)) {
        Some((Err(error), path)) => {
            eprintln!("writing {} failed: {error}", path.display());
            return ExitCode::FAILURE;
        }
        Some((Ok(file), _)) => Some(file),
        None => None,
    };
    let load = report::load();
    let mut text = String::new();
    for measurement in all {
        eprintln!("measuring: {}", measurement.name());
        let section = measurement.run(&sizes).markdown();
        println!("{section}");
        text.push_str(&section);
        text.push('\n');
    }
    text.insert_str(
        0,
        &format!(
            "Machine: {}. Load when it began: {load}, at the end, by the measurements themselves: {}.\n\n",
            report::machine(),
            report::load()
        ),
    );
    match output.as_mut().map(|file| file.write_all(text.as_bytes())) {
        Some(Err(error)) => {
            eprintln!("writing the table failed: {error}");
            ExitCode::FAILURE
        }
        Some(Ok(())) | None => ExitCode::SUCCESS,
    }
}
