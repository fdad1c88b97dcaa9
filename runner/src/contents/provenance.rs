//! Where an image came from: an in-toto statement (version 1) with SLSA's provenance (version 1).
//!
//! The statement is not signed: whoever runs the build has keys, and tools to sign with.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

/// A file or package, with its SHA-256 in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Artifact {
    /// Its name or address.
    pub name: String,
    /// Its SHA-256 digest in hexadecimal.
    pub sha256: String,
}

/// What there is to tell of a build.
#[derive(Clone, Debug)]
pub struct Build<'a> {
    /// What it made.
    pub outputs: &'a [Artifact],
    /// The recipe's text.
    pub recipe: &'a str,
    /// Everything that went in.
    pub materials: &'a [Artifact],
    /// What made it: versions and ways, by name.
    pub means: BTreeMap<&'static str, String>,
    /// What it left beside the outputs.
    pub byproducts: &'a [Artifact],
    /// When it began and ended, as RFC 3339 has it. Left out of builds that are to be the same each time.
    pub times: Option<(&'a str, &'a str)>,
}

/// The statement.
#[must_use]
pub fn statement(build: &Build<'_>) -> Value {
    let outputs: Vec<Value> = build
        .outputs
        .iter()
        .map(|output| json!({"name": output.name, "digest": {"sha256": output.sha256}}))
        .collect();
    let materials = |list: &[Artifact], key: &str| -> Vec<Value> {
        let mut list = list.to_vec();
        list.sort();
        list.dedup();
        list.into_iter().map(|one| json!({key: one.name, "digest": {"sha256": one.sha256}})).collect()
    };
    let mut metadata = json!({});
    if let Some((began, ended)) = build.times {
        metadata = json!({"startedOn": began, "finishedOn": ended});
    }
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": outputs,
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:hostler:build:1",
                "externalParameters": {"recipe": build.recipe},
                "internalParameters": build.means,
                "resolvedDependencies": materials(build.materials, "uri"),
            },
            "runDetails": {
                "builder": {"id": concat!("urn:hostler:builder:", env!("CARGO_PKG_VERSION"))},
                "metadata": metadata,
                "byproducts": materials(build.byproducts, "name"),
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_in_is_told_once_and_in_order() {
        let artifact = |name: &str| Artifact { name: name.to_owned(), sha256: "ab".to_owned() };
        let materials = [artifact("pkg:b"), artifact("pkg:a"), artifact("pkg:b")];
        let build = Build {
            outputs: &[artifact("x.qcow2")],
            recipe: "kind = \"debian\"\n",
            materials: &materials,
            means: BTreeMap::from([("accelerator", "tcg".to_owned())]),
            byproducts: &[],
            times: None,
        };
        let statement = statement(&build);
        assert_eq!(statement["subject"], json!([{"name": "x.qcow2", "digest": {"sha256": "ab"}}]));
        let predicate = &statement["predicate"];
        assert_eq!(
            predicate["buildDefinition"]["resolvedDependencies"],
            json!([{"uri": "pkg:a", "digest": {"sha256": "ab"}}, {"uri": "pkg:b", "digest": {"sha256": "ab"}}])
        );
        assert_eq!(predicate["runDetails"]["metadata"], json!({}));
    }
}
