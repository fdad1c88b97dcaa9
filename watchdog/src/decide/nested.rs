//! Which claimed directories lie in others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hostler_protocol::lease::LeaseId;

use crate::model::UnderClaim;

/// Which leases have claimed a directory below one of another lease's, or the same one. `places` are where
/// the claimed directories were found, and whose they are.
#[must_use]
pub fn nested_claims(places: &[(PathBuf, LeaseId)]) -> Vec<UnderClaim<LeaseId>> {
    let mut by_path: BTreeMap<&Path, Vec<LeaseId>> = BTreeMap::new();
    for (path, lease) in places {
        by_path.entry(path).or_default().push(*lease);
    }
    let mut found = Vec::new();
    for (path, inner) in places {
        let above = path.ancestors().filter_map(|above| by_path.get(above)).flatten();
        let others = above.filter(|outer| *outer != inner);
        found.extend(others.map(|outer| UnderClaim { lease: *outer, what: *inner }));
    }
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_lies_below_those_of_others_by_whole_names() {
        let places = [("/ws", 1), ("/ws/a", 2), ("/ws/a/b", 2), ("/ws-other", 3), ("/ws", 4)]
            .map(|(path, lease)| (PathBuf::from(path), LeaseId(lease)));
        let pairs: Vec<_> = nested_claims(&places).iter().map(|one| (one.lease.0, one.what.0)).collect();
        assert_eq!(pairs, [(1, 2), (1, 4), (4, 1), (4, 2)]);
    }
}
