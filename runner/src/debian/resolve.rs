//! Which packages a build takes: the closure of what it asks for.
//!
//! Pure and deterministic. Only the newest version of each name is ever considered, as apt does by
//! default; of alternatives, one that is already taken wins, then the first that clashes with nothing
//! taken, then the first. Deliberately absent: backtracking. Where the archive has no such solution,
//! the error names the chain that leads to the gap, and a recipe can name the package it wants.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::catalogue::{Catalogue, PackageId};
use super::relation::{self, Relation};

/// A set of packages that are complete and do not exclude each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolution {
    /// Ordered such that preinst scripts can be run in it: what a package pre-depends on comes
    /// first.
    pub packages: Vec<PackageId>,
    /// Those that nobody asked for by name.
    pub automatic: BTreeSet<PackageId>,
}

/// Why there is no such set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// A package was asked for that does not exist.
    #[error("no package is called {0}: check the name, the suite and the components")]
    Unknown(String),
    /// Nothing in the archive fulfils a relation.
    #[error("nothing fulfils {relation}, which {chain} needs: check suite and components, or leave it out")]
    Unsatisfiable {
        /// The relation with all its alternatives.
        relation: String,
        /// Who needs it, from the package that was asked for.
        chain: String,
    },
    /// Two packages exclude each other.
    #[error(
        "{left} and {right} exclude each other ({field}: {relation}); leave out what needs one of them: {chains}"
    )]
    Conflict {
        /// The one that says so.
        left: String,
        /// The other.
        right: String,
        /// `Conflicts` or `Breaks`.
        field: &'static str,
        /// The relation.
        relation: String,
        /// Who needs them.
        chains: String,
    },
    /// A relation is no relation.
    #[error("package {package} has an unreadable {field}: {text:?}")]
    Malformed {
        /// The package.
        package: String,
        /// The field.
        field: &'static str,
        /// The unreadable part.
        text: String,
    },
}

/// Finds the closure of `roots` over `Pre-Depends` and `Depends`.
///
/// # Errors
/// There is none; see [`ResolveError`].
pub fn resolve(
    catalogue: &Catalogue,
    architecture: &str,
    base: &[PackageId],
    wanted: &[String],
) -> Result<Resolution, ResolveError> {
    let mut search = Search { catalogue, architecture, taken: BTreeMap::new(), queue: VecDeque::new() };
    for package in base {
        search.take(*package, None);
    }
    for name in wanted {
        let package = catalogue.candidate(name).ok_or_else(|| ResolveError::Unknown(name.clone()))?;
        search.take(package, None);
    }
    while let Some(package) = search.queue.pop_front() {
        search.follow(package)?;
    }
    search.check_conflicts()?;
    let automatic =
        search.taken.values().filter(|taken| taken.needed_by.is_some()).map(|taken| taken.package).collect();
    Ok(Resolution { packages: search.order()?, automatic })
}

struct Taken {
    package: PackageId,
    needed_by: Option<PackageId>,
}

struct Search<'a> {
    catalogue: &'a Catalogue,
    architecture: &'a str,
    taken: BTreeMap<&'a str, Taken>,
    queue: VecDeque<PackageId>,
}

type Groups<'a> = Vec<Vec<Relation<'a>>>;

impl<'a> Search<'a> {
    fn take(&mut self, package: PackageId, needed_by: Option<PackageId>) {
        let name = self.catalogue.name(package);
        if !self.taken.contains_key(name) {
            self.taken.insert(name, Taken { package, needed_by });
            self.queue.push_back(package);
        }
    }

