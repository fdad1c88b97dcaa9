//! How much one look takes in of the mounts of other namespaces. Whoever may make a user namespace can mount
//! in it as often as he likes, with names as long as he likes; and a look that is too large for one answer
//! would tell nobody anything. What is left out is a gap.

use std::io;

use crate::model::{Mount, MountNamespace};

/// The most that is taken of one namespace, as bytes of the answer: more than 10,000 mounts of a container, or
/// 2,000 overlays of many layers.
pub const OF_ONE: usize = 8 * 1024 * 1024;
/// The same of all together. The largest are left out first, so that a few of those do not take the place of
/// many small ones.
const OF_ALL: usize = 64 * 1024 * 1024;
/// What the numbers of a mount take.
const NUMBERS: usize = 400;

/// What a mount takes at most in an answer.
#[must_use]
pub fn size(mount: &Mount) -> usize {
    NUMBERS + mount.text_length()
}

/// Why a namespace is left out.
#[must_use]
pub fn too_much() -> io::Error {
    io::Error::other("there are more of them, or with longer names, than one look takes in")
}

/// The wanted mounts of one namespace, when they are not too many.
///
/// # Errors
/// When they are.
pub fn of_one(mounts: Vec<Mount>) -> io::Result<Vec<Mount>> {
    if mounts.iter().map(size).sum::<usize>() > OF_ONE { Err(too_much()) } else { Ok(mounts) }
}

/// What was taken so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    taken: Vec<(usize, MountNamespace)>,
    total: usize,
}

impl Budget {
    /// Takes a namespace in. Returns those that have to be left out for it, which may be itself.
    pub fn take(&mut self, namespace: MountNamespace, mounts: &[Mount]) -> Vec<MountNamespace> {
        let own = mounts.iter().map(size).sum();
        self.total += own;
        self.taken.push((own, namespace));
        let mut left_out = Vec::new();
        while self.total > OF_ALL {
            // Of equal ones the last that came.
            let largest = (0..self.taken.len()).max_by_key(|at| self.taken[*at].0);
            let Some(at) = largest else { break };
            let (size, namespace) = self.taken.swap_remove(at);
            self.total -= size;
            left_out.push(namespace);
        }
        left_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DeviceNumber, fixture};

    fn mount(length: usize) -> Mount {
        let device = DeviceNumber { major: 0, minor: 60 };
        Mount { layers: vec![b'x'; length], ..fixture::mount(1, 0, device, "/m") }
    }

    #[test]
    fn a_mount_never_takes_more_than_was_counted() {
        for byte in [0, b'a', b'"', b'%', 0xff] {
            let bytes = vec![byte; 4096];
            let mut mount = mount(0);
            mount.identity.number = crate::model::MountNumber::Reusable(u64::MAX);
            mount.identity.namespace = MountNamespace(u64::MAX);
            mount.identity.device = DeviceNumber { major: u32::MAX, minor: u32::MAX };
            (mount.short_number, mount.parent) = (u64::MAX, Some(u64::MAX));
            (mount.peers, mount.master, mount.user) = (Some(u64::MAX), Some(u64::MAX), Some(u32::MAX));
            (mount.point, mount.root, mount.source, mount.layers) =
                (bytes.clone(), bytes.clone(), bytes.clone(), bytes);
            let text = serde_json::to_vec(&mount).expect("text");
            assert!(text.len() < size(&mount), "{} bytes of {byte:#x}", text.len());
        }
    }

    #[test]
    fn one_namespace_has_its_limit() {
        let most = OF_ONE / size(&mount(4096));
        assert_eq!(of_one(vec![mount(4096); most]).map(|mounts| mounts.len()).ok(), Some(most));
        assert!(of_one(vec![mount(4096); most + 1]).is_err());
    }

    #[test]
    fn the_largest_make_room_for_the_small() {
        let mut budget = Budget::default();
        let large = vec![mount(4096); OF_ONE / size(&mount(4096))];
        let count = OF_ALL / OF_ONE;
        for number in 0..count {
            assert_eq!(budget.take(MountNamespace(number as u64), &large), []);
        }
        let before: Vec<MountNamespace> =
            (1000..3000).flat_map(|number| budget.take(MountNamespace(number), &[mount(100)])).collect();
        assert_eq!(before.len(), 1, "one large one makes room for all of these");
        assert!(before[0].0 < count as u64);
        // One more of the large ones would only take another's place.
        assert_eq!(budget.take(MountNamespace(99), &large), [MountNamespace(99)]);
    }
}
