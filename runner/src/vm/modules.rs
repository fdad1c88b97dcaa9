//! Which kernel modules an initramfs needs, and in what order they load.
//!
//! A Debian kernel package ships no `modules.dep`: the order comes from the `depends=` entries that
//! each module carries in its own `.modinfo` section. The order is worked out by a pure function
//! over the names; a thin reader finds the files. Deliberately absent: aliases and soft
//! dependencies; the callers name what they need.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The largest file that is taken for a module, in bytes.
const LARGEST_MODULE: u64 = 64 * 1024 * 1024;

/// Why the modules could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModulesError {
    /// A folder could not be listed.
    #[error("could not list the kernel's modules in {path}")]
    List {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A module could not be read.
    #[error("could not read the kernel module {path}")]
    Read {
        /// The module.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is no module.
    #[error("{path} is not a kernel module that can be read; compressed ones are not supported")]
    NotAModule {
        /// The file.
        path: PathBuf,
    },
    /// Modules need each other in a circle.
    #[error("the kernel module {name} needs itself")]
    Circle {
        /// One of them.
        name: String,
    },
}

/// A module with the bytes that go into the initramfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with `_` for `-`.
    pub name: String,
    /// Its file's content.
    pub bytes: Vec<u8>,
}

/// The modules of `wanted` and what they need, each after what it needs. A wanted one that is no
/// file under `directory` is built into the kernel, or is not there at all, and is left out.
///
/// # Errors
/// When a file cannot be read or is no module.
pub fn load_ordered(directory: &Path, wanted: &[&str]) -> Result<Vec<Module>, ModulesError> {
    let mut files = BTreeMap::new();
    find(directory, &mut files, 0)?;
    let mut bytes = BTreeMap::new();
    let mut needs = BTreeMap::new();
    let mut open: Vec<String> = wanted.iter().map(|name| normal(name)).collect();
    while let Some(name) = open.pop() {
        if needs.contains_key(&name) {
            continue;
        }
        let Some(path) = files.get(&name) else {
            needs.insert(name, Vec::new());
            continue;
        };
        let content = read(path)?;
        let depends = depends(&content).ok_or_else(|| ModulesError::NotAModule { path: path.clone() })?;
        open.extend(depends.iter().cloned());
        needs.insert(name.clone(), depends);
        bytes.insert(name, content);
    }
    let wanted: Vec<String> = wanted.iter().map(|name| normal(name)).collect();
    Ok(order(&needs, &wanted)?
        .into_iter()
        .filter_map(|name| {
            let bytes = bytes.remove(&name)?;
            Some(Module { name, bytes })
        })
        .collect())
}

