//! What an environment says about the cache: where it is, and how large it may become. Pure.

use std::path::PathBuf;

use super::store::StoreError;

/// The directory that an environment asks for: `HOSTLER_CACHE`, else `XDG_CACHE_HOME/hostler`, else
/// `HOME/.cache/hostler`.
///
/// # Errors
/// None of them is set.
pub fn default_directory(
    variable: impl Fn(&str) -> Option<std::ffi::OsString>,
) -> Result<PathBuf, StoreError> {
    let path = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // The XDG specification has relative paths ignored.
    path("HOSTLER_CACHE")
        .or_else(|| path("XDG_CACHE_HOME").filter(|path| path.is_absolute()).map(|path| path.join("hostler")))
        .or_else(|| path("HOME").map(|path| path.join(".cache/hostler")))
        .ok_or(StoreError::NoDirectory)
}

/// How large the cache may become in bytes: `HOSTLER_CACHE_LIMIT`, else 32 GiB.
///
/// # Errors
/// It is no size.
pub fn limit(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Result<u64, StoreError> {
    let Some(text) = variable("HOSTLER_CACHE_LIMIT").filter(|value| !value.is_empty()) else {
        return Ok(32 << 30);
    };
    let text = text.to_string_lossy();
    text.parse::<bytesize::ByteSize>().map(|size| size.0).map_err(|_| StoreError::Limit(text.into_owned()))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn the_environment_chooses_the_directory() {
        let choose = |set: &[(&str, &str)]| {
            let set: HashMap<String, String> =
                set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            default_directory(|name| set.get(name).map(Into::into)).ok()
        };
        assert_eq!(choose(&[("HOSTLER_CACHE", "/c"), ("HOME", "/h")]), Some(PathBuf::from("/c")));
        assert_eq!(choose(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]), Some(PathBuf::from("/x/hostler")));
        assert_eq!(
            choose(&[("XDG_CACHE_HOME", "x"), ("HOME", "/h")]),
            Some(PathBuf::from("/h/.cache/hostler"))
        );
        assert_eq!(choose(&[]), None);
    }

    #[test]
    fn a_limit_is_a_size() {
        let limit = |text: Option<&str>| limit(|_| text.map(Into::into)).ok();
        assert_eq!(
            (limit(None), limit(Some("")), limit(Some("1MiB"))),
            (Some(32 << 30), Some(32 << 30), Some(1 << 20))
        );
        assert_eq!(limit(Some("much")), None);
    }
}
