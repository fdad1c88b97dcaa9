//! Unattended installations: what an installer is given, per family.
//!
//! Pure: the user's answers go in, and come out with what this build adds to them: where the mirror is, and
//! the proof that the installation came to its very end. [`preseed`] is for debian-installer, [`kickstart`]
//! for anaconda, [`cloud`] for subiquity and for cloud images. Nothing of the user's is overridden that a
//! build can do without. Deliberately absent: reading media, and booting.

pub mod cloud;
pub mod kickstart;
pub mod preseed;

/// An answers file that an installer would reject.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", line.map_or(String::new(), |line| format!("line {line}: ")))]
pub struct Rejected {
    /// In which line, from 1.
    pub line: Option<usize>,
    /// Why, and what is allowed.
    pub message: String,
}

impl Rejected {
    fn at(line: usize, message: impl Into<String>) -> Self {
        Self { line: Some(line), message: message.into() }
    }
}

/// Shell text that finds the virtio port of this name, as `$port`; or leaves that empty.
fn find_port(name: &str) -> String {
    format!(
        "port=; for directory in /sys/class/virtio-ports/*; do if [ \"$(cat $directory/name 2>/dev/null)\" = {name} ]; then port=/dev/${{directory##*/}}; fi; done"
    )
}
