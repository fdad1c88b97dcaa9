//! Leaves out of a look what nobody needs and a user can make as large as he likes.

use std::collections::HashSet;

use hostler_protocol::text::shortened;

use crate::model::Snapshot;

/// How much is kept of texts that only tell a person something.
const TEXT_LIMIT: usize = 512;
/// Of how many processes of qemu the disks are told.
const WITH_DISKS: usize = 1000;

/// Of the files that a process has open in the same way on the same mount one tells all; a file's text says
/// no more than whether it is a root.
pub(super) fn fit(snapshot: &mut Snapshot) {
    for process in &mut snapshot.processes {
        let mut seen = HashSet::new();
        process.files.retain_mut(|file| {
            file.text.truncate(2);
            seen.insert((file.place, file.block_device, file.is_path, file.namespace, file.text == b"/"))
        });
        process.unit = shortened(&process.unit, TEXT_LIMIT);
    }
    for (at, qemu) in snapshot.qemus.iter_mut().flatten().enumerate() {
        qemu.unit = shortened(&qemu.unit, TEXT_LIMIT);
        if at >= WITH_DISKS {
            qemu.disks.clear();
        }
        for path in &mut qemu.disks {
            // The end tells more.
            path.drain(..path.len().saturating_sub(TEXT_LIMIT));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DeviceNumber, FileHold, Place, Process, fixture};

    #[test]
    fn as_many_files_as_somebody_opens_take_no_more_than_one_of_each_kind() {
        let file = |descriptor: u32| FileHold {
            descriptor,
            place: Place { mount: u64::from(descriptor % 2), device: DeviceNumber { major: 8, minor: 1 } },
            block_device: None,
            is_path: descriptor.is_multiple_of(3),
            namespace: None,
            text: if descriptor == 6 { b"/".to_vec() } else { vec![b'/'; 4096] },
        };
        let files: Vec<FileHold> = (0..10_000).map(file).collect();
        let process = Process { files, unit: "/x".repeat(4000), ..fixture::process(50, 1) };
        let mut snapshot = Snapshot { processes: vec![process], ..Snapshot::default() };
        fit(&mut snapshot);
        let kept: Vec<u32> = snapshot.processes[0].files.iter().map(|file| file.descriptor).collect();
        assert_eq!(kept, [0, 1, 2, 3, 6]);
        assert_eq!(snapshot.processes[0].files[4].text, b"/");
        assert!(serde_json::to_vec(&snapshot).expect("text").len() < 4096);
    }
}
