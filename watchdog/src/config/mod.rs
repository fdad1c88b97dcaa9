//! `hostlerd`'s configuration: TOML, every key known, every error with its line.

mod policy;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use policy::{Protect, Sweep};
use serde::{Deserialize, Deserializer};

use crate::model::Rule;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("reading {} failed", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not valid; the message shows line and column.
    #[error("{}: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the line shown.
        message: String,
    },
}

/// All settings. Each has a default, so an empty file is a valid one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The socket that clients use.
    pub api: Api,
    /// Prometheus.
    pub metrics: Metrics,
    /// What is kept over a restart.
    pub state: State,
    /// How leaks are taken back.
    pub reclaim: Reclaim,
    /// What one user may have.
    pub limits: Limits,
    /// How often the host is looked at anyway.
    pub sweep: Sweep,
    /// What is done with what no lease has: `[[policy]]`.
    #[serde(deserialize_with = "policy::rules")]
    pub policy: Vec<Rule>,
    /// What nobody may touch.
    pub protect: Protect,
}

/// `[api]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    /// The socket's path; not used under socket activation.
    pub socket: PathBuf,
    /// The group whose members may connect; absent means every user may.
    pub group: Option<String>,
}

impl Default for Api {
    fn default() -> Self {
        Self { socket: PathBuf::from(hostler_protocol::DEFAULT_SOCKET), group: None }
    }
}

/// `[metrics]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Address and port to serve `/metrics` on, such as `127.0.0.1:9821`; absent means nowhere.
    pub listen: Option<SocketAddr>,
    /// A file to write the metrics to every 15 s, for node_exporter's textfile collector; absent
    /// means none.
    pub textfile: Option<PathBuf>,
}

/// `[state]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct State {
    /// Where the journal is.
    pub directory: PathBuf,
}

impl Default for State {
    fn default() -> Self {
        Self { directory: PathBuf::from("/var/lib/hostler") }
    }
}

/// `[reclaim]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reclaim {
    /// How long after its owner's death a lease's resources are left alone.
    #[serde(deserialize_with = "duration")]
    pub grace: Duration,
    /// How long processes have between SIGTERM and SIGKILL.
    #[serde(deserialize_with = "duration")]
    pub term_timeout: Duration,
    /// How long any other step, or any single question to the kernel, may take.
    #[serde(deserialize_with = "duration")]
    pub step_timeout: Duration,
    /// How long after its lease's end a mount that nothing but the lease's own unkillable processes
    /// holds is unmounted lazily, so that it is out of the way; `None` means never.
    #[serde(deserialize_with = "duration_or_never")]
    pub lazy_after: Option<Duration>,
}

impl Default for Reclaim {
    fn default() -> Self {
        Self {
            grace: Duration::ZERO,
            term_timeout: Duration::from_secs(5),
            step_timeout: Duration::from_secs(10),
            lazy_after: Some(Duration::from_secs(600)),
        }
    }
}

/// `[limits]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Leases that one user may have open.
    pub leases: usize,
    /// Directories that one lease may claim.
    pub claims: usize,
    /// Processes and loop devices that one lease may register.
    pub resources: usize,
    /// Connections that one user may have open.
    pub connections: usize,
    /// Requests that one user may make in a second; more wait for their turn.
    #[serde(deserialize_with = "at_least_one")]
    pub requests_per_second: u32,
    /// Users that may be connected at the same time.
    pub users: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            leases: 256,
            claims: 32,
            resources: 1024,
            connections: 64,
            requests_per_second: 1000,
            users: 64,
        }
    }
}

fn at_least_one<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let number = u32::deserialize(deserializer)?;
    let none = || serde::de::Error::custom("with 0 nobody would ever be answered; write at least 1");
    if number == 0 { Err(none()) } else { Ok(number) }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|error| {
        serde::de::Error::custom(format!("{error}; write a duration such as \"500ms\", \"5s\" or \"2min\""))
    })
}

fn duration_or_never<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "never" {
        return Ok(None);
    }
    let parsed = humantime::parse_duration(&text).map(Some);
    parsed.map_err(|error| {
        serde::de::Error::custom(format!("{error}; write a duration such as \"10min\", or \"never\""))
    })
}

