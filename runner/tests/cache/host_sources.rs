//! The host's own apt sources, some of which are not Debian's.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use hostler_runner::cache::{Cache, FetchOptions, Fetcher, Supply};
use hostler_runner::causes::in_one_line;
use hostler_runner::debian::{self, SelectError, Selection};
use hostler_runner::lock::Lock;
use hostler_runner::recipe::Recipe;

use super::upstream::{Fault, Signer, Upstream, publish, publish_as};
use super::world::{WEEK, Warnings, World};

/// A host with apt sources of the test's own, and what Debian is to it.
struct Host {
    root: tempfile::TempDir,
    debian: Upstream,
    debians_key: Signer,
    other: Upstream,
    others_key: Signer,
    told: Warnings,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            root: tempfile::tempdir().unwrap(),
            debian: Upstream::start(),
            debians_key: Signer::new(),
            other: Upstream::start(),
            others_key: Signer::new(),
            told: Warnings::default(),
        };
        publish_as("Debian", &host.debian, &host.debians_key, WEEK, SystemTime::now());
        publish(&host.other, &host.others_key, WEEK, SystemTime::now());
        host.install(&host.debians_key, "usr/share/keyrings/debian-archive-keyring.gpg");
        host
    }

    fn install(&self, signer: &Signer, path: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::copy(signer.keyring(), path).unwrap();
    }

    fn select(&self, sources: &str, keyring: Option<&Path>) -> Result<Selection, SelectError> {
        self.select_locked(sources, keyring, None)
    }

    fn select_locked(
        &self,
        sources: &str,
        keyring: Option<&Path>,
        lock: Option<Lock>,
    ) -> Result<Selection, SelectError> {
        fs::create_dir_all(self.root.path().join("etc/apt")).unwrap();
        let text = sources.replace("DEBIAN", &self.debian.url()).replace("OTHER", &self.other.url());
        fs::write(self.root.path().join("etc/apt/sources.list"), text).unwrap();
        let keyring = keyring.map_or(String::new(), |path| format!("keyring = \"{}\"\n", path.display()));
        let recipe = format!(
            "kind = \"debian\"\n[image]\nname = \"x\"\nsize = \"1GiB\"\n[debian]\nsource = \"host-apt\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\n{keyring}packages = []\n"
        );
        let recipe = Recipe::parse(&recipe, Path::new("test.toml")).unwrap();
        let cache = Cache::open(&self.root.path().join("cache")).unwrap();
        let supply = Supply { lock: lock.map(Arc::new), offline: false };
        let options = FetchOptions { supply, ..World::options() };
        let fetcher = Fetcher::new(Arc::new(cache), options).unwrap();
        debian::select(&recipe, &fetcher, self.root.path(), &self.told)
    }

    fn warned(&self) -> String {
        self.told.0.lock().unwrap().join("\n")
    }

    fn is_debians_alone(&self, selection: &Selection) -> bool {
        matches!(selection.repositories.as_slice(), [only] if only.uris == [self.debian.url()])
    }
}

#[test]
fn a_third_partys_source_that_does_not_say_who_signs_it_is_left_out() {
    let host = Host::new();
    // apt knows its key, as it does of sources from before `Signed-By`.
    host.install(&host.others_key, "etc/apt/trusted.gpg.d/other.gpg");
    // In whichever order they come.
    for sources in [
        "deb OTHER bookworm main\ndeb DEBIAN bookworm main\n",
        "deb DEBIAN bookworm main\ndeb OTHER bookworm main\n",
    ] {
        let selection = host.select(sources, None).unwrap();
        assert!(host.is_debians_alone(&selection));
        let warned = host.warned();
        assert!(
            warned.contains(&format!("apt source {} with suite bookworm is left out", host.other.url()))
                && warned.contains("none of its signers"),
            "{warned}"
        );
    }
}

#[test]
fn a_source_that_is_away_is_left_out_only_where_a_trusted_one_serves_its_suite() {
    let host = Host::new();
    let file = "/debian/dists/bookworm/InRelease";
    host.other.fault(file, Fault::Status(404));
    let selection = host.select("deb OTHER bookworm main\ndeb DEBIAN bookworm main\n", None).unwrap();
    assert!(host.is_debians_alone(&selection));
    // Debian's security updates, as far as anyone can tell, and somebody on the way wants them away.
    let security = "deb DEBIAN bookworm main\ndeb OTHER bookworm-security main\n";
    assert!(matches!(host.select(security, None), Err(SelectError::Fetch(_))));
    // A component that no other has.
    let more = "deb DEBIAN bookworm main\ndeb OTHER bookworm main contrib\n";
    let recipe_asks_for_main_only = host.select(more, None).unwrap();
    assert!(host.is_debians_alone(&recipe_asks_for_main_only));
}

#[test]
fn debians_own_source_needs_no_signed_by() {
    let host = Host::new();
    let selection = host.select("deb DEBIAN bookworm main\n", None).unwrap();
    assert!(host.is_debians_alone(&selection));
    assert_eq!(host.warned(), "");
}

#[test]
fn a_host_with_strangers_only_is_told_what_to_do() {
    let host = Host::new();
    let error = host.select("deb OTHER bookworm main\n", None).err().unwrap();
    let told = in_one_line(&error);
    assert!(told.contains(&host.other.url()) && told.contains("none of its signers"), "{told}");
    assert!(told.contains("debian.keyring"), "{told}");
    // One that Debian's key signs, and that says itself that it is another's.
    publish(&host.other, &host.debians_key, WEEK, SystemTime::now());
    let error = host.select("deb OTHER bookworm main\n", None).err().unwrap();
    assert!(matches!(error, SelectError::NotDebian { .. }), "{error}");
    // A lock does not make it Debian's.
    let keyring = host.debians_key.keyring();
    let selection = host.select("deb OTHER bookworm main\n", Some(&keyring)).unwrap();
    let lock = Lock { suites: selection.locked_suites(), ..Lock::new() };
    let error = host.select_locked("deb DEBIAN bookworm main\n", None, Some(lock)).err().unwrap();
    assert!(matches!(error, SelectError::NotDebian { .. }), "{error}");
}

#[test]
fn with_a_keyring_of_the_recipes_only_its_signers_sources_count() {
    let host = Host::new();
    let keyring = host.others_key.keyring();
    let sources = "deb DEBIAN bookworm main\ndeb OTHER bookworm main\n";
    let selection = host.select(sources, Some(&keyring)).unwrap();
    assert!(matches!(selection.repositories.as_slice(), [only] if only.uris == [host.other.url()]));
    assert!(host.warned().contains(&host.debian.url()), "{}", host.warned());
}
