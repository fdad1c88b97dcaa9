//! The commands that an administrator could run against what holds a thing.

use hostler_protocol::text::printable;
use hostler_protocol::why::Reason;

use super::graph::{Edge, Node};
use super::index::{Block, Index};
use crate::model::{Filesystem, MapKind, Mount, SwapIdentity};

/// The command that would end just this hold of `held`; empty when there is none.
pub(super) fn remedy(index: &Index<'_>, held: Node, edge: &Edge) -> String {
    let snapshot = index.snapshot;
    match (edge.reason, edge.holder) {
        (Reason::Frozen, Some(Node::Filesystem(at))) => thaw(index, held, &snapshot.filesystems[at]),
        (_, Some(Node::Process(at))) => format!("kill {}", snapshot.processes[at].identity.pid),
        (_, Some(Node::Mount(at))) => unmount(index, index.mount(at.0)),
        (_, Some(Node::Swap(at))) => match snapshot.swaps[at].identity {
            SwapIdentity::Device(_) | SwapIdentity::File(_) => {
                format!("swapoff {}", quoted(&snapshot.swaps[at].path))
            }
            SwapIdentity::Unreachable(_) => String::new(),
        },
        (_, Some(Node::Block(Block::Loop(at)))) => {
            format!("losetup -d /dev/loop{}", snapshot.loops[at].number)
        }
        (_, Some(Node::Block(Block::Map(at)))) => {
            let map = &snapshot.maps[at];
            match map.identity.kind {
                MapKind::DeviceMapper => format!("dmsetup remove {}", quoted(map.name.as_bytes())),
                MapKind::Array => format!("mdadm --stop /dev/{}", printable(map.name.as_bytes())),
            }
        }
        (_, Some(Node::Block(Block::Nbd(at)))) => {
            format!("qemu-nbd --disconnect /dev/nbd{}", snapshot.nbds[at].number)
        }
        (Reason::FuseHung, None) => match held {
            Node::Mount(at) => {
                let minor = index.mount(at.0).device().minor;
                format!("echo 1 > /sys/fs/fuse/connections/{minor}/abort")
            }
            _ => String::new(),
        },
        (_, Some(Node::Partition(_) | Node::Filesystem(_)) | None) => String::new(),
    }
}

fn thaw(index: &Index<'_>, held: Node, filesystem: &Filesystem) -> String {
    let mounted = filesystem.blocks.iter().chain(&filesystem.shown_as);
    let mount = mounted.flat_map(|device| index.mounts_of(*device)).next();
    match (mount, held) {
        (Some(at), _) => format!("fsfreeze --unfreeze {}", quoted(&index.mount(*at).point)),
        (None, Node::Block(Block::Loop(at))) => {
            let node = format!("/dev/loop{}", index.snapshot.loops[at].number);
            format!("mount {node} /mnt && fsfreeze --unfreeze /mnt && umount /mnt")
        }
        (None, _) => String::new(),
    }
}

fn unmount(index: &Index<'_>, mount: &Mount) -> String {
    let snapshot = index.snapshot;
    let point = quoted(&mount.point);
    if index.is_host(mount.identity.namespace) {
        return format!("umount {point}");
    }
    let inside =
        snapshot.processes.iter().find(|process| process.namespace == Some(mount.identity.namespace));
    let kept = snapshot.mounts.iter().find(|other| {
        other.kept_namespace() == Some(mount.identity.namespace) && index.is_host(other.identity.namespace)
    });
    match (inside, kept) {
        (Some(process), _) => format!("nsenter -m -t {} umount {point}", process.identity.pid),
        (None, Some(file)) => format!("nsenter --mount={} umount {point}", quoted(&file.point)),
        (None, None) => String::new(),
    }
}

/// A word for a shell that means exactly these bytes.
fn quoted(bytes: &[u8]) -> String {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+:@%,=".contains(byte);
    if !bytes.is_empty() && bytes.iter().all(is_plain) {
        return String::from_utf8_lossy(bytes).into_owned();
    }
    let is_harmless = |byte: &u8| (b' '..=b'~').contains(byte) && !b"'\\".contains(byte);
    if bytes.iter().all(is_harmless) {
        return format!("'{}'", String::from_utf8_lossy(bytes));
    }
    let mut word = String::from("$'");
    for byte in bytes {
        if is_harmless(byte) {
            word.push(char::from(*byte));
        } else {
            word.push_str(&format!("\\x{byte:02x}"));
        }
    }
    word.push('\'');
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_means_the_same_bytes_to_a_shell() {
        assert_eq!(quoted(b"/plain/path-1.img"), "/plain/path-1.img");
        assert_eq!(quoted(b"/a b"), "'/a b'");
        assert_eq!(quoted(b"/a'b\n\xff"), "$'/a\\x27b\\x0a\\xff'");
        assert_eq!(quoted(b""), "''");
    }
}
