//! `[sweep]`, `[[policy]]` and `[protect]`: what is done with what no lease has.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hostler_protocol::text::printable;
use serde::{Deserialize, Deserializer};

use super::duration;
use crate::model::{Action, Criterion, Rule};

/// The shortest time between sweeps: each wakes the host up.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
/// The longest name of a rule, in bytes. It becomes part of a lease's name.
const NAME_LIMIT: usize = 100;

/// `[sweep]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sweep {
    /// How often the host is looked at although nothing seems to have happened.
    #[serde(deserialize_with = "interval")]
    pub interval: Duration,
}

impl Default for Sweep {
    fn default() -> Self {
        Self { interval: Duration::from_secs(300) }
    }
}

fn interval<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let interval = duration(deserializer)?;
    if interval < SHORTEST_INTERVAL {
        return Err(serde::de::Error::custom("sweeps are at least \"1s\" apart; \"5min\" is usual"));
    }
    Ok(interval)
}

/// `[protect]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Protect {
    /// Loop devices of files below these directories.
    #[serde(deserialize_with = "directories")]
    pub backing_under: Vec<PathBuf>,
    /// Mounts on and below these directories.
    #[serde(deserialize_with = "directories")]
    pub mounted_under: Vec<PathBuf>,
    /// Loop devices of these users' files.
    pub uids: Vec<u32>,
}

impl Protect {
    /// What a look has to find.
    #[must_use]
    pub fn criteria(&self) -> Vec<Criterion> {
        let backed = |path: &PathBuf| Criterion::Loop { backing_under: Some(path.clone()), uid: None };
        let mounted = |path: &PathBuf| Criterion::Mount { mounted_under: path.clone() };
        let owned = |uid: &u32| Criterion::Loop { backing_under: None, uid: Some(*uid) };
        let directories = self.backing_under.iter().map(backed).chain(self.mounted_under.iter().map(mounted));
        directories.chain(self.uids.iter().map(owned)).collect()
    }
}

/// `[[policy]]` as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRule {
    name: String,
    kind: WrittenKind,
    #[serde(default, deserialize_with = "optional_directory")]
    backing_under: Option<PathBuf>,
    #[serde(default, deserialize_with = "optional_directory")]
    mounted_under: Option<PathBuf>,
    #[serde(default)]
    uid: Option<u32>,
    #[serde(default = "usual_age", deserialize_with = "duration")]
    min_age: Duration,
    #[serde(default = "usual_observations")]
    observations: u32,
    #[serde(default)]
    action: Action,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum WrittenKind {
    Loop,
    Mount,
}

fn usual_age() -> Duration {
    Duration::from_secs(6 * 3600)
}

fn usual_observations() -> u32 {
    3
}

impl TryFrom<WrittenRule> for Rule {
    type Error = String;

    fn try_from(written: WrittenRule) -> Result<Self, String> {
        let name = printable(written.name.as_bytes());
        if name.is_empty() || name.len() > NAME_LIMIT {
            return Err(format!("a rule's name has 1 to {NAME_LIMIT} bytes"));
        }
        let of_rule = |wrong: &str| format!("rule \"{name}\": {wrong}");
        let criterion = match (written.kind, written.backing_under, written.mounted_under, written.uid) {
            (WrittenKind::Loop, None, None, None) => {
                return Err(of_rule("kind = \"loop\" needs backing_under, uid, or both"));
            }
            (WrittenKind::Loop, backing_under, None, uid) => Criterion::Loop { backing_under, uid },
            (WrittenKind::Loop, _, Some(_), _) => {
                return Err(of_rule(
                    "mounted_under is for kind = \"mount\"; kind = \"loop\" takes backing_under and uid",
                ));
            }
            (WrittenKind::Mount, None, Some(mounted_under), None) => Criterion::Mount { mounted_under },
            (WrittenKind::Mount, None, None, None) => {
                return Err(of_rule("kind = \"mount\" needs mounted_under"));
            }
            (WrittenKind::Mount, ..) => {
                return Err(of_rule(
                    "backing_under and uid are for kind = \"loop\"; kind = \"mount\" takes mounted_under",
                ));
            }
        };
        let directory = match &criterion {
            Criterion::Loop { backing_under, .. } => backing_under.as_deref(),
            Criterion::Mount { mounted_under } => Some(mounted_under.as_path()),
        };
        if directory == Some(Path::new("/")) {
            return Err(of_rule(
                "everything lies below the root directory; name the directory that jobs work in",
            ));
        }
        if written.observations == 0 {
            return Err(of_rule("observations is at least 1"));
        }
        let WrittenRule { min_age, observations, action, .. } = written;
        Ok(Self { name, criterion, min_age, observations, action })
    }
}

/// Every rule, each with a name of its own.
pub(super) fn rules<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Rule>, D::Error> {
    let rules = Vec::<CheckedRule>::deserialize(deserializer)?;
    let rules: Vec<Rule> = rules.into_iter().map(|CheckedRule(rule)| rule).collect();
    for (at, rule) in rules.iter().enumerate() {
        if rules[..at].iter().any(|other| other.name == rule.name) {
            let wrong = format!("two rules are called \"{}\"; give each a name of its own", rule.name);
            return Err(serde::de::Error::custom(wrong));
        }
    }
    Ok(rules)
}

/// A rule that is read as it is written, so that an error has the line of its table.
struct CheckedRule(Rule);

