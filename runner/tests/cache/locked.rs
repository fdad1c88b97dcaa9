//! The same build again: with what its lock has and nothing else, and without a network.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hostler_runner::cache::offer::Offer as _;
use hostler_runner::cache::{FetchError, FetchOptions, Fetcher, Supply};
use hostler_runner::causes::in_one_line;
use hostler_runner::debian::release::ReleaseError;
use hostler_runner::debian::{self, InstallerArchives, SelectError, Selection};
use hostler_runner::event::Silent;
use hostler_runner::lock::Lock;
use hostler_runner::recipe::Recipe;

use super::upstream::{Signer, publish, publish_as};
use super::world::{BIG, WEEK, Warnings, World, ask, serve};

/// What a build does, and its lock.
fn build(world: &World, fetcher: &Fetcher) -> Result<(Selection, Lock), SelectError> {
    let selection = world.select(fetcher)?;
    debian::fetch(&selection, fetcher, &Silent)?;
    let lock = Lock { suites: selection.locked_suites(), files: fetcher.brought(), ..Lock::new() };
    // What is used again is what was written.
    let lock = Lock::parse(&lock.text().unwrap(), Path::new("x.lock")).unwrap();
    Ok((selection, lock))
}

fn supplied(world: &World, lock: Option<&Lock>, offline: bool) -> Arc<Fetcher> {
    let supply = Supply { lock: lock.cloned().map(Arc::new), offline };
    world.fetcher_with(FetchOptions { supply, ..World::options() })
}

fn manifest(selection: &Selection) -> Vec<(String, String)> {
    selection.packages.iter().map(|package| (package.name.clone(), package.file.digest.to_string())).collect()
}

/// Another release of the archive, with other files.
fn move_on(world: &World) {
    publish_as("Moved", &world.upstream, &world.signer, WEEK, SystemTime::now());
    world.upstream.state.lock().unwrap().files.remove(BIG);
}

#[test]
fn a_lock_names_every_file_in_its_order() {
    let world = World::new();
    let (selection, lock) = build(&world, &world.fetcher()).unwrap();
    let names: Vec<&str> = lock.files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "dists/bookworm/InRelease",
            "dists/bookworm/main/binary-amd64/Packages",
            "pool/apt_1+x_amd64.deb",
            "pool/big_1+x_amd64.deb"
        ]
    );
    assert!(lock.files[3].urls[0].ends_with(BIG));
    assert_eq!(lock.files[3].size, selection.packages[1].file.size);
    // Out of the cache it is the same.
    assert_eq!(build(&world, &world.fetcher()).unwrap().1, lock);
}

#[test]
fn a_locked_build_is_the_same_after_its_archive_moved_on_and_ran_out_with_no_network() {
    let world = World::new();
    let published = SystemTime::now() - WEEK + Duration::from_secs(4);
    publish(&world.upstream, &world.signer, WEEK, published);
    let (first, lock) = build(&world, &world.fetcher()).unwrap();
    std::thread::sleep(Duration::from_secs(5));
    move_on(&world);
    world.upstream.take_log();
    for offline in [true, false] {
        let (again, same) = build(&world, &supplied(&world, Some(&lock), offline)).unwrap();
        assert_eq!(manifest(&again), manifest(&first));
        assert_eq!(same, lock);
    }
    assert_eq!(world.upstream.take_log(), Vec::<String>::new());
    // Without the lock, what ran out is refused, also when there is no network to get another.
    let error = world.select(&supplied(&world, None, true)).err().unwrap();
    assert!(matches!(error, SelectError::Release { source: ReleaseError::Expired(_), .. }), "{error:?}");
}

#[test]
fn a_locked_build_on_another_host_fetches_what_the_lock_names() {
    let world = World::new();
    let (first, lock) = build(&world, &world.fetcher()).unwrap();
    let other = World { directory: tempfile::tempdir().unwrap(), ..world };
    let (again, same) = build(&other, &supplied(&other, Some(&lock), false)).unwrap();
    assert_eq!((manifest(&again), same), (manifest(&first), lock.clone()));

    // But what is gone is told by name.
    move_on(&other);
    let third = World { directory: tempfile::tempdir().unwrap(), ..other };
    let error = build(&third, &supplied(&third, Some(&lock), false)).err().unwrap();
    let told = in_one_line(&error);
    assert!(matches!(error, SelectError::Gone { .. }) && told.contains("dists/bookworm/InRelease"), "{told}");
    assert!(told.contains("hostler cache import"), "{told}");
}

