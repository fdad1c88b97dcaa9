//! cloud-init's configuration, and subiquity's in it: YAML.

use serde_yaml_ng::{Mapping, Value};

use super::{Rejected, find_port};
use crate::vm::argv::CONTROL_PORT;

/// Reads a `#cloud-config`.
///
/// # Errors
/// It has another first line, or is no YAML mapping.
fn read(text: &str) -> Result<Mapping, Rejected> {
    if text.lines().next().map(str::trim_end) != Some("#cloud-config") {
        return Err(Rejected::at(1, "the first line must be #cloud-config, or cloud-init ignores the file"));
    }
    match serde_yaml_ng::from_str(text) {
        Ok(Value::Mapping(mapping)) => Ok(mapping),
        Ok(_) => Err(Rejected { line: None, message: "the file is no mapping of keys to values".to_owned() }),
        Err(error) => {
            let line = error.location().map(|location| location.line());
            Err(Rejected { line, message: format!("this is no YAML: {error}") })
        }
    }
}

/// As JSON, which is YAML of every version: who reads it takes `yes`, `22:22` or `2032-09-01` without quotes
/// for something else than text.
fn write(mapping: &Mapping) -> Result<String, Rejected> {
    match serde_json::to_string_pretty(mapping) {
        Ok(text) => Ok(format!("#cloud-config\n{text}\n")),
        Err(error) => {
            Err(Rejected { line: None, message: format!("the answers cannot be written anew: {error}") })
        }
    }
}

/// The list under `key`, which is made where it is missing.
fn list<'a>(mapping: &'a mut Mapping, key: &str) -> Result<&'a mut Vec<Value>, Rejected> {
    match mapping.entry(Value::from(key)).or_insert_with(|| Value::Sequence(Vec::new())) {
        Value::Sequence(list) => Ok(list),
        _ => Err(Rejected { line: None, message: format!("{key} has to be a list") }),
    }
}

/// Checks autoinstall answers.
///
/// # Errors
/// What subiquity would reject at once.
pub fn check_autoinstall(text: &str) -> Result<(), Rejected> {
    autoinstall(text, "").map(drop)
}

/// Autoinstall answers with the proof as the last of their late commands.
///
/// # Errors
/// As above.
pub fn autoinstall(text: &str, nonce: &str) -> Result<String, Rejected> {
    let mut mapping = read(text)?;
    let rejected = |message: &str| Rejected { line: None, message: message.to_owned() };
    let Some(Value::Mapping(answers)) = mapping.get_mut("autoinstall") else {
        return Err(rejected("there is no mapping autoinstall: in it are subiquity's answers"));
    };
    match answers.get("version") {
        Some(version) if version.as_u64() == Some(1) => {}
        _ => return Err(rejected("autoinstall.version has to be 1")),
    }
    let proof = format!(
        "sync; {}; [ -c \"$port\" ] && echo 'stage proof' >\"$port\" && echo 'done {nonce}' >\"$port\"",
        find_port(CONTROL_PORT)
    );
    list(answers, "late-commands")?.push(Value::from(proof));
    answers.entry(Value::from("shutdown")).or_insert_with(|| Value::from("poweroff"));
    write(&mapping)
}

/// Arguments for the kernel of a live system with subiquity; the answers are on the volume `CIDATA`.
#[must_use]
pub fn autoinstall_arguments() -> Vec<String> {
    ["autoinstall", "ds=nocloud", "console=ttyS0", "panic=-1"].into_iter().map(str::to_owned).collect()
}

/// Checks the user-data of a cloud image.
///
/// # Errors
/// What cloud-init would reject at once.
pub fn check_user_data(text: &str) -> Result<(), Rejected> {
    user_data(text, "").map(drop)
}

