//! Varlink's two message shapes.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// Interface and method, such as `org.hostler.Watchdog.Status`.
    pub method: String,
    /// The method's arguments; absent means none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Map<String, Value>>,
    /// The client wants no reply.
    #[serde(default, skip_serializing_if = "is_false")]
    pub oneway: bool,
    /// The client takes several replies.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
}

/// What the daemon answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The method's results, or the error's details.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Map<String, Value>>,
    /// More replies to the same call follow.
    #[serde(default, skip_serializing_if = "is_false")]
    pub continues: bool,
    /// Interface and name of an error; absent means success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's skip_serializing_if passes a reference")]
fn is_false(value: &bool) -> bool {
    !*value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_reads_as_varlink_writes_it() {
        let call: Call = serde_json::from_str(r#"{"method":"org.varlink.service.GetInfo","parameters":{}}"#)
            .expect("valid");
        assert_eq!(call.method, "org.varlink.service.GetInfo");
        assert_eq!(call.parameters, Some(Map::new()));
        assert!(!call.oneway && !call.more);
    }

    #[test]
    fn what_is_absent_is_not_written() {
        assert_eq!(serde_json::to_string(&Reply::default()).expect("plain data"), "{}");
    }
}
