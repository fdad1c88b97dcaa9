//! An error with its causes, as one line for people.

use std::error::Error;

/// The error, then each cause that says something new.
#[must_use]
pub fn in_one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Told(&'static str, #[source] Option<Box<Told>>);

    #[test]
    fn a_cause_that_says_nothing_new_is_left_out() {
        let deepest = Told("the disk is full", None);
        let same = Told("the disk is full", Some(Box::new(deepest)));
        let error = Told("could not write x", Some(Box::new(same)));
        assert_eq!(in_one_line(&error), "could not write x: the disk is full");
    }
}