/// A cloud image's user-data with a proof after cloud-init's last stage, and only if none of its modules
/// failed. What this adds lies in `/run`, and cloud-init's own records are removed, so that the image is as
/// fresh for its next user as it was for this build.
///
/// # Errors
/// As above.
pub fn user_data(text: &str, nonce: &str) -> Result<String, Rejected> {
    let mut mapping = read(text)?;
    let file = |path: &str, mode: &str, content: String| {
        let mut file = Mapping::new();
        file.insert(Value::from("path"), Value::from(path));
        file.insert(Value::from("permissions"), Value::from(mode));
        file.insert(Value::from("content"), Value::from(content));
        Value::Mapping(file)
    };
    let script = include_str!("guest/cloud-proof.sh")
        .replace("@FIND_PORT@", &find_port(CONTROL_PORT))
        .replace("@NONCE@", nonce);
    list(&mut mapping, "write_files")?.extend([
        file("/run/hostler/proof", "0755", script),
        file("/run/systemd/system/hostler-proof.service", "0644", UNIT.to_owned()),
    ]);
    // First, as all of them are one script, which fails as its last command does; what is started waits for
    // the end of all.
    let start = "systemctl daemon-reload && systemctl start --no-block hostler-proof.service";
    list(&mut mapping, "runcmd")?.insert(0, Value::from(start));
    write(&mapping)
}

/// Waits for the stage in which it is started itself.
const UNIT: &str = "[Unit]\nDescription=Prove to the image builder that cloud-init is done\nAfter=cloud-final.service\n\n[Service]\nType=oneshot\nExecStart=/bin/sh /run/hostler/proof\n";

/// The instance that cloud-init takes the machine for.
#[must_use]
pub fn meta_data(name: &str, hostname: &str) -> String {
    format!("instance-id: hostler-{name}\nlocal-hostname: {hostname}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proof_is_the_last_late_command() {
        let text = "#cloud-config\nautoinstall:\n  version: 1\n  late-commands:\n    - echo mine\n";
        let complete = autoinstall(text, "5fe7").unwrap();
        let read: Value = serde_yaml_ng::from_str(&complete).unwrap();
        let commands = read["autoinstall"]["late-commands"].as_sequence().unwrap();
        assert_eq!(commands[0].as_str(), Some("echo mine"));
        assert!(commands[1].as_str().unwrap().contains("done 5fe7"));
        assert_eq!(read["autoinstall"]["shutdown"].as_str(), Some("poweroff"));
        assert!(complete.starts_with("#cloud-config\n"));
    }

    #[test]
    fn what_would_be_rejected_is_told_with_its_line() {
        for (text, told) in [
            ("autoinstall:\n", "line 1: the first line must be #cloud-config"),
            ("#cloud-config\nautoinstall:\n  version: 1\n bad: [\n", "line "),
            ("#cloud-config\n- a\n", "the file is no mapping"),
            ("#cloud-config\nusers: []\n", "there is no mapping autoinstall"),
            ("#cloud-config\nautoinstall: {}\n", "autoinstall.version has to be 1"),
            (
                "#cloud-config\nautoinstall: {version: 1, late-commands: x}\n",
                "late-commands has to be a list",
            ),
        ] {
            let error = check_autoinstall(text).unwrap_err().to_string();
            assert!(error.starts_with(told), "{error}");
        }
        assert!(check_user_data("#cloud-config\nruncmd: 3\n").is_err());
    }

    #[test]
    fn a_users_own_files_and_commands_stay_and_come_first() {
        let text = "#cloud-config\npackages: [less]\nruncmd:\n - [touch, /etc/x]\nwrite_files:\n - path: /a\n   content: b\n";
        let complete = user_data(text, "5fe7").unwrap();
        let read: Value = serde_yaml_ng::from_str(&complete).unwrap();
        assert_eq!(read["packages"][0].as_str(), Some("less"));
        // The last command is the user's, since how it ends is how all of them end.
        assert!(read["runcmd"][0].as_str().unwrap().contains("hostler-proof"));
        assert_eq!(read["runcmd"][1][1].as_str(), Some("/etc/x"));
        assert_eq!(read["write_files"][0]["path"].as_str(), Some("/a"));
        let text = "#cloud-config\nusers:\n - expiredate: '2032-09-01'\n   gecos: \"yes\"\n";
        let complete = user_data(text, "5fe7").unwrap();
        assert!(complete.contains("\"2032-09-01\"") && complete.contains("\"yes\""), "{complete}");
        assert_eq!(complete.matches("5fe7").count(), 1);
    }
}