impl Config {
    /// Parses a configuration's text.
    ///
    /// # Errors
    /// The first thing wrong with it, with line, column and the line itself.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    /// Reads and parses a file.
    ///
    /// # Errors
    /// When it cannot be read or is not valid.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|message| ConfigError::Invalid { path: path.to_owned(), message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_all_defaults() {
        assert_eq!(Config::parse(""), Ok(Config::default()));
    }

    #[test]
    fn takes_what_is_documented() {
        let config = Config::parse(
            "[api]\nsocket = \"/tmp/x.sock\"\ngroup = \"ci\"\n[metrics]\nlisten = \"127.0.0.1:9821\"\n\
             [state]\ndirectory = \"/tmp/x\"\n[reclaim]\ngrace = \"2s\"\nterm_timeout = \"500ms\"\n[limits]\nleases = 3\n",
        )
        .expect("valid");
        assert_eq!(config.api.group.as_deref(), Some("ci"));
        assert_eq!(config.reclaim.term_timeout, Duration::from_millis(500));
        assert_eq!(config.reclaim.step_timeout, Duration::from_secs(10));
        assert_eq!(config.limits.leases, 3);
    }

    /// The configuration as it is shipped, with every line that is there to be changed.
    fn shipped_with_all_keys() -> String {
        let shipped = include_str!("../../../systemd/hostlerd.toml");
        let is_setting = |line: &str| {
            let key = line.split(" = ").next().unwrap_or_default();
            line == "[[policy]]"
                || line.contains(" = ") && !key.contains(|one: char| one != '_' && !one.is_ascii_lowercase())
        };
        let lines = shipped.lines().map(|line| match line.strip_prefix("# ") {
            Some(setting) if is_setting(setting) => setting,
            Some(_) | None => line,
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_shipped_file_shows_every_key_with_its_default() {
        let shipped = Config::parse(&shipped_with_all_keys()).expect("valid");
        let default = Config::default();
        assert_eq!(shipped.api.socket, default.api.socket);
        assert_eq!(
            (&shipped.state, &shipped.reclaim, &shipped.limits, &shipped.sweep, &shipped.protect),
            (&default.state, &default.reclaim, &default.limits, &default.sweep, &default.protect)
        );
        let usual = Config::parse(
            "[[policy]]\nname = \"stale loops of jenkins\"\nkind = \"loop\"\nbacking_under = \"/var/lib/jenkins\"\nuid = 1000\n\
             [[policy]]\nname = \"stale mounts of jenkins\"\nkind = \"mount\"\nmounted_under = \"/srv/ci\"\n",
        );
        assert_eq!(shipped.policy, usual.expect("valid").policy);
        // And each key is there.
        let text = shipped_with_all_keys();
        for key in [
            "socket",
            "group",
            "listen",
            "textfile",
            "directory",
            "grace",
            "term_timeout",
            "step_timeout",
            "lazy_after",
            "leases",
            "claims",
            "resources",
            "connections",
            "requests_per_second",
            "users",
            "interval",
            "name",
            "kind",
            "backing_under",
            "mounted_under",
            "uid",
            "min_age",
            "observations",
            "action",
            "uids",
        ] {
            assert!(text.lines().any(|line| line.starts_with(&format!("{key} = "))), "{key} is missing");
        }
        let as_it_is = Config::parse(include_str!("../../../systemd/hostlerd.toml")).expect("valid");
        assert_eq!(as_it_is.policy, []);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_what_is_allowed() {
        let error = Config::parse("[reclaim]\ngrace = \"1s\"\ngarce = \"2s\"\n").expect_err("unknown key");
        assert!(error.contains("line 3"), "{error}");
        assert!(error.contains("garce"), "{error}");
        assert!(error.contains("`grace`, `term_timeout`, `step_timeout`, `lazy_after`"), "{error}");
    }

    #[test]
    fn a_wrong_duration_says_how_to_write_one() {
        let error = Config::parse("[reclaim]\ngrace = \"soon\"\n").expect_err("no duration");
        assert!(error.contains("line 2") && error.contains("\"5s\""), "{error}");
    }
}