#[test]
fn what_the_lock_does_not_have_is_refused_by_name_and_upstream_is_not_asked() {
    let world = World::new();
    let (_, mut lock) = build(&world, &world.fetcher()).unwrap();
    lock.files.retain(|file| !file.name.contains("big"));
    world.upstream.take_log();
    let fetcher = supplied(&world, Some(&lock), false);
    let selection = world.select(&fetcher).unwrap();
    let error = debian::fetch(&selection, &fetcher, &Silent).unwrap_err();
    assert!(matches!(error, FetchError::NotLocked { .. }), "{error}");
    assert!(error.to_string().starts_with("the lock does not have pool/big_1+x_amd64.deb"), "{error}");
    // The guest gets it no more than the host, though the cache has it.
    let (mirror, port) = serve(selection, &fetcher);
    assert_eq!(ask(port, "GET", BIG, "").0, 502);
    assert_eq!(ask(port, "GET", "/debian/pool/apt_1+x_amd64.deb", "").0, 200);
    assert!(mirror.stop().failures[0].reason.contains("the lock does not have"));
    assert_eq!(world.upstream.take_log(), Vec::<String>::new());
}

#[test]
fn without_a_network_the_first_thing_that_is_missing_is_named_at_once() {
    let world = World::new();
    let error = world.select(&supplied(&world, None, true)).err().unwrap();
    assert!(
        matches!(&error, SelectError::Fetch(FetchError::Offline { name }) if name == "dists/bookworm/InRelease"),
        "{error:?}"
    );
    world.select(&world.fetcher()).unwrap();
    world.upstream.take_log();
    let fetcher = supplied(&world, None, true);
    let selection = world.select(&fetcher).unwrap();
    let error = debian::fetch(&selection, &fetcher, &Silent).unwrap_err();
    assert!(matches!(&error, FetchError::Offline { name } if name.starts_with("pool/")), "{error}");
    assert_eq!(world.upstream.take_log(), Vec::<String>::new());
}

#[test]
fn a_lock_is_not_believed_about_who_signs() {
    let world = World::new();
    let (_, lock) = build(&world, &world.fetcher()).unwrap();
    let stranger = Signer::new();
    let recipe = World::recipe(&world.upstream.url(), &stranger.keyring());
    let fetcher = supplied(&world, Some(&lock), true);
    let error = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).err().unwrap();
    assert!(matches!(error, SelectError::Signature { .. }), "{error:?}");
}

#[test]
fn a_lock_does_not_choose_the_keyring() {
    let world = World::new();
    let (_, mut lock) = build(&world, &world.fetcher()).unwrap();
    let recipe = format!(
        "kind = \"debian\"\n[image]\nname = \"x\"\nsize = \"1GiB\"\n[debian]\nsource = \"{}\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\npackages = []\n",
        world.upstream.url()
    );
    let recipe = Recipe::parse(&recipe, Path::new("test.toml")).unwrap();
    for keyring in [world.signer.keyring(), "/tmp/debian-archive-keyring.gpg".into()] {
        lock.suites[0].keyring = Some(keyring);
        let fetcher = supplied(&world, Some(&lock), true);
        let error = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).err().unwrap();
        assert!(matches!(error, SelectError::LockedKeyring { .. }), "{error:?}");
    }
}

#[test]
fn what_debian_installer_reads_apart_is_signed_kept_and_locked() {
    let world = World::new();
    let files = ["/debian/dists/bookworm/Release", "/debian/dists/bookworm/Release.gpg"];
    let read = |fetcher: &Arc<Fetcher>, told: &Warnings| {
        let selection = Arc::new(world.select(fetcher).unwrap());
        let archives = InstallerArchives::read(&selection, "bookworm", fetcher, told).unwrap();
        let found = files.map(|path| archives.find(path).map(|offered| offered.wanted));
        (selection, found.into_iter().flatten().collect::<Vec<_>>())
    };
    let fetcher = world.fetcher();
    let (selection, offered) = read(&fetcher, &Warnings::default());
    assert_eq!(offered.len(), 2);
    // As the guest asks for them.
    offered.iter().for_each(|wanted| drop(fetcher.fetch(wanted).unwrap()));
    let lock = Lock { suites: selection.locked_suites(), files: fetcher.brought(), ..Lock::new() };
    // Without a network, with the lock and without.
    for lock in [None, Some(&lock)] {
        assert_eq!(read(&supplied(&world, lock, true), &Warnings::default()).1, offered);
    }
    // After a point release the lock's are still had from the cache.
    move_on(&world);
    let fetcher = supplied(&world, Some(&lock), false);
    let (_, again) = read(&fetcher, &Warnings::default());
    assert_eq!(again, offered);
    again.iter().for_each(|wanted| drop(fetcher.fetch(wanted).unwrap()));
    // A signature that is of something else is not handed on.
    let other = Signer::new();
    let text = String::from_utf8(world.upstream.state.lock().unwrap().files[files[0]].clone()).unwrap();
    world.upstream.state.lock().unwrap().files.insert(files[1].to_owned(), other.sign_apart(&text));
    let told = Warnings::default();
    assert_eq!(read(&world.fetcher(), &told).1, []);
    let told = told.0.into_inner().unwrap().join("\n");
    assert!(told.contains("may miss Release") && told.contains("none of its signers"), "{told}");
}
