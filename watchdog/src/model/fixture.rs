//! A process and a mount with nothing special about them, for tests to change what they are about.

use super::{
    DeviceNumber, Mount, MountIdentity, MountNamespace, MountNumber, Process, ProcessIdentity, StartTime,
};

pub(crate) const HOST: MountNamespace = MountNamespace(1);

pub(crate) fn process_identity(pid: u32) -> ProcessIdentity {
    ProcessIdentity { pid, start: StartTime(u64::from(pid)) }
}

pub(crate) fn process(pid: u32, parent: u32) -> Process {
    Process {
        identity: process_identity(pid),
        parent,
        uid: 1000,
        name: b"builder".to_vec(),
        ended: false,
        namespace: Some(HOST),
        current_directory: None,
        root_directory: None,
        program: None,
        files: Vec::new(),
        mapped: Vec::new(),
        unit: String::new(),
    }
}

pub(crate) fn mount(number: u64, parent: u64, device: DeviceNumber, point: &str) -> Mount {
    Mount {
        identity: MountIdentity { number: MountNumber::Unique(10_000 + number), namespace: HOST, device },
        short_number: number,
        parent: (parent != 0).then_some(parent),
        point: point.as_bytes().to_vec(),
        root: b"/".to_vec(),
        filesystem: "ext4".to_owned(),
        source: b"src".to_vec(),
        peers: None,
        master: None,
        layers: Vec::new(),
        user: None,
    }
}
