//! anaconda: kickstart files.

use super::{Rejected, find_port};
use crate::vm::argv::CONTROL_PORT;

/// The name of the virtio port on which anaconda writes its log, if there is one of that name.
pub const LOG_PORT: &str = "org.fedoraproject.anaconda.log.0";

/// What has an end of its own.
const SECTIONS: [&str; 8] =
    ["%pre", "%pre-install", "%post", "%packages", "%addon", "%anaconda", "%onerror", "%traceback"];

/// Where the installer's own files and the packages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// A volume with this label.
    Label(&'a str),
    /// A tree at this address.
    Tree(&'a str),
}

/// Looks for what anaconda would reject at once: sections that do not end, and ends without a section; and
/// for what keeps the machine on.
///
/// # Errors
/// The first of them.
pub fn check(text: &str) -> Result<(), Rejected> {
    let mut open: Option<(usize, &str)> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let word = line.split_whitespace().next().unwrap_or("");
        if let Some((_, section)) = open {
            if word == "%end" {
                open = None;
            } else if SECTIONS.contains(&word) {
                return Err(Rejected::at(
                    number,
                    format!("{word} begins before {section} ended: write %end"),
                ));
            }
            continue;
        }
        match word {
            "%end" => return Err(Rejected::at(number, "%end ends no section")),
            "%include" | "%ksappend" => {}
            _ if SECTIONS.contains(&word) => open = Some((number, word)),
            _ if word.starts_with('%') => {
                let message = format!("{word} is no section: allowed are {}, %include", SECTIONS.join(", "));
                return Err(Rejected::at(number, message));
            }
            _ => {}
        }
    }
    if let Some((number, section)) = open {
        return Err(Rejected::at(number, format!("{section} does not end: write %end after it")));
    }
    match commands(text).find(|(_, word)| *word == "halt") {
        Some((number, _)) => {
            Err(Rejected::at(number, "halt leaves the machine on for ever: write poweroff, or nothing"))
        }
        None => Ok(()),
    }
}

/// The words that begin the commands, outside of all sections, with their lines' numbers.
fn commands(answers: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_inside = false;
    answers.lines().enumerate().filter_map(move |(index, line)| {
        let word = line.split_whitespace().next()?;
        match word {
            "%end" => is_inside = false,
            _ if SECTIONS.contains(&word) => is_inside = true,
            _ if !is_inside => return Some((index + 1, word)),
            _ => {}
        }
        None
    })
}

/// The answers with the build's own: an end without a question, and the proof as the last of all scripts,
/// after the installed system's files were written to the disk.
#[must_use]
pub fn complete(answers: &str, nonce: &str) -> String {
    let mut text = answers.trim_end().to_owned();
    text.push_str("\n\n# The build's own: an end without a question, and the proof.\n");
    if !commands(answers).any(|(_, word)| matches!(word, "poweroff" | "shutdown" | "reboot")) {
        text.push_str("poweroff\n");
    }
    text.push_str(&format!(
        "%post --nochroot --erroronfail\nsync\n{}\n[ -c \"$port\" ] || exit 1\necho 'stage proof' >\"$port\"\necho 'done {nonce}' >\"$port\"\n%end\n",
        find_port(CONTROL_PORT)
    ));
    text
}

/// Arguments for the kernel: the answers are in the initial file system.
#[must_use]
pub fn arguments(source: Source<'_>) -> Vec<String> {
    let mut arguments: Vec<String> =
        ["inst.ks=file:/ks.cfg", "inst.text", "inst.sshd=0", "console=ttyS0", "panic=-1"]
            .into_iter()
            .map(str::to_owned)
            .collect();
    match source {
        Source::Label(label) => {
            // As dracut writes what a label must not have.
            let label = label.replace(' ', "\\x20");
            arguments.push(format!("inst.stage2=hd:LABEL={label}"));
            arguments.push(format!("inst.repo=hd:LABEL={label}"));
        }
        Source::Tree(address) => {
            arguments.push("ip=dhcp".to_owned());
            arguments.push(format!("inst.stage2={address}"));
            arguments.push(format!("inst.repo={address}"));
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_have_to_end() {
        assert_eq!(check("lang C\n%packages\n@core\n%end\n%post\n# %x\n%end\n%include /tmp/x\n"), Ok(()));
        for (text, told) in [
            ("lang C\n%packages\n@core\n", "line 2: %packages does not end"),
            ("%post\n%packages\n%end\n", "line 2: %packages begins before %post ended"),
            ("%end\n", "line 1: %end ends no section"),
            ("%pakages\n%end\n", "line 1: %pakages is no section: allowed are %pre"),
        ] {
            let error = check(text).unwrap_err().to_string();
            assert!(error.starts_with(told), "{error}");
        }
    }

    #[test]
    fn the_proof_is_the_last_script_and_the_end_is_the_users_if_he_wants_one() {
        let text = complete("%post\ntrue\n%end\n", "5fe7");
        assert_eq!(check(&text), Ok(()));
        assert!(text.contains("\npoweroff\n"));
        assert!(text.trim_end().ends_with("echo 'done 5fe7' >\"$port\"\n%end"));
        assert!(!complete("reboot --eject\n", "5fe7").contains("poweroff"));
        // What a script does is no answer.
        assert!(complete("%post\nreboot\n%end\n", "5fe7").contains("\npoweroff\n"));
        assert!(check("halt\n").unwrap_err().to_string().contains("write poweroff"));
    }

    #[test]
    fn a_label_with_a_space_is_written_as_dracut_reads_it() {
        let arguments = arguments(Source::Label("Fedora S 40"));
        assert!(arguments.contains(&r"inst.stage2=hd:LABEL=Fedora\x20S\x2040".to_owned()));
    }
}
