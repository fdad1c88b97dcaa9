//! debian-installer: preseed files, and what goes into its initial file system.

use super::Rejected;
use crate::vm::argv::{CONTROL_PORT, GUEST_GATEWAY, MIRROR_PORT};

/// Where the mirror has what debian-installer asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Archive<'a> {
    /// The name of the archive with the suite itself.
    pub main: &'a str,
    /// The name of the archive with the security updates, if the mirror has those.
    pub security: Option<&'a str>,
    /// Whether the suite has its updates there too.
    pub has_updates: bool,
    /// The suite.
    pub suite: &'a str,
    /// What the installed system's `sources.list` is to be.
    pub sources: &'a str,
    /// Whether the archive is signed with other keys than Debian's, which are in the system then.
    pub own_keyring: bool,
}

/// A script in a place where debian-installer runs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// Its path, without a slash at the front.
    pub path: &'static str,
    /// Its text.
    pub text: String,
}

/// Looks for what debconf would reject (debconf-set-selections(1)): each line is a comment, or has an owner,
/// a question, a type and a value.
///
/// # Errors
/// The first line that it would reject.
pub fn check(text: &str) -> Result<(), Rejected> {
    const TYPES: [&str; 9] =
        ["boolean", "error", "multiselect", "note", "password", "select", "string", "text", "seen"];
    let mut continued = false;
    for (number, line) in (1..).zip(text.lines()) {
        let is_rest = continued;
        continued = line.ends_with('\\');
        let line = line.trim();
        if is_rest || line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split_whitespace();
        let (Some(_owner), Some(question), kind) = (words.next(), words.next(), words.next()) else {
            let message = "is no answer: write an owner, a question, a type and a value";
            return Err(Rejected::at(number, message));
        };
        let Some(kind) = kind else {
            return Err(Rejected::at(number, format!("question {question} has no type and no value")));
        };
        if !TYPES.contains(&kind) {
            let message =
                format!("{kind:?} is not a type of question {question}: allowed are {}", TYPES.join(", "));
            return Err(Rejected::at(number, message));
        }
        if matches!(kind, "boolean" | "seen") {
            let value = words.next().unwrap_or("");
            if !["true", "false"].contains(&value) {
                let message = format!("question {question} is {value:?}: it can be true or false");
                return Err(Rejected::at(number, message));
            }
        }
    }
    Ok(())
}

/// The answers with those of the build. Its own come last, and win.
#[must_use]
pub fn complete(answers: &str, archive: Archive<'_>) -> String {
    let server = format!("{GUEST_GATEWAY}:{MIRROR_PORT}");
    let mut text = answers.trim_end().to_owned();
    text.push_str("\n\n# The build's own: its mirror, and an end without a question.\n");
    let mut add = |line: &str| {
        text.push_str(line);
        text.push('\n');
    };
    add("d-i mirror/country string manual");
    add("d-i mirror/protocol string http");
    add(&format!("d-i mirror/http/hostname string {server}"));
    add(&format!("d-i mirror/http/directory string /{}", archive.main));
    add("d-i mirror/http/proxy string");
    add(&format!("d-i mirror/suite string {}", archive.suite));
    add(&format!("d-i mirror/udeb/suite string {}", archive.suite));
    let mut services = Vec::new();
    if let Some(security) = archive.security {
        services.push("security");
        add(&format!("d-i apt-setup/security_host string {server}"));
        add(&format!("d-i apt-setup/security_path string /{security}"));
    }
    if archive.has_updates {
        services.push("updates");
    }
    add(&format!("d-i apt-setup/services-select multiselect {}", services.join(", ")));
    add("d-i finish-install/reboot_in_progress note");
    add("d-i debian-installer/exit/poweroff boolean true");
    text
}

/// Arguments for the kernel. `auto` and `priority` have every question answered or defaulted; the console
/// is a serial one; the syslog goes to the build.
#[must_use]
pub fn arguments(hostname: &str) -> Vec<String> {
    [
        "auto=true",
        "priority=critical",
        "preseed/file=/preseed.cfg",
        // It has to name a country: else the installer asks for one.
        "locale=en_US.UTF-8",
        "keymap=us",
        "netcfg/choose_interface=auto",
        "netcfg/get_domain=",
        "DEBIAN_FRONTEND=text",
        "TERM=linux",
        "console=ttyS0",
        "panic=-1",
    ]
    .into_iter()
    .map(str::to_owned)
    .chain([
        format!("hostname={}", hostname.split('.').next().unwrap_or(hostname)),
        format!("log_host={GUEST_GATEWAY}"),
    ])
    .collect()
}

/// Scripts for debian-installer's initial file system. One keeps the control port and tells of each step;
/// one writes the installed system's sources; one gives the proof, after the target was unmounted.
#[must_use]
pub fn scripts(nonce: &str, archive: Archive<'_>) -> Vec<Script> {
    let quoted = |text: &str| text.replace('\'', r"'\''");
    vec![
        Script {
            path: "lib/debian-installer-startup.d/S11hostler",
            text: include_str!("guest/port.sh").replace("@FIND_PORT@", &super::find_port(CONTROL_PORT)),
        },
        Script {
            // Before the target is unmounted at 95.
            path: "usr/lib/finish-install.d/90hostler-sources",
            text: format!(
                "#!/bin/sh\n# The mirror of the build is not there any more when the system runs.\ncat >/target/etc/apt/sources.list <<'SOURCES'\n{}SOURCES\nexit 0\n",
                archive.sources
            ),
        },
        Script {
            path: "usr/lib/finish-install.d/98hostler-proof",
            text: include_str!("guest/proof.sh").replace("@NONCE@", &quoted(nonce)),
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARCHIVE: Archive<'static> = Archive {
        main: "debian",
        security: Some("debian-security"),
        has_updates: true,
        suite: "bookworm",
        sources: "deb http://mirror.test/debian bookworm main\n",
        own_keyring: false,
    };

    #[test]
    fn what_debconf_would_reject_is_found_before_the_boot() {
        assert_eq!(
            check("# x\n\nd-i a/b string\nd-i a/c boolean true\nd-i late_command string a; \\\n  b\n"),
            Ok(())
        );
        for (text, told) in [
            ("d-i a/b string x\nd-i\n", "line 2: is no answer"),
            ("d-i a/b\n", "line 1: question a/b has no type and no value"),
            ("d-i a/b sting x\n", "line 1: \"sting\" is not a type of question a/b: allowed are boolean"),
            ("d-i a/b boolean yes\n", "line 1: question a/b is \"yes\": it can be true or false"),
        ] {
            let error = check(text).unwrap_err().to_string();
            assert!(error.starts_with(told), "{error}");
        }
    }

    #[test]
    fn the_builds_own_answers_come_last_and_are_valid() {
        let text = complete("d-i mirror/http/hostname string x.test\n", ARCHIVE);
        let hosts: Vec<&str> = text.lines().filter(|line| line.contains("http/hostname")).collect();
        assert_eq!(hosts[1], "d-i mirror/http/hostname string 10.0.2.2:8080");
        assert!(text.contains("d-i apt-setup/services-select multiselect security, updates\n"));
        assert_eq!(check(&text), Ok(()));
    }

    #[test]
    fn only_the_last_script_knows_the_proof() {
        let scripts = scripts("5fe7", ARCHIVE);
        let with: Vec<&str> =
            scripts.iter().filter(|script| script.text.contains("5fe7")).map(|script| script.path).collect();
        assert_eq!(with, ["usr/lib/finish-install.d/98hostler-proof"]);
        assert!(scripts.iter().all(|script| !script.text.contains('@')));
    }
}
