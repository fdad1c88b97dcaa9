//! A program of the host, what it is given, and what it leaves.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::stop::{Stop, Stopped};

use super::find::{DIRECTORIES, find_program};
use super::run;

/// Why a tool has no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ToolError {
    /// It is not installed.
    #[error("{tool} is not installed: install the package {package}")]
    Missing {
        /// The tool.
        tool: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// It cannot be started, or watched.
    #[error("cannot run {}", tool.display())]
    Start {
        /// The tool.
        tool: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It was ended because it took too long.
    #[error(
        "{} was ended after {} without a result: look at the load of this host and its disk{}",
        tool.display(), humantime::format_duration(*limit), said(stderr)
    )]
    Deadline {
        /// The tool.
        tool: PathBuf,
        /// The time it was given.
        limit: Duration,
        /// What it said until then.
        stderr: String,
    },
    /// It was ended because nobody wants its result any more.
    #[error("{} was ended", tool.display())]
    Stopped {
        /// The tool.
        tool: PathBuf,
        /// Why.
        #[source]
        source: Stopped,
    },
    /// It ended, and not well.
    #[error("{} failed ({status}){}", tool.display(), said(stderr))]
    Failed {
        /// The tool.
        tool: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
}

/// The last of what a tool said, without what acts on a terminal.
fn said(stderr: &str) -> String {
    let kept: String = stderr.trim().chars().filter(|&sign| sign == '\n' || !sign.is_control()).collect();
    let skipped = kept.chars().count().saturating_sub(2000);
    match kept.chars().skip(skipped).collect::<String>().as_str() {
        "" => ", and said nothing".to_owned(),
        text => format!(", and said: {text}"),
    }
}

/// A tool by its name, and the package it comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostTool {
    /// Name of the program.
    pub name: &'static str,
    /// Debian package, for the message when it is missing.
    pub package: &'static str,
}

impl HostTool {
    /// The tool, ready to be given arguments.
    ///
    /// # Errors
    /// It is not installed.
    pub fn find(self) -> Result<Tool, ToolError> {
        let missing = ToolError::Missing { tool: self.name, package: self.package };
        find_program(self.name).map(Tool::at).ok_or(missing)
    }
}

/// A program and what it is given. Its environment has a locale, a search path and what
/// [`Tool::variable`] adds.
#[derive(Clone, Debug)]
pub struct Tool {
    program: PathBuf,
    arguments: Vec<OsString>,
    variables: Vec<(&'static str, OsString)>,
    input: Option<PathBuf>,
}

impl Tool {
    /// The program at a path.
    #[must_use]
    pub fn at(program: PathBuf) -> Self {
        Self { program, arguments: Vec::new(), variables: Vec::new(), input: None }
    }

    /// Adds an argument.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds several arguments.
    #[must_use]
    pub fn arguments<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Adds a variable to its environment.
    #[must_use]
    pub fn variable(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.variables.push((name, value.into()));
        self
    }

    /// Gives it a file to read as its standard input, which is empty otherwise.
    #[must_use]
    pub fn input(mut self, path: impl Into<PathBuf>) -> Self {
        self.input = Some(path.into());
        self
    }

    /// Runs it to its end, in this process' working directory. An exit status other than 0 is no
    /// error here.
    ///
    /// # Errors
    /// It cannot be run, or was ended at its `limit` or because of `stop`. It is gone then.
    pub fn run(&self, limit: Duration, stop: &Stop) -> Result<Finished, ToolError> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .env("LC_ALL", "C.UTF-8")
            .env("PATH", DIRECTORIES)
            .envs(self.variables.iter().map(|(name, value)| (name, value)));
        let input = match &self.input {
            Some(path) => {
                let opened = File::open(path);
                opened.map_err(|source| ToolError::Start { tool: self.program.clone(), source })?.into()
            }
            None => Stdio::null(),
        };
        command.stdin(input);
        run::run(&self.program, command, limit, stop)
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }
}

/// What a tool left.
#[derive(Debug)]
pub struct Finished {
    /// The program that ran.
    pub tool: PathBuf,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error, as text.
    pub stderr: String,
}

impl Finished {
    /// Demands exit status 0.
    ///
    /// # Errors
    /// Another status, with what the tool said.
    pub fn success(self) -> Result<Self, ToolError> {
        if self.status.success() {
            return Ok(self);
        }
        Err(self.failure())
    }

    /// The error that this end means, for callers with a stricter notion of success.
    #[must_use]
    pub fn failure(self) -> ToolError {
        ToolError::Failed { tool: self.tool, status: self.status, stderr: self.stderr }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_names_its_package() {
        let tool = HostTool { name: "no-such-tool", package: "tools" };
        assert_eq!(
            tool.find().expect_err("missing").to_string(),
            "no-such-tool is not installed: install the package tools"
        );
    }

    #[test]
    fn what_a_tool_says_is_cut_and_does_not_act_on_a_terminal() {
        assert_eq!(said("  no \u{1b}[2Jluck\n"), ", and said: no [2Jluck");
        assert_eq!(said(" \n"), ", and said nothing");
        assert_eq!(said(&"x".repeat(5000)).len(), 2000 + ", and said: ".len());
    }
}