    fn relations(&self, package: PackageId, field: &'static str) -> Result<Groups<'a>, ResolveError> {
        let text = self.catalogue.stanza(package).get(field).unwrap_or("");
        relation::parse(text).map_err(|text| ResolveError::Malformed {
            package: self.catalogue.name(package).to_owned(),
            field,
            text: text.to_owned(),
        })
    }

    fn follow(&mut self, package: PackageId) -> Result<(), ResolveError> {
        for field in ["Pre-Depends", "Depends"] {
            for group in self.relations(package, field)? {
                if group.iter().any(|relation| self.taken_for(relation).is_some()) {
                    continue;
                }
                let options: Vec<PackageId> =
                    group.iter().flat_map(|relation| self.options(relation)).collect();
                let free = options.iter().find(|option| !self.clashes(**option)).or(options.first());
                let Some(option) = free else {
                    let relation: Vec<String> = group.iter().map(ToString::to_string).collect();
                    return Err(ResolveError::Unsatisfiable {
                        relation: relation.join(" | "),
                        chain: self.chain(package),
                    });
                };
                self.take(*option, Some(package));
            }
        }
        Ok(())
    }

    /// The taken package that fulfils a relation.
    fn taken_for(&self, relation: &Relation<'_>) -> Option<PackageId> {
        if !relation.fits(self.architecture) {
            return None;
        }
        if let Some(taken) = self.taken.get(relation.name)
            && relation.accepts(self.catalogue.version(taken.package))
        {
            return Some(taken.package);
        }
        self.catalogue
            .providers(relation.name)
            .iter()
            .find(|provider| {
                self.is_taken(provider.package) && relation.accepts_provided(provider.version.as_deref())
            })
            .map(|provider| provider.package)
    }

    fn is_taken(&self, package: PackageId) -> bool {
        self.taken.get(self.catalogue.name(package)).is_some_and(|taken| taken.package == package)
    }

    /// What could be taken for a relation, best first.
    fn options(&self, relation: &Relation<'_>) -> Vec<PackageId> {
        if !relation.fits(self.architecture) {
            return Vec::new();
        }
        let real = self
            .catalogue
            .candidate(relation.name)
            .filter(|package| relation.accepts(self.catalogue.version(*package)));
        let mut providers: Vec<PackageId> = self
            .catalogue
            .providers(relation.name)
            .iter()
            .filter(|provider| relation.accepts_provided(provider.version.as_deref()))
            .map(|provider| provider.package)
            .filter(|package| self.catalogue.candidate(self.catalogue.name(*package)) == Some(*package))
            .collect();
        providers.sort_by_key(|package| (self.rank(*package), self.catalogue.name(*package)));
        real.into_iter().chain(providers).collect()
    }

    fn rank(&self, package: PackageId) -> usize {
        let priority = self.catalogue.stanza(package).get("Priority").unwrap_or("");
        ["required", "important", "standard", "optional"]
            .iter()
            .position(|known| *known == priority)
            .unwrap_or(4)
    }

    /// Does `package` exclude a taken one, or the other way round?
    fn clashes(&self, package: PackageId) -> bool {
        let name = self.catalogue.name(package);
        if self.taken.get(name).is_some_and(|taken| taken.package != package) {
            return true;
        }
        self.taken.values().any(|taken| {
            matches!(self.exclusion(package, taken.package), Ok(Some(_)))
                || matches!(self.exclusion(taken.package, package), Ok(Some(_)))
        })
    }

    /// The relation by which `left` excludes `right`.
    fn exclusion(
        &self,
        left: PackageId,
        right: PackageId,
    ) -> Result<Option<(&'static str, Relation<'a>)>, ResolveError> {
        // A package may exclude all others that provide a name it provides itself (Policy 7.4).
        if left == right {
            return Ok(None);
        }
        let name = self.catalogue.name(right);
        for field in ["Conflicts", "Breaks"] {
            for relation in self.relations(left, field)?.into_iter().flatten() {
                if !relation.fits(self.architecture) {
                    continue;
                }
                let named = relation.name == name && relation.accepts(self.catalogue.version(right));
                let provided = || {
                    self.catalogue.providers(relation.name).iter().any(|provider| {
                        provider.package == right && relation.accepts_provided(provider.version.as_deref())
                    })
                };
                if named || provided() {
                    return Ok(Some((field, relation)));
                }
            }
        }
        Ok(None)
    }

    fn check_conflicts(&self) -> Result<(), ResolveError> {
        for left in self.taken.values() {
            for field in ["Conflicts", "Breaks"] {
                for relation in self.relations(left.package, field)?.into_iter().flatten() {
                    // Most relations name nobody who is here: look them up before comparing.
                    let named = self.taken.get(relation.name).map(|taken| taken.package);
                    let providers = self.catalogue.providers(relation.name).iter();
                    let others = named.into_iter().chain(providers.map(|provider| provider.package));
                    for right in others.filter(|other| self.is_taken(*other)) {
                        if let Some((field, relation)) = self.exclusion(left.package, right)? {
                            return Err(ResolveError::Conflict {
                                left: self.full_name(left.package),
                                right: self.full_name(right),
                                field,
                                relation: relation.to_string(),
                                chains: format!("{}; {}", self.chain(left.package), self.chain(right)),
                            });
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn full_name(&self, package: PackageId) -> String {
        format!("{} {}", self.catalogue.name(package), self.catalogue.version(package))
    }

    /// Who needs `package`, from the package that was asked for down to it.
    fn chain(&self, package: PackageId) -> String {
        let mut names = vec![self.catalogue.name(package)];
        let mut here = package;
        while let Some(above) = self.taken.get(self.catalogue.name(here)).and_then(|taken| taken.needed_by) {
            names.push(self.catalogue.name(above));
            here = above;
        }
        names.reverse();
        names.join(" → ")
    }

    /// Orders by `Pre-Depends`; among equals base-passwd and base-files lead, since other preinst
    /// scripts may look up the users that the former's creates.
    fn order(&self) -> Result<Vec<PackageId>, ResolveError> {
        let mut ordered = Vec::with_capacity(self.taken.len());
        let mut seen = BTreeSet::new();
        let leaders = ["base-passwd", "base-files"];
        let starts = leaders.iter().copied().chain(self.taken.keys().copied());
        for start in starts.filter_map(|name| self.taken.get(name)) {
            // An own stack: a hostile index must not be able to exhaust the thread's.
            let mut stack = vec![(start.package, false)];
            while let Some((package, done)) = stack.pop() {
                if done {
                    ordered.push(package);
                } else if seen.insert(package) {
                    stack.push((package, true));
                    let groups = self.relations(package, "Pre-Depends")?;
                    let before = groups
                        .iter()
                        .flat_map(|group| group.iter().find_map(|relation| self.taken_for(relation)));
                    for other in before.filter(|other| !seen.contains(other)) {
                        stack.push((other, false));
                    }
                }
            }
        }
        Ok(ordered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &str, wanted: &[&str]) -> Result<Vec<String>, String> {
        let text: String = text
            .split(';')
            .map(|stanza| {
                let mut fields = stanza.trim().split('/').map(str::trim);
                let (name, version) = fields.next().and_then(|head| head.split_once(' ')).expect("head");
                let rest: Vec<&str> = fields.collect();
                format!("Package: {name}\nVersion: {version}\nArchitecture: amd64\n{}\n\n", rest.join("\n"))
            })
            .collect();
        let mut catalogue = Catalogue::default();
        catalogue.add(0, text.into_bytes(), "amd64").expect("valid");
        let base: Vec<_> = catalogue.base().collect();
        let wanted: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
        resolve(&catalogue, "amd64", &base, &wanted)
            .map(|resolution| {
                resolution
                    .packages
                    .iter()
                    .map(|package| format!("{}-{}", catalogue.name(*package), catalogue.version(*package)))
                    .collect()
            })
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_closure_takes_the_newest_and_puts_pre_dependencies_first() {
        assert_eq!(
            run("a 1/Depends: c; b 1/Pre-Depends: c, d (>= 2); c 1; d 1; d 2; e 1", &["b", "a"]),
            Ok(["a-1", "d-2", "c-1", "b-1"].map(str::to_owned).to_vec())
        );
    }

    #[test]
    fn a_taken_alternative_wins_then_the_first_that_exists() {
        assert_eq!(
            run("a 1/Depends: x | c | b; b 1; c 1", &["a", "b"]),
            Ok(["a-1", "b-1"].map(str::to_owned).to_vec())
        );
        assert_eq!(
            run("a 1/Depends: x | c | b; b 1; c 1", &["a"]),
            Ok(["a-1", "c-1"].map(str::to_owned).to_vec())
        );
    }

    #[test]
    fn virtual_packages_by_priority_then_name() {
        let text =
            "a 1/Depends: awk; m 1/Provides: awk/Priority: required; g 1/Provides: awk/Priority: optional";
        assert_eq!(run(text, &["a"]), Ok(["a-1", "m-1"].map(str::to_owned).to_vec()));
        assert!(
            run("a 1/Depends: v (>= 2); b 1/Provides: v (= 1)", &["a"])
                .expect_err("too old")
                .starts_with("nothing fulfils v (>= 2), which a needs")
        );
    }

    #[test]
    fn a_gap_names_the_chain() {
        assert_eq!(
            run("a 1/Depends: b; b 1/Depends: c (>= 3) | z; c 1", &["a"]),
            Err(
                "nothing fulfils c (>= 3) | z, which a → b needs: check suite and components, or leave it out"
                    .to_owned()
            )
        );
        assert!(run("a 1", &["zz"]).expect_err("unknown").starts_with("no package is called zz"));
    }

    #[test]
    fn exclusions_name_both() {
        let error = run("a 1/Depends: c; b 1/Breaks: c (<< 2); c 1", &["a", "b"]).expect_err("conflict");
        assert!(error.starts_with("b 1 and c 1 exclude each other (Breaks: c (<< 2))"), "{error}");
        assert!(error.ends_with("b; a → c"), "{error}");
    }

    #[test]
    fn excluding_the_own_virtual_name_excludes_only_others() {
        let text = "a 1/Provides: mta/Conflicts: mta; b 1/Provides: mta";
        assert!(run(text, &["a"]).is_ok());
        assert!(run(text, &["a", "b"]).is_err());
    }

    #[test]
    fn an_alternative_that_clashes_is_passed_over() {
        let text = "a 1/Depends: u | m; u 1/Conflicts: b; m 1; b 1";
        assert_eq!(
            run(text, &["a", "b"]),
            Ok(["b-1", "a-1", "m-1"]
                .map(str::to_owned)
                .into_iter()
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect::<Vec<_>>())
        );
    }

    #[test]
    fn base_comes_without_being_asked_for_and_cycles_end() {
        let text = "base-passwd 1/Essential: yes/Depends: a; a 1/Pre-Depends: b; b 1/Pre-Depends: a";
        assert_eq!(run(text, &[]), Ok(["base-passwd-1", "b-1", "a-1"].map(str::to_owned).to_vec()));
    }

    proptest::proptest! {
        #[test]
        fn every_result_is_closed_and_ordered(edges in proptest::collection::vec((0..8_u8, 0..8_u8), 0..20)) {
            let mut text = String::new();
            for from in 0..8_u8 {
                // Only towards lower numbers: real archives have no cycles of Pre-Depends.
                let to: Vec<String> = edges.iter().filter(|edge| edge.0 == from && edge.1 < from)
                    .map(|edge| format!("p{}", edge.1)).collect();
                let separator = if from == 0 { "" } else { ";" };
                text.push_str(&format!("{separator}p{from} 1/Pre-Depends: {}", to.join(", ")));
            }
            let result = run(&text, &["p7"]).expect("solvable");
            for (from, to) in edges.iter().filter(|edge| edge.1 < edge.0) {
                let position = |name: &u8| result.iter().position(|entry| *entry == format!("p{name}-1"));
                if let Some(from) = position(from) {
                    let to = position(to);
                    proptest::prop_assert!(to.is_some_and(|to| to < from));
                }
            }
        }
    }
}
