//! How the upstreams of one thing failed, and what that comes to. Pure.

use std::collections::BTreeMap;

use super::fetch_error::FetchError;
use super::upstream::upstream_of;

/// The latest failure of each address, by its place among all.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<usize, FetchError>);

impl Failures {
    /// Notes a failure.
    pub(super) fn note(&mut self, place: usize, error: FetchError) {
        self.0.insert(place, error);
    }

    /// Is it of use to ask this address again?
    pub(super) fn may_do_better(&self, place: usize) -> bool {
        self.0.get(&place).is_none_or(FetchError::is_transient)
    }

    /// Is it of use to ask any of them again?
    pub(super) fn are_transient(&self) -> bool {
        self.0.values().any(FetchError::is_transient)
    }

    /// Those of `urls` whose upstreams are away: one that answers wrongly must be heard.
    pub(super) fn away<'a>(&self, urls: &'a [String]) -> impl Iterator<Item = &'a String> {
        let is_away = |(place, error): (&usize, &FetchError)| error.is_transient().then_some(*place);
        let places: Vec<usize> = self.0.iter().filter_map(is_away).collect();
        places.into_iter().filter_map(|place| urls.get(place))
    }

    /// One error that names them all.
    pub(super) fn into_error(self, name: &str, urls: &[String]) -> FetchError {
        let upstream = |place: usize| urls.get(place).map_or_else(String::new, |url| upstream_of(url));
        together(name, self.0.into_iter().map(|(place, error)| (upstream(place), error)).collect())
    }
}

/// One error for the failures of several upstreams: that of the one which tells most, with the others' beside it.
pub(super) fn together(name: &str, mut failures: Vec<(String, FetchError)>) -> FetchError {
    let may_do_better = failures.iter().any(|(_, error)| error.is_transient());
    let most = failures.iter().map(|(_, error)| tells(error)).max();
    let place = failures.iter().position(|(_, error)| Some(tells(error)) == most);
    let Some((upstream, source)) = place.map(|place| failures.remove(place)) else {
        return FetchError::NoUpstream { name: name.to_owned() };
    };
    if failures.is_empty() {
        return source;
    }
    let others = failures.into_iter().map(|(upstream, error)| format!("{upstream}: {error}")).collect();
    FetchError::Everywhere {
        name: name.to_owned(),
        others,
        upstream,
        may_do_better,
        source: Box::new(source),
    }
}

/// How much a failure tells: what an upstream says of the file more than what comes instead of it, and both more
/// than that it is away.
fn tells(error: &FetchError) -> u8 {
    match error {
        FetchError::Status { status: ..500, .. } if !error.is_transient() => 5,
        FetchError::Altered { .. }
        | FetchError::OtherSize { .. }
        | FetchError::TooLong { .. }
        | FetchError::Oversized { .. } => 4,
        FetchError::Untrusted { .. } => 3,
        FetchError::Truncated { .. } => 2,
        FetchError::Status { .. } | FetchError::Silent { .. } | FetchError::Slow { .. } => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls() -> Vec<String> {
        ["http://a.test/x", "http://b.test/x", "http://c.test/x"].map(str::to_owned).to_vec()
    }

    fn status(status: u16) -> FetchError {
        FetchError::Status { name: "x".to_owned(), status }
    }

    #[test]
    fn each_failure_is_named_and_the_most_telling_one_counts() {
        let mut failures = Failures::default();
        failures.note(0, status(404));
        failures.note(1, status(503));
        failures.note(2, FetchError::Oversized { name: "x".to_owned() });
        assert!(failures.are_transient());
        assert_eq!([0, 1, 2].map(|place| failures.may_do_better(place)), [false, true, false]);
        assert_eq!(failures.away(&urls()).collect::<Vec<_>>(), ["http://b.test/x"]);
        let error = failures.into_error("x", &urls());
        // One is away, and may have it.
        assert_eq!((error.status(), error.refusal()), (Some(404), None));
        let told = crate::causes::in_one_line(&error);
        for upstream in
            ["http://a.test", "http://b.test: upstream answered 503", "http://c.test: upstream sent"]
        {
            assert!(told.contains(upstream), "{told}");
        }
    }

    #[test]
    fn it_is_nowhere_only_where_each_says_so_for_good() {
        let of = |all: &[u16]| {
            let mut failures = Failures::default();
            for (place, one) in all.iter().enumerate() {
                failures.note(place, status(*one));
            }
            failures.into_error("x", &urls())
        };
        assert_eq!(of(&[404, 410]).refusal(), Some(404));
        assert_eq!(of(&[404]).refusal(), Some(404));
        assert_eq!(of(&[404, 503]).refusal(), None);
        // Too many requests tell nothing of the file.
        assert_eq!(of(&[429]).refusal(), None);
        let error = of(&[429, 404]);
        assert_eq!((error.status(), error.refusal()), (Some(404), None));
        assert!(error.is_of_upstreams());
        assert!(!FetchError::BrokenOff { name: "x".to_owned() }.is_of_upstreams());
    }

    #[test]
    fn one_failure_is_itself_and_none_is_that_nobody_is_known() {
        assert!(matches!(Failures::default().into_error("x", &[]), FetchError::NoUpstream { .. }));
        let mut failures = Failures::default();
        failures.note(1, status(404));
        failures.note(1, status(410));
        assert!(matches!(failures.into_error("x", &urls()), FetchError::Status { status: 410, .. }));
    }
}
