//! The classes of failure: one closed set for everything that a build can end in.
//!
//! A class is a word that scripts, dashboards and people agree on, so a new one is a decision and a
//! renamed one breaks somebody. Deliberately absent: how a class is found, and any text about one
//! particular failure.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of failure ended a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// The guest's kernel gave up.
    KernelPanic,
    /// The guest ran out of memory.
    OutOfMemory,
    /// A file system in the guest is full.
    DiskFull,
    /// The guest lost its disk, or its file system is broken.
    DiskError,
    /// A download failed, of the host or of the guest.
    DownloadFailed,
    /// The guest asked for more than may be downloaded for it.
    DownloadLimit,
    /// The installer could not use its answers (preseed, kickstart, autoinstall).
    AnswersRejected,
    /// The guest waits for somebody to answer a question.
    WaitingForInput,
    /// The installer says that it failed.
    InstallerError,
    /// The guest gave up starting and offers a shell.
    EmergencyShell,
    /// The guest never started to boot.
    BootFailed,
    /// A step of the builder guest ended with a status other than 0.
    StepFailed,
    /// The guest showed no sign of progress for too long.
    Stalled,
    /// The build was not done within its total limit.
    Timeout,
    /// The guest printed more than any sane one does.
    ConsoleFlood,
    /// The guest claimed to be done, or looked like it, without the right proof.
    NoProof,
    /// qemu ended before the guest was done.
    QemuDied,
    /// qemu does not answer.
    QemuUnresponsive,
    /// This host's disk is full.
    HostDiskFull,
    /// This host's disk gave an error.
    HostDiskError,
    /// This host is not fit to build on.
    HostUnfit,
    /// A file that the recipe names cannot be used.
    RecipeFiles,
    /// A file or directory on this host could not be made, written or removed.
    HostFiles,
    /// The watchdog refused something.
    WatchdogRefused,
    /// The download cache is not usable.
    CacheUnusable,
    /// The packages could not be chosen.
    PackagesRefused,
    /// The image's disk could not be composed.
    ComposeFailed,
    /// A machine could not be started or watched.
    MachineFailed,
    /// The finished disk could not be converted.
    ImageFailed,
    /// Someone wanted it to stop.
    Cancelled,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 30] = [
        Self::KernelPanic,
        Self::OutOfMemory,
        Self::DiskFull,
        Self::DiskError,
        Self::DownloadFailed,
        Self::DownloadLimit,
        Self::AnswersRejected,
        Self::WaitingForInput,
        Self::InstallerError,
        Self::EmergencyShell,
        Self::BootFailed,
        Self::StepFailed,
        Self::Stalled,
        Self::Timeout,
        Self::ConsoleFlood,
        Self::NoProof,
        Self::QemuDied,
        Self::QemuUnresponsive,
        Self::HostDiskFull,
        Self::HostDiskError,
        Self::HostUnfit,
        Self::RecipeFiles,
        Self::HostFiles,
        Self::WatchdogRefused,
        Self::CacheUnusable,
        Self::PackagesRefused,
        Self::ComposeFailed,
        Self::MachineFailed,
        Self::ImageFailed,
        Self::Cancelled,
    ];

    /// The word that logs, documents and scripts use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KernelPanic => "kernel_panic",
            Self::OutOfMemory => "out_of_memory",
            Self::DiskFull => "disk_full",
            Self::DiskError => "disk_error",
            Self::DownloadFailed => "download_failed",
            Self::DownloadLimit => "download_limit",
            Self::AnswersRejected => "answers_rejected",
            Self::WaitingForInput => "waiting_for_input",
            Self::InstallerError => "installer_error",
            Self::EmergencyShell => "emergency_shell",
            Self::BootFailed => "boot_failed",
            Self::StepFailed => "step_failed",
            Self::Stalled => "stalled",
            Self::Timeout => "timeout",
            Self::ConsoleFlood => "console_flood",
            Self::NoProof => "no_proof",
            Self::QemuDied => "qemu_died",
            Self::QemuUnresponsive => "qemu_unresponsive",
            Self::HostDiskFull => "host_disk_full",
            Self::HostDiskError => "host_disk_error",
            Self::HostUnfit => "host_unfit",
            Self::RecipeFiles => "recipe_files",
            Self::HostFiles => "host_files",
            Self::WatchdogRefused => "watchdog_refused",
            Self::CacheUnusable => "cache_unusable",
            Self::PackagesRefused => "packages_refused",
            Self::ComposeFailed => "compose_failed",
            Self::MachineFailed => "machine_failed",
            Self::ImageFailed => "image_failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// What to do next, in one sentence.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::KernelPanic => "read the lines above the panic; try more [guest] memory or another kernel",
            Self::OutOfMemory => "raise [guest] memory in the recipe",
            Self::DiskFull => "raise [image] size in the recipe, or install less",
            Self::DiskError => "build again; if it comes back, look at this host's disk and kernel log",
            Self::DownloadFailed => "see which file it was and whether the archive has it; then build again",
            Self::DownloadLimit => "raise [image] size in the recipe if the build needs so much",
            Self::AnswersRejected => "mend the answers file; the line or question is named above",
            Self::WaitingForInput => {
                "answer the question that the screen shows in the recipe or answers file"
            }
            Self::InstallerError => "read the installer's log; its last lines tell what it was doing",
            Self::EmergencyShell => {
                "read what failed before the shell was offered; mostly a disk that is not found"
            }
            Self::BootFailed => "see that the disk, kernel or installation medium is one that boots here",
            Self::StepFailed => {
                "read the console's log above the step's end; the command's own error is there"
            }
            Self::Stalled => {
                "see the last screen; raise limits.no_progress if this step is silent when all is well"
            }
            Self::Timeout => "raise limits.total in the recipe, or find out from the timings what is slow",
            Self::ConsoleFlood => "see the log: something in the guest prints the same again and again",
            Self::NoProof => "see the last screen for what the guest did instead",
            Self::QemuDied => "see what qemu said, and this host's kernel log",
            Self::QemuUnresponsive => "see this host's load and its kernel log",
            Self::HostDiskFull => "free some space where the scratch directory lies",
            Self::HostDiskError => "look at this host's disk and its kernel's log",
            Self::HostUnfit => "run hostler doctor; it says what to do about each thing",
            Self::RecipeFiles => "put the file where the recipe says, or name another in the recipe",
            Self::HostFiles => "see that this user may write there and that there is space",
            Self::WatchdogRefused => "see hostlerd's log for why",
            Self::CacheUnusable => "choose another directory with --cache",
            Self::PackagesRefused => "mend the recipe's [debian] part, or this host's apt sources",
            Self::ComposeFailed => "raise [image] size if it is too small; else see the causes",
            Self::MachineFailed => "run hostler doctor",
            Self::ImageFailed => "see what qemu-img said, and the free space",
            Self::Cancelled => "nothing failed; build again",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_has_one_name_wherever_it_is_written() {
        let mut names: Vec<&str> = Class::ALL.iter().map(|class| class.name()).collect();
        for class in Class::ALL {
            assert_eq!(serde_json::to_value(class).unwrap(), class.name());
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Class::ALL.len());
    }
}
