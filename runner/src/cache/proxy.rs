//! Which proxy the downloads of this host take.
//!
//! [`Proxies::choose`] is pure: environment and apt's configuration come in as text. The environment wins over apt's
//! configuration, as it does for apt itself.

use std::time::Duration;

use crate::child::HostTool;
use crate::stop::Stop;

use super::fetch_error::FetchError;

const APT_CONFIG: HostTool = HostTool { name: "apt-config", package: "apt" };

/// How long `apt-config` may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// Proxies for downloads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies {
    /// For `http:` addresses.
    pub http: Option<String>,
    /// For `https:` addresses.
    pub https: Option<String>,
    /// Hosts that are reached directly, in the form of the variable `no_proxy`.
    pub except: Option<String>,
}

impl Proxies {
    /// Those of this host: by this process's environment, else by apt's configuration. A host without
    /// apt, or whose apt-config fails, has only its environment.
    #[must_use]
    pub fn of_host(stop: &Stop) -> Self {
        let dump = APT_CONFIG
            .find()
            .and_then(|tool| tool.argument("dump").run(DEADLINE, stop))
            .map(|finished| String::from_utf8_lossy(&finished.stdout).into_owned())
            .unwrap_or_default();
        Self::choose(|name| std::env::var(name).ok(), &dump)
    }

    /// Decides from the environment and from the output of `apt-config dump`.
    #[must_use]
    pub fn choose(variable: impl Fn(&str) -> Option<String>, apt_configuration: &str) -> Self {
        let set =
            |names: &[&str]| names.iter().find_map(|name| variable(name)).filter(|value| !value.is_empty());
        let apt = |name: &str| {
            apt_configuration
                .lines()
                .filter_map(|line| line.split_once(' '))
                .filter(|(option, _)| option.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim().trim_end_matches(';').trim_matches('"'))
                .rfind(|value| !value.is_empty() && !value.eq_ignore_ascii_case("DIRECT"))
                .map(str::to_owned)
        };
        let http = set(&["http_proxy"]).or_else(|| apt("Acquire::http::Proxy"));
        // apt takes http's proxy for https too, unless told otherwise (apt-transport-https(1)).
        let https = set(&["https_proxy", "HTTPS_PROXY"])
            .or_else(|| apt("Acquire::https::Proxy"))
            .or_else(|| apt("Acquire::http::Proxy"));
        Self { http, https, except: set(&["no_proxy", "NO_PROXY"]) }
    }

    /// In the form the HTTP client takes.
    pub(super) fn for_client(&self) -> Result<Vec<reqwest::Proxy>, FetchError> {
        let except = || self.except.as_deref().and_then(reqwest::NoProxy::from_string);
        let wrong = |source| FetchError::Client { source };
        let mut proxies = Vec::new();
        if let Some(address) = &self.http {
            proxies.push(reqwest::Proxy::http(address).map_err(wrong)?.no_proxy(except()));
        }
        if let Some(address) = &self.https {
            proxies.push(reqwest::Proxy::https(address).map_err(wrong)?.no_proxy(except()));
        }
        Ok(proxies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_wins_over_apt() {
        let apt =
            "APT \"\";\nAcquire::http::Proxy \"http://apt.test:3142\";\nAcquire::https::Proxy \"DIRECT\";\n";
        let from = |set: &[(&str, &str)]| {
            let set: Vec<(String, String)> =
                set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            Proxies::choose(
                |name| set.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()),
                apt,
            )
        };
        assert_eq!(from(&[]).http.as_deref(), Some("http://apt.test:3142"));
        assert_eq!(from(&[("http_proxy", "http://e.test")]).http.as_deref(), Some("http://e.test"));
        assert_eq!(from(&[("no_proxy", "x.test")]).except.as_deref(), Some("x.test"));
        assert_eq!(Proxies::choose(|_| None, ""), Proxies::default());
    }
}
