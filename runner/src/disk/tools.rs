//! What the builder guest itself runs on: a kernel with its modules, and busybox.
//!
//! Taken from the same verified suite as the image, into a directory of its own: neither has to be in
//! the image. Emits progress; the caller brackets the stage.

use std::path::{Path, PathBuf};

use crate::cache::{FetchError, Fetcher};
use crate::debian::{Package, SelectError, Selection, describe, relation};
use crate::event::{Sink, Stage};

use super::tree::{Tree, TreeError};
use super::unpack::{self, UnpackError};

/// Why there are no tools.
#[derive(Debug, thiserror::Error)]
pub enum ToolsError {
    /// A package does not exist.
    #[error(
        "the archive has no {wanted} for the builder guest: check the suite and that component main is used"
    )]
    NoPackage {
        /// What was looked for.
        wanted: String,
    },
    /// A package's entry in the index is unusable.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// A package cannot be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The directory cannot be written.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A package cannot be unpacked.
    #[error("cannot unpack package {package}")]
    Unpack {
        /// The package.
        package: String,
        /// Why.
        #[source]
        source: UnpackError,
    },
    /// A file is not where it should be.
    #[error("package {package} has no {wanted}: is it another release than the builder knows?")]
    NoFile {
        /// The package.
        package: String,
        /// What was looked for.
        wanted: &'static str,
    },
}

/// Files of the builder guest, on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuilderTools {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The directory of its modules; its last component is the kernel's release.
    pub modules: PathBuf,
    /// A busybox that needs no libraries.
    pub busybox: PathBuf,
    /// Package and version of the kernel.
    pub kernel_package: (String, String),
}

/// Fetches the tools and unpacks them into the directory `tools` in `scratch`. Blocks for the network.
///
/// # Errors
/// See [`ToolsError`].
pub fn builder_tools(
    selection: &Selection,
    fetcher: &Fetcher,
    scratch: &Path,
    sink: &dyn Sink,
) -> Result<BuilderTools, ToolsError> {
    let kernel = kernel_package(selection)?;
    let busybox = package(selection, "busybox-static")?;
    let packages = [kernel, busybox];
    let wanted = packages.iter().map(|package| selection.wanted(&package.file)).collect();
    fetcher.fetch_all(wanted, Stage::Fetch, sink)?;
    let tree = Tree::create(scratch.join("tools"), 0)?;
    unpack::unpack(selection, &packages, fetcher.cache(), &tree, &is_needed, (fetcher.stop(), sink))
        .map_err(|failed| ToolsError::Unpack { package: failed.package, source: failed.error })?;
    tree.settle()?;
    let layout = tree.layout();
    let find = |prefix: &str, depth: usize| {
        layout
            .nodes()
            .map(|(path, _)| path)
            .find(|path| path.starts_with(prefix) && path.matches('/').count() == depth)
            .map(|path| tree.root().join(path))
    };
    let [kernel, busybox] = &packages;
    let missing = |package: &Package, wanted| ToolsError::NoFile { package: package.name.clone(), wanted };
    Ok(BuilderTools {
        kernel: find("boot/vmlinuz-", 1).ok_or_else(|| missing(kernel, "kernel image"))?,
        modules: find("usr/lib/modules/", 3).ok_or_else(|| missing(kernel, "modules"))?,
        busybox: find("usr/bin/busybox", 2).ok_or_else(|| missing(busybox, "busybox"))?,
        kernel_package: (kernel.name.clone(), kernel.version.clone()),
    })
}

/// Directories come along: they are few, and the wanted files lie in them.
fn is_needed(path: &str) -> bool {
    const WANTED: [&str; 5] =
        ["/boot/vmlinuz-", "/lib/modules/", "/usr/lib/modules/", "/bin/busybox", "/usr/bin/busybox"];
    WANTED.iter().any(|wanted| {
        path.starts_with(wanted) || wanted.starts_with(&format!("{}/", path.trim_end_matches('/')))
    })
}

fn package(selection: &Selection, name: &str) -> Result<Package, ToolsError> {
    let id = selection
        .catalogue
        .candidate(name)
        .ok_or_else(|| ToolsError::NoPackage { wanted: name.to_owned() })?;
    Ok(describe(&selection.catalogue, id, true)?)
}

/// The package of the builder guest's kernel: the one for virtual machines where there is one, since it
/// starts faster. The well-known names are empty packages that depend on the current one.
///
/// # Errors
/// The archive has none.
pub fn kernel_package(selection: &Selection) -> Result<Package, ToolsError> {
    let catalogue = &selection.catalogue;
    let architecture = &selection.architecture;
    let names = [format!("linux-image-cloud-{architecture}"), format!("linux-image-{architecture}")];
    for id in names.iter().filter_map(|name| catalogue.candidate(name)) {
        let field = catalogue.stanza(id).get("Depends").unwrap_or("");
        let groups = relation::parse(field).unwrap_or_default();
        let real = groups.iter().flatten().find(|relation| relation.name.starts_with("linux-image-"));
        if let Some(real) = real {
            return package(selection, real.name);
        }
    }
    Err(ToolsError::NoPackage { wanted: names.join(" or ") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_builder_needs_is_unpacked() {
        for path in
            ["/", "/boot", "/lib/modules", "/usr", "/usr/bin", "/bin/busybox", "/lib/modules/6.1/kernel/x.ko"]
        {
            assert!(is_needed(path), "{path}");
        }
        for path in ["/boot/config-6.1", "/usr/share", "/bin/sh", "/boot/System.map-6.1"] {
            assert!(!is_needed(path), "{path}");
        }
    }
}
