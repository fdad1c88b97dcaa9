//! The user that builds for root.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use nix::unistd::User;

/// A user with its main group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BuildUser {
    pub(super) user: u32,
    pub(super) group: u32,
}

/// The user `hostler` if there is one, else who called sudo, else `nobody`.
pub(super) fn build_user() -> Option<BuildUser> {
    let named = |name: &str| {
        let user = User::from_name(name).ok().flatten()?;
        Some(BuildUser { user: user.uid.as_raw(), group: user.gid.as_raw() })
    };
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    let caller = || Some(BuildUser { user: number("SUDO_UID")?, group: number("SUDO_GID")? });
    choose([named("hostler"), caller(), named("nobody")])
}

/// The first that is not root in any respect.
fn choose(candidates: [Option<BuildUser>; 3]) -> Option<BuildUser> {
    candidates.into_iter().flatten().find(|candidate| candidate.user != 0 && candidate.group != 0)
}

/// The group that may use `/dev/kvm`, where a group may.
pub(super) fn kvm_group() -> Option<u32> {
    let device = fs::metadata("/dev/kvm").ok()?;
    let group_may = device.mode() & 0o060 == 0o060;
    (group_may && device.gid() != 0).then(|| device.gid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_never_the_build_user() {
        let root = BuildUser { user: 0, group: 0 };
        let half = BuildUser { user: 5, group: 0 };
        let nobody = BuildUser { user: 65534, group: 65534 };
        assert_eq!(choose([None, Some(root), Some(nobody)]), Some(nobody));
        assert_eq!(choose([Some(half), None, Some(nobody)]), Some(nobody));
        assert_eq!(choose([Some(nobody), Some(root), None]), Some(nobody));
        assert_eq!(choose([Some(root), Some(root), None]), None);
    }
}
