//! The second disk: what the machine is to do, and the files that it needs for that.
//!
//! An ext4 file system made with `mke2fs -d`, so neither root nor a mount is needed. The machine mounts
//! it read-only on /mnt, and runs its `start`.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context as _;
use hostler_runner::child::HostTool;
use hostler_runner::stop::Stop;

/// The name of the step that is the command, as `start` tells it.
pub(crate) const COMMAND: &str = "command";
/// What the machine runs first.
const START: &str = include_str!("../start.sh");
/// How long `mke2fs` may take.
const MAKE_DEADLINE: Duration = Duration::from_secs(120);
const MEBIBYTE: u64 = 1 << 20;

/// A file for the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Put {
    file: PathBuf,
    name: PathBuf,
}

impl FromStr for Put {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (file, name) = text.rsplit_once('=').ok_or("write FILE=NAME")?;
        let name = PathBuf::from(name);
        let plain = name.components().all(|part| matches!(part, Component::Normal(_)));
        if file.is_empty() || name.as_os_str().is_empty() || !plain {
            return Err(format!("{text:?} is not FILE=NAME with a relative NAME without '..'"));
        }
        Ok(Self { file: file.into(), name })
    }
}

/// What is to be done.
pub(crate) struct Work<'a> {
    /// The files.
    pub(crate) puts: &'a [Put],
    /// The environment of the command.
    pub(crate) environment: &'a [(&'a str, String)],
    /// The command.
    pub(crate) command: &'a [String],
}

/// Writes the disk into `scratch`. Its path.
pub(crate) fn write(work: &Work<'_>, scratch: &Path, stop: &Stop) -> anyhow::Result<PathBuf> {
    let tree = scratch.join("payload");
    fs::create_dir(&tree).with_context(|| format!("making {}", tree.display()))?;
    fs::set_permissions(&tree, Permissions::from_mode(0o755))?;
    let mut size = 0;
    for put in work.puts {
        let target = tree.join(&put.name);
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        // With its permissions.
        size += fs::copy(&put.file, &target)
            .with_context(|| format!("copying {} for the machine", put.file.display()))?;
    }
    for (name, text, mode) in
        [("start", START, 0o755), (COMMAND, &script(work.environment, work.command), 0o644)]
    {
        let path = tree.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        fs::set_permissions(&path, Permissions::from_mode(mode))?;
    }
    let disk = scratch.join("payload.img");
    let file = fs::File::create(&disk).with_context(|| format!("making {}", disk.display()))?;
    // A quarter more than the files, and some for the file system itself.
    file.set_len((size + size / 4).next_multiple_of(MEBIBYTE) + 16 * MEBIBYTE)?;
    let mke2fs = HostTool { name: "mke2fs", package: "e2fsprogs" }.find()?;
    let options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0", "-d"];
    let mke2fs = mke2fs.arguments(options).argument(&tree).argument(&disk);
    mke2fs.run(MAKE_DEADLINE, stop)?.success().context("writing the disk with the tests")?;
    fs::remove_dir_all(&tree).with_context(|| format!("removing {}", tree.display()))?;
    Ok(disk)
}

/// The command as a script for bash.
fn script(environment: &[(&str, String)], command: &[String]) -> String {
    let variables = environment.iter().map(|(name, value)| format!("export {name}={}\n", quoted(value)));
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    format!("{}cd /mnt && exec {}\n", variables.collect::<String>(), words.join(" "))
}

/// A word for a shell, whatever is in it.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_goes_below_the_disks_root_only() {
        let put: Put = "a=b/c=deps/d".parse().unwrap();
        assert_eq!((put.file, put.name), ("a=b/c".into(), "deps/d".into()));
        for text in ["x", "x=", "=x", "x=/etc/passwd", "x=../y", "x=a/../b"] {
            assert!(text.parse::<Put>().is_err(), "{text}");
        }
    }

    #[test]
    fn words_reach_the_command_as_they_are() {
        let text = script(&[("A", "x y".into())], &["echo".into(), "it's $HOME".into()]);
        assert_eq!(text, "export A='x y'\ncd /mnt && exec 'echo' 'it'\\''s $HOME'\n");
    }
}
