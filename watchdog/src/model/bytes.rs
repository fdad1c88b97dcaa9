//! The kernel's bytes as JSON has them between the daemon and its workers: as text, where a byte that is no
//! printable ASCII takes three characters. As a list of numbers each would take nearly four, and who mounts
//! decides how many there are.

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};
use serde::{Deserialize, Deserializer, Serializer};

/// What JSON would write with more than one character, and what begins an escape.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%').add(b'"').add(b'\\');

pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&percent_encode(bytes, ESCAPED))
}

/// How many characters that takes.
pub(super) fn length(bytes: &[u8]) -> usize {
    percent_encode(bytes, ESCAPED).map(str::len).sum()
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(percent_decode_str(&text).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Serialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Path(#[serde(with = "super")] Vec<u8>);

    proptest! {
        #[test]
        fn every_byte_comes_back_and_takes_three_characters_at_most(bytes: Vec<u8>) {
            let text = serde_json::to_string(&Path(bytes.clone())).expect("text");
            prop_assert_eq!(text.len(), length(&bytes) + 2);
            prop_assert!(length(&bytes) <= 3 * bytes.len());
            prop_assert_eq!(serde_json::from_str::<Path>(&text).expect("the same"), Path(bytes));
        }
    }

    #[test]
    fn what_is_readable_stays_so() {
        let text = serde_json::to_string(&Path(b"/a b/100%\n".to_vec())).expect("text");
        assert_eq!(text, "\"/a b/100%25%0A\"");
    }
}