impl<'de> Deserialize<'de> for CheckedRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = WrittenRule::deserialize(deserializer)?;
        Rule::try_from(written).map(Self).map_err(serde::de::Error::custom)
    }
}

fn optional_directory<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    checked(&PathBuf::deserialize(deserializer)?).map(Some).map_err(serde::de::Error::custom)
}

fn directories<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    let paths = Vec::<PathBuf>::deserialize(deserializer)?;
    paths.iter().map(|path| checked(path)).collect::<Result<_, _>>().map_err(serde::de::Error::custom)
}

/// The path without what only looks different: a slash at the end, `//`, `/./`.
fn checked(path: &Path) -> Result<PathBuf, String> {
    let is_plain = path.is_absolute() && !path.components().any(|part| part == Component::ParentDir);
    if is_plain {
        Ok(path.components().collect())
    } else {
        let shown = printable(path.as_os_str().as_encoded_bytes());
        Err(format!("\"{shown}\" is no absolute path without \"..\"; write it from the root"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    #[test]
    fn takes_what_is_documented() {
        let config = Config::parse(
            "[sweep]\ninterval = \"1min\"\n\
             [[policy]]\nname = \"stale loops\"\nkind = \"loop\"\nbacking_under = \"/srv/ci/\"\nuid = 1000\n\
             min_age = \"1h\"\nobservations = 2\naction = \"reclaim\"\n\
             [[policy]]\nname = \"mounts\"\nkind = \"mount\"\nmounted_under = \"/srv/ci\"\n\
             [protect]\nbacking_under = [\"/srv/vm\"]\nmounted_under = [\"/srv\"]\nuids = [0]\n",
        )
        .expect("valid");
        assert_eq!(config.sweep.interval, Duration::from_secs(60));
        let loops = Criterion::Loop { backing_under: Some(PathBuf::from("/srv/ci")), uid: Some(1000) };
        let expected = [
            Rule {
                name: "stale loops".to_owned(),
                criterion: loops,
                min_age: Duration::from_secs(3600),
                observations: 2,
                action: Action::Reclaim,
            },
            Rule {
                name: "mounts".to_owned(),
                criterion: Criterion::Mount { mounted_under: PathBuf::from("/srv/ci") },
                min_age: Duration::from_secs(6 * 3600),
                observations: 3,
                action: Action::Observe,
            },
        ];
        assert_eq!(config.policy, expected);
        let protected = config.protect.criteria();
        let named: Vec<String> = protected.iter().map(ToString::to_string).collect();
        assert_eq!(named, ["backing_under /srv/vm", "mounted_under /srv", "uid 0"]);
    }

    #[test]
    fn without_rules_nothing_is_done() {
        let config = Config::parse("").expect("valid");
        assert_eq!((config.sweep.interval, config.policy.len()), (Duration::from_secs(300), 0));
        assert_eq!(config.protect.criteria(), []);
    }

    #[track_caller]
    fn assert_refused(text: &str, parts: &[&str]) {
        let error = Config::parse(text).expect_err("wrong");
        for part in parts {
            assert!(error.contains(part), "{part} is missing from: {error}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_what_is_allowed() {
        let rule = |rest: &str| format!("[state]\n[[policy]]\nname = \"x\"\n{rest}");
        assert_refused(&rule("kind = \"nbd\"\n"), &["line 4", "nbd", "`loop`", "`mount`"]);
        assert_refused(&rule("kind = \"loop\"\n"), &["line 2", "needs backing_under, uid, or both"]);
        assert_refused(&rule("kind = \"mount\"\n"), &["needs mounted_under"]);
        assert_refused(
            &rule("kind = \"loop\"\nmounted_under = \"/a\"\n"),
            &["line 2", "\"x\"", "takes backing_under and uid"],
        );
        assert_refused(
            &rule("kind = \"mount\"\nmounted_under = \"/a\"\nuid = 1\n"),
            &["takes mounted_under"],
        );
        assert_refused(&rule("kind = \"loop\"\nbacking_under = \"a\"\n"), &["line 5", "from the root"]);
        assert_refused(&rule("kind = \"loop\"\nbacking_under = \"/a/../b\"\n"), &["line 5", "\"..\""]);
        assert_refused(&rule("kind = \"loop\"\nbacking_under = \"/\"\n"), &["that jobs work in"]);
        assert_refused(&rule("kind = \"loop\"\nuid = 1\nobservations = 0\n"), &["at least 1"]);
        assert_refused(&rule("kind = \"loop\"\nuid = 1\nmin_age = \"old\"\n"), &["line 6", "\"5s\""]);
        assert_refused(&rule("kind = \"loop\"\nuid = 1\naction = \"kill\"\n"), &["line 6", "`quarantine`"]);
        assert_refused(&rule("kind = \"loop\"\nuid = 1\nmin_aeg = \"1h\"\n"), &["line 6", "`min_age`"]);
        let twice = rule("kind = \"loop\"\nuid = 1\n[[policy]]\nname = \"x\"\nkind = \"loop\"\nuid = 2\n");
        assert_refused(&twice, &["two rules are called \"x\""]);
        assert_refused("[sweep]\ninterval = \"500ms\"\n", &["line 2", "\"1s\""]);
        assert_refused("[protect]\nmounted_under = \"/srv\"\n", &["line 2", "sequence"]);
        assert_refused("[protect]\nusers = [0]\n", &["line 2", "`uids`"]);
    }
}