/// Orders `wanted` and all it needs, so that each comes after what it needs.
fn order(needs: &BTreeMap<String, Vec<String>>, wanted: &[String]) -> Result<Vec<String>, ModulesError> {
    fn visit(
        name: &str,
        needs: &BTreeMap<String, Vec<String>>,
        path: &mut Vec<String>,
        ordered: &mut Vec<String>,
    ) -> Result<(), ModulesError> {
        if ordered.iter().any(|done| done == name) {
            return Ok(());
        }
        if path.iter().any(|above| above == name) {
            return Err(ModulesError::Circle { name: name.to_owned() });
        }
        path.push(name.to_owned());
        for need in needs.get(name).into_iter().flatten() {
            visit(need, needs, path, ordered)?;
        }
        path.pop();
        ordered.push(name.to_owned());
        Ok(())
    }
    let mut ordered = Vec::new();
    for name in wanted {
        visit(name, needs, &mut Vec::new(), &mut ordered)?;
    }
    Ok(ordered)
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>, depth: u32) -> Result<(), ModulesError> {
    let failed = |source| ModulesError::List { path: directory.to_owned(), source };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let kind = entry.file_type().map_err(failed)?;
        let path = entry.path();
        if kind.is_dir() && depth < 16 {
            find(&path, files, depth + 1)?;
        } else if kind.is_file()
            && let Some(name) = entry.file_name().to_str().and_then(|name| name.strip_suffix(".ko"))
        {
            files.insert(normal(name), path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, ModulesError> {
    let failed = |source| ModulesError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > LARGEST_MODULE {
        return Err(ModulesError::NotAModule { path: path.to_owned() });
    }
    fs::read(path).map_err(failed)
}

/// What a module's `.modinfo` section says it needs. `None` when it has no such section.
fn depends(module: &[u8]) -> Option<Vec<String>> {
    let section = section(module, b".modinfo")?;
    let mut names = Vec::new();
    for entry in section.split(|&byte| byte == 0) {
        if let Some(list) = entry.strip_prefix(b"depends=") {
            let list = std::str::from_utf8(list).ok()?;
            names.extend(list.split(',').filter(|name| !name.is_empty()).map(normal));
        }
    }
    Some(names)
}

/// A section of a little-endian 64-bit ELF file; elf(5).
fn section<'a>(file: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let headers = number(file, 0x28, 8)?;
    let header_size = number(file, 0x3a, 2)?;
    let count = number(file, 0x3c, 2)?;
    let names_index = number(file, 0x3e, 2)?;
    let header = |index: usize| {
        let start = headers.checked_add(index.checked_mul(header_size)?)?;
        file.get(start..start.checked_add(0x40)?)
    };
    let content = |header: &[u8]| {
        let start = number(header, 0x18, 8)?;
        file.get(start..start.checked_add(number(header, 0x20, 8)?)?)
    };
    let names = content(header(names_index)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let name = names.get(number(header, 0, 4)?..)?;
        let name = name.split(|&byte| byte == 0).next()?;
        if name == wanted { content(header) } else { None }
    })
}

fn number(bytes: &[u8], at: usize, size: usize) -> Option<usize> {
    let mut value = [0; 8];
    value.get_mut(..size)?.copy_from_slice(bytes.get(at..at.checked_add(size)?)?);
    usize::try_from(u64::from_le_bytes(value)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A minimal ELF file: header, `.shstrtab`, `.modinfo`, two section headers.
    fn module(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut file = vec![0; 0x40];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let names_at = file.len();
        file.extend(names);
        let info_at = file.len();
        file.extend(modinfo);
        let headers = file.len() as u64;
        file[0x28..0x30].copy_from_slice(&headers.to_le_bytes());
        file[0x3a..0x3c].copy_from_slice(&0x40_u16.to_le_bytes());
        file[0x3c..0x3e].copy_from_slice(&2_u16.to_le_bytes());
        for (name, at, size) in [(10_u32, names_at, names.len()), (1, info_at, modinfo.len())] {
            let mut header = [0; 0x40];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            file.extend(header);
        }
        file
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn a_modules_needs_are_read_from_its_own_section() {
        let file = module(b"license=GPL\0depends=virtio-ring,virtio\0name=x\0");
        assert_eq!(depends(&file), Some(names(&["virtio_ring", "virtio"])));
        assert_eq!(depends(&module(b"depends=\0")), Some(Vec::new()));
        assert_eq!(depends(b"\xfd7zXZ"), None);
    }

    #[test]
    fn each_module_comes_after_what_it_needs() {
        let needs = BTreeMap::from([
            ("blk".to_owned(), names(&["ring", "virtio"])),
            ("virtio".to_owned(), names(&["ring"])),
        ]);
        assert_eq!(order(&needs, &names(&["blk", "virtio"])).unwrap(), names(&["ring", "virtio", "blk"]));
    }

    #[test]
    fn a_circle_is_an_error() {
        let needs = BTreeMap::from([("a".to_owned(), names(&["b"])), ("b".to_owned(), names(&["a"]))]);
        assert!(matches!(order(&needs, &names(&["a"])), Err(ModulesError::Circle { .. })));
    }

    #[test]
    fn files_are_found_in_folders_and_built_in_ones_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("kernel/drivers");
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("virtio-rng.ko"), module(b"depends=rng-core\0")).unwrap();
        let loaded = load_ordered(folder.path(), &["ext4", "virtio_rng"]).unwrap();
        let loaded: Vec<&str> = loaded.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(loaded, ["virtio_rng"]);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut file = b"\x7fELF\x02\x01".to_vec();
            file.extend(bytes);
            let _ = depends(&file);
        }
    }
}
