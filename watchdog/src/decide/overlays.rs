//! Which mounts an overlay's layers lie on.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::model::{MountNamespace, Snapshot};

/// Of each mount, by its place in the snapshot, the overlays of its namespace that have a layer on it. One
/// overlay that is bound a thousand times is read once.
pub(super) fn by_mount(snapshot: &Snapshot) -> HashMap<usize, Vec<usize>> {
    // Of several mounts on one point the upper one is what a path leads to.
    let mut points: HashMap<(MountNamespace, &[u8]), usize> = HashMap::new();
    for (at, mount) in snapshot.mounts.iter().enumerate() {
        points.insert((mount.identity.namespace, &mount.point), at);
    }
    let mut lies_on: HashMap<(MountNamespace, &[u8]), BTreeSet<usize>> = HashMap::new();
    let mut found: HashMap<usize, Vec<usize>> = HashMap::new();
    for (at, overlay) in snapshot.mounts.iter().enumerate().filter(|(_, it)| it.filesystem == "overlay") {
        let namespace = overlay.identity.namespace;
        let mounts = lies_on.entry((namespace, &overlay.layers)).or_insert_with(|| {
            let under = |layer: PathBuf| {
                let mut above = layer.ancestors();
                above.find_map(|path| points.get(&(namespace, path.as_os_str().as_bytes())).copied())
            };
            layers(&overlay.layers).into_iter().filter_map(under).collect()
        });
        for mount in mounts.iter().filter(|mount| **mount != at) {
            found.entry(*mount).or_default().push(at);
        }
    }
    found
}

/// The directories that an overlay's options name. A colon or comma in a name is escaped by a backslash.
fn layers(options: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for option in split_unescaped(options, b',') {
        let names = [b"lowerdir=".as_slice(), b"lowerdir+=", b"datadir+=", b"upperdir=", b"workdir="];
        let Some(value) = names.iter().find_map(|name| option.strip_prefix(*name)) else { continue };
        for layer in split_unescaped(value, b':').into_iter().filter(|layer| !layer.is_empty()) {
            let mut plain = Vec::with_capacity(layer.len());
            let mut bytes = layer.iter();
            while let Some(byte) = bytes.next() {
                plain.push(if *byte == b'\\' { *bytes.next().unwrap_or(byte) } else { *byte });
            }
            // As the kernel writes mount points: without empty and `.` parts.
            found.push(Path::new(OsStr::from_bytes(&plain)).components().collect());
        }
    }
    found
}

fn split_unescaped(bytes: &[u8], separator: u8) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    let mut start = 0;
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'\\' {
            at += 2;
            continue;
        }
        if bytes[at] == separator {
            parts.push(&bytes[start..at]);
            start = at + 1;
        }
        at += 1;
    }
    parts.push(&bytes[start..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{host, loop_number, mount};
    use super::*;
    use crate::model::{DeviceNumber, Mount};

    #[test]
    fn layers_are_found_whatever_their_names_hold() {
        let found = layers(b"rw,relatime,lowerdir=/a\\:b:/c\\,d,upperdir=/u,workdir=/w,uuid=on");
        assert_eq!(found, ["/a:b", "/c,d", "/u", "/w"].map(Path::new));
        let found = layers(b"rw,lowerdir+=/l1,lowerdir+=/l2,datadir+=/d");
        assert_eq!(found, ["/l1", "/l2", "/d"].map(Path::new));
        assert!(layers(b"").is_empty());
    }

    #[test]
    fn a_layer_lies_on_the_deepest_mount_above_it_and_of_two_on_one_point_on_the_upper() {
        let mut snapshot = host();
        let bind = |number, point| mount(number, 1, loop_number(3), point);
        let overlay = |number, point, options: &[u8]| {
            let device = DeviceNumber { major: 0, minor: 70 };
            let (filesystem, layers) = ("overlay".to_owned(), options.to_vec());
            Mount { filesystem, layers, ..mount(number, 1, device, point) }
        };
        let mut elsewhere = overlay(8, "/n", b"lowerdir=/a/b/c");
        elsewhere.identity.namespace = MountNamespace(77);
        snapshot.mounts.extend([
            bind(2, "/a"),
            bind(3, "/a/b"),
            bind(4, "/a/b"),
            bind(5, "/a/bc"),
            overlay(6, "/o", b"rw,lowerdir=/a//b/./c/,upperdir=/u"),
            overlay(7, "/o2", b"rw,lowerdir=/a//b/./c/,upperdir=/u"),
            elsewhere,
            overlay(9, "/o/on-itself", b"lowerdir=/o/x"),
        ]);
        let expected = [(0, vec![5, 6]), (3, vec![5, 6]), (5, vec![8])];
        assert_eq!(by_mount(&snapshot), expected.into_iter().collect());
    }
}
