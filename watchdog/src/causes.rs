//! An error with its causes, as one line.

use std::error::Error;

/// `error` and all its causes, joined by colons; one that its effect has named already is left out.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let said = source.to_string();
        if !line.contains(&said) {
            line.push_str(": ");
            line.push_str(&said);
        }
        cause = source.source();
    }
    line
}
