//! The table `[output]`: what an image's disk is made into.

use serde::Deserialize;
use toml::Spanned;

use super::refusal::Refusal;

/// A kind of file that a disk is made into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// qemu's own, compressed.
    Qcow2,
    /// Sector by sector, with holes.
    Raw,
    /// VMware's, growing.
    Vmdk,
    /// Hyper-V's, growing.
    Vhdx,
    /// A virtual appliance: an OVF description and a compressed VMDK disk, in one file.
    Ova,
    /// The root file system as a tar archive.
    Tar,
    /// The root file system as a squashfs file.
    Squashfs,
    /// The newest kernel and its initramfs.
    Kernel,
}

impl Format {
    /// Whether the root file system has to be packed for it.
    #[must_use]
    pub fn needs_root(self) -> bool {
        matches!(self, Self::Tar | Self::Squashfs)
    }
}

/// What an image's disk is made into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The formats, each once, in the recipe's order.
    pub formats: Vec<Format>,
}

impl Output {
    /// Whether this format is among them.
    #[must_use]
    pub fn has(&self, format: Format) -> bool {
        self.formats.contains(&format)
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenOutput {
    formats: Option<Spanned<Vec<Spanned<Format>>>>,
}

impl WrittenOutput {
    pub(super) fn check(self) -> Result<Output, Refusal> {
        let Some(list) = self.formats else {
            return Ok(Output { formats: vec![Format::Qcow2] });
        };
        if list.get_ref().is_empty() {
            let message = "output.formats is empty: name at least one, such as \"qcow2\", or leave it out";
            return Err(Refusal::at(&list, message.to_owned()));
        }
        let mut formats = Vec::new();
        for format in list.into_inner() {
            if formats.contains(format.get_ref()) {
                return Err(Refusal::at(&format, "this format is named twice: once is enough".to_owned()));
            }
            formats.push(format.into_inner());
        }
        Ok(Output { formats })
    }
}
