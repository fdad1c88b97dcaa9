//! The table `[builder]`: what a throwaway machine is given and what it has to leave.

use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use super::refusal::Refusal;
use super::written::{BESIDE_RULE, FILE_NAME_RULE, checked, is_beside, is_file_name};

/// A throwaway machine's task; its commands are the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Builder {
    /// A folder beside the recipe that is copied to `/workspace`.
    pub workspace: Option<PathBuf>,
    /// Name of the file in `/artifacts` that is the raw disk of the image.
    pub disk: Option<String>,
    /// Names of further files in `/artifacts`.
    pub artifacts: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenBuilder {
    workspace: Option<Spanned<String>>,
    disk: Option<Spanned<String>>,
    artifacts: Option<Spanned<Vec<Spanned<String>>>>,
}

impl WrittenBuilder {
    pub(super) fn check(written: Spanned<Self>) -> Result<Builder, Refusal> {
        let place = written.span();
        let Self { workspace, disk, artifacts: list } = written.into_inner();
        let workspace = workspace.map(|path| checked(&path, is_beside, BESIDE_RULE)).transpose()?;
        let disk = disk.map(|name| checked(&name, is_file_name, FILE_NAME_RULE)).transpose()?;
        let mut artifacts: Vec<String> = Vec::new();
        for name in list.iter().flat_map(Spanned::get_ref) {
            let checked = checked(name, is_file_name, FILE_NAME_RULE)?;
            if artifacts.contains(&checked) || disk.as_ref() == Some(&checked) {
                return Err(Refusal::at(name, format!("{checked:?} is named twice: once is enough")));
            }
            artifacts.push(checked);
        }
        if artifacts.is_empty() && disk.is_none() {
            return Err(Refusal { span: Some(place), message: NOTHING.to_owned() });
        }
        Ok(Builder { workspace: workspace.map(PathBuf::from), disk, artifacts })
    }
}

const NOTHING: &str =
    "a builder that leaves nothing proves nothing: name builder.disk, builder.artifacts, or both";
