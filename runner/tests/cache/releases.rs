//! Signed Release files: which are believed, and which are passed over.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hostler_runner::cache::FetchOptions;
use hostler_runner::debian::release::ReleaseError;
use hostler_runner::debian::signature::{Distrust, SignatureError};
use hostler_runner::debian::{self, SelectError, Selection};
use hostler_runner::event::Silent;

use super::upstream::{Fault, Signer, Upstream, publish, publish_as};
use super::world::{WEEK, Warnings, World};

#[test]
fn an_altered_release_file_is_not_believed() {
    let world = World::new();
    world.upstream.fault("/debian/dists/bookworm/InRelease", Fault::Flipped);
    let error = world.select(&world.fetcher()).err().unwrap();
    let SelectError::Signature { source: SignatureError::Distrusted(distrust), .. } = &error else {
        panic!("{error:?}");
    };
    assert!(matches!(distrust, Distrust::Bad(_) | Distrust::Unsigned), "{distrust}");
    assert_eq!(world.kept().0, Vec::<PathBuf>::new());
    world.upstream.heal();
    world.select(&world.fetcher()).unwrap();
}

#[test]
fn text_around_the_signed_part_is_not_believed() {
    let world = World::new();
    let path = "/debian/dists/bookworm/InRelease".to_owned();
    {
        let mut state = world.upstream.state.lock().unwrap();
        let signed = state.files[&path].clone();
        let mut bytes = b"Codename: evil\nDate: Sat, 21 Nov 2026 00:53:02 UTC\nSHA256:\n\n".to_vec();
        bytes.extend(signed);
        state.files.insert(path, bytes);
    }
    let result = world.select(&world.fetcher());
    assert!(result.is_err() || result.unwrap().repositories[0].suites[0].release.codename == "bookworm");
}

#[test]
fn another_signer_is_not_believed() {
    let world = World::new();
    let stranger = Signer::new();
    let recipe = World::recipe(&world.upstream.url(), &stranger.keyring());
    let error = debian::select(&recipe, &world.fetcher(), Path::new("/"), &Silent).err().unwrap();
    assert!(
        matches!(
            error,
            SelectError::Signature { source: SignatureError::Distrusted(Distrust::UnknownSigner(_)), .. }
        ),
        "{error:?}"
    );
}

#[test]
fn a_replayed_release_file_does_not_win() {
    let world = World::new();
    let newer = world.select(&world.fetcher()).unwrap();
    let earlier = SystemTime::now() - Duration::from_secs(86_400);
    publish(&world.upstream, &world.signer, WEEK, earlier);
    let replayed = world.select(&world.fetcher()).unwrap();
    let date = |selection: &Selection| selection.repositories[0].suites[0].release.date;
    assert_eq!(date(&replayed), date(&newer));
    // Nor one from when the suite's name was of another release; the first of equal fields counts.
    publish_as("Test\nCodename: bullseye", &world.upstream, &world.signer, WEEK, earlier);
    assert_eq!(date(&world.select(&world.fetcher()).unwrap()), date(&newer));
}

#[test]
fn a_mirror_whose_release_file_is_of_no_use_is_passed_over() {
    let world = World::new();
    let other = Upstream::start();
    let file = "/debian/dists/bookworm/InRelease";
    let bad = |with: &dyn Fn()| {
        other.heal();
        publish(&other, &world.signer, WEEK, SystemTime::now());
        with();
        let mirrors = vec![format!("http://{}", other.address)];
        let fetcher = world.fetcher_with(FetchOptions { mirrors, ..World::options() });
        let recipe = World::recipe(&world.upstream.url(), &world.signer.keyring());
        let told = Warnings::default();
        debian::select(&recipe, &fetcher, Path::new("/"), &told).unwrap();
        let told = told.0.into_inner().unwrap().join("\n");
        assert!(told.contains("its answer cannot be used"), "{told}");
        told
    };
    assert!(bad(&|| other.fault(file, Fault::Other)).contains("not one text with a signature"));
    assert!(bad(&|| other.fault(file, Fault::Flipped)).contains("cannot trust"));
    let old = SystemTime::now() - 2 * WEEK;
    assert!(bad(&|| publish(&other, &world.signer, WEEK, old)).contains("it was valid until"));
    // Where all are like that, the first is heard.
    world.upstream.fault(file, Fault::Other);
    let error = world.select(&world.fetcher()).err().unwrap();
    assert!(matches!(error, SelectError::Signature { .. }), "{error:?}");
}

#[test]
fn a_keyring_may_be_armored() {
    let world = World::new();
    let recipe = World::recipe(&world.upstream.url(), &world.signer.armored_keyring());
    debian::select(&recipe, &world.fetcher(), Path::new("/"), &Silent).unwrap();
}

#[test]
fn a_release_file_that_ran_out_is_refused() {
    let world = World::new();
    publish(&world.upstream, &world.signer, WEEK, SystemTime::now() - 2 * WEEK);
    let error = world.select(&world.fetcher()).err().unwrap();
    assert!(matches!(error, SelectError::Release { source: ReleaseError::Expired(_), .. }), "{error:?}");
}

#[test]
fn of_several_upstreams_the_failure_is_not_the_last_ones_alone() {
    let world = World::new();
    let fetcher = world.fetcher();
    world.select(&fetcher).unwrap();
    let file = "/debian/dists/bookworm/InRelease";
    let other = Upstream::start();
    let select = |mirror: &Upstream, upstream: &Upstream| {
        let mirrors = vec![format!("http://{}", mirror.address)];
        let fetcher = world.fetcher_with(FetchOptions { mirrors, ..World::options() });
        let recipe = World::recipe(&upstream.url(), &world.signer.keyring());
        debian::select(&recipe, &fetcher, Path::new("/"), &Silent)
    };
    // One is away, and what it answered last is kept, whatever the other says, before it or after it.
    world.upstream.fault(file, Fault::Status(503));
    select(&other, &world.upstream).unwrap();
    select(&world.upstream, &other).unwrap();
    // One that says that it is gone is heard.
    world.upstream.fault(file, Fault::Status(410));
    other.state.lock().unwrap().files.insert(file.to_owned(), Vec::new());
    other.fault(file, Fault::Status(503));
    let error = select(&world.upstream, &other).err().unwrap();
    let told = hostler_runner::causes::in_one_line(&error);
    for said in ["answered 410", "answered 503"] {
        assert!(told.contains(said), "{told}");
    }
}
