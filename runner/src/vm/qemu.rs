//! Which qemu and which processor a verdict about acceleration is true of.
//!
//! Deliberately absent: any judgement about versions.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::child::{Tool, ToolError};
use crate::stop::Stop;

/// How long a program may take to tell its version.
const DEADLINE: Duration = Duration::from_secs(30);

/// The version that `program --version` tells, or `None` when it tells none.
///
/// # Errors
/// When the program cannot be run.
pub fn version(program: &Path, stop: &Stop) -> Result<Option<String>, ToolError> {
    let asked = Tool::at(program.to_owned()).argument("--version").run(DEADLINE, stop)?.success()?;
    Ok(parse_version(&String::from_utf8_lossy(&asked.stdout)))
}

/// The text after `version` on the first line: `7.2.22 (Debian 1:7.2+dfsg-7)`.
fn parse_version(text: &str) -> Option<String> {
    let line = text.lines().next()?;
    let (_, version) = line.split_once("version ")?;
    let version: String = version.chars().filter(|character| !character.is_control()).take(120).collect();
    Some(version.trim().to_owned()).filter(|version| !version.is_empty())
}

/// The processor's name, as the kernel tells it; part of what an acceleration verdict depends on.
///
/// # Errors
/// When `/proc/cpuinfo` cannot be read.
pub fn processor() -> io::Result<String> {
    Ok(parse_processor(&std::fs::read_to_string("/proc/cpuinfo")?))
}

fn parse_processor(text: &str) -> String {
    text.lines()
        .find_map(|line| line.strip_prefix("model name"))
        .and_then(|rest| rest.split_once(':'))
        .map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_what_follows_the_word() {
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright\n"),
            Some("7.2.22 (Debian 1:7.2+dfsg-7)".into())
        );
        assert_eq!(
            parse_version("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7)\n"),
            Some("7.2.22 (Debian 1:7.2+dfsg-7)".into())
        );
        assert_eq!(parse_version("hello\n"), None);
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn the_first_processor_gives_the_name() {
        assert_eq!(
            parse_processor("processor\t: 0\nmodel name\t: Some CPU\nmodel name\t: Other\n"),
            "Some CPU"
        );
        assert_eq!(parse_processor(""), "unknown");
    }
}
