//! Mirrors of an archive: snapshots that change in one step, and what is served out of them.

use std::net::TcpListener;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use hostler_runner::cache::{Clients, FetchError, FetchOptions, Fetcher, Mirror, Supply};
use hostler_runner::debian;
use hostler_runner::event::Silent;
use hostler_runner::lock::Lock;
use hostler_runner::mirror::debian::{Extent, Wish, plan};
use hostler_runner::mirror::{Directory, DirectoryError, Plan, Published, Served};
use hostler_runner::recipe::{Debian, PackageSource};

use super::upstream::{Fault, publish_as};
use super::world::{BIG, WEEK, World, ask};

/// A mirror of the world's archive.
struct Site {
    world: World,
    root: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        Self { world: World::new(), root: tempfile::tempdir().unwrap() }
    }

    fn fetcher(&self) -> Arc<Fetcher> {
        self.fetcher_with(World::options())
    }

    fn fetcher_with(&self, options: FetchOptions) -> Arc<Fetcher> {
        let store = Directory::create(self.root.path()).unwrap().store().unwrap();
        Arc::new(Fetcher::new(Arc::new(store), options).unwrap())
    }

    fn sync(&self, extent: Extent, keep: usize) -> Result<Published, DirectoryError> {
        self.sync_with(extent, keep, &self.fetcher())
    }

    fn sync_with(&self, extent: Extent, keep: usize, fetcher: &Fetcher) -> Result<Published, DirectoryError> {
        let archive = Debian {
            source: PackageSource::Url(self.world.upstream.url()),
            suite: "bookworm".to_owned(),
            architecture: "amd64".to_owned(),
            components: vec!["main".to_owned()],
            keyring: Some(self.world.signer.keyring()),
            packages: Vec::new(),
        };
        let wish = Wish { archive, architectures: vec!["amd64".to_owned()], extent, installer: Vec::new() };
        let plan = plan(&wish, fetcher, Path::new("/"), &Silent).unwrap();
        Directory::create(self.root.path()).unwrap().publish(plan, keep, fetcher, &Silent)
    }

    fn publish(&self, origin: &str) {
        publish_as(origin, &self.world.upstream, &self.world.signer, WEEK, SystemTime::now());
    }

    fn serve(&self) -> (Mirror, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let store = Directory::open(self.root.path()).unwrap().served_store().unwrap();
        let fetcher = Arc::new(Fetcher::new(Arc::new(store), World::options()).unwrap());
        let served = Served::open(self.root.path()).unwrap();
        (Mirror::start(listener, served, Clients::Anyone, fetcher).unwrap(), port)
    }

    /// How many Release files the store has.
    fn release_files(&self) -> usize {
        let folders = std::fs::read_dir(self.root.path().join("store/sha256")).unwrap();
        let files = folders.flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap());
        let is_one = |path: &Path| {
            let bytes = std::fs::read(path).unwrap();
            bytes.starts_with(b"-----BEGIN PGP SIGNED MESSAGE")
        };
        files.filter(|file| is_one(&file.as_ref().unwrap().path())).count()
    }

    /// The files below a path of the current tree.
    fn tree(&self) -> Vec<String> {
        fn walk(folder: &Path, root: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, root, found);
                } else {
                    found.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        let root = self.root.path().join("current");
        let mut found = Vec::new();
        walk(&root, &root, &mut found);
        found.sort();
        found
    }
}

#[test]
fn a_mirror_changes_in_one_step_and_keeps_what_its_policy_says() {
    let site = Site::new();
    let first = site.sync(Extent::Whole, 1).unwrap();
    assert!(first.changed);
    let tree = site.tree();
    assert!(
        tree.contains(&BIG[1..].to_owned()) && tree.contains(&"debian/dists/bookworm/InRelease".to_owned())
    );
    assert!(tree.iter().any(|path| path.contains("by-hash/SHA256/")), "{tree:?}");

    // Nothing has changed: nothing is fetched but the Release file's "not modified".
    site.world.upstream.take_log();
    let again = site.sync(Extent::Whole, 1).unwrap();
    assert_eq!((again.changed, &again.snapshot), (false, &first.snapshot));
    assert_eq!(site.world.upstream.take_log(), ["/debian/dists/bookworm/InRelease"]);

    site.publish("Second");
    let second = site.sync(Extent::Whole, 1).unwrap();
    site.publish("Third");
    let third = site.sync(Extent::Whole, 1).unwrap();
    assert_eq!(third.removed, [first.snapshot]);
    let directory = Directory::open(site.root.path()).unwrap();
    assert_eq!(directory.snapshots().unwrap(), [second.snapshot, third.snapshot]);
    // What no snapshot has any more goes: of three Release files, two are left.
    assert_eq!(site.release_files(), 2);
}

#[test]
fn a_server_keeps_nothing_that_no_snapshot_has_any_more() {
    let site = Site::new();
    site.sync(Extent::Closure, 1).unwrap();
    let (mirror, port) = site.serve();
    let release = || ask(port, "GET", "/debian/dists/bookworm/InRelease", "").2;
    let first = release();
    for (origin, left) in [("Second", 2), ("Third", 2), ("Fourth", 2)] {
        site.publish(origin);
        site.sync(Extent::Closure, 1).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(600));
        assert!(release() != first, "the old one is served");
        assert_eq!(site.release_files(), left, "{origin}");
    }
    assert_eq!(mirror.stop().failures, []);
}

#[test]
fn a_sync_that_fails_leaves_the_mirror_as_it_was_and_goes_on_from_there() {
    let site = Site::new();
    let first = site.sync(Extent::Whole, 1).unwrap();
    site.publish("Second");
    // Another package, which the mirror does not get.
    {
        let mut state = site.world.upstream.state.lock().unwrap();
        let index = state.files.keys().find(|path| path.contains("by-hash")).unwrap().clone();
        assert!(state.files.remove(&index).is_some());
    }
    std::fs::remove_dir_all(site.root.path().join("store")).unwrap();
    // Late, so that the other has been fetched by then.
    site.world.upstream.fault(BIG, Fault::Stuck(1000));
    site.publish("Second");
    let error = site.sync(Extent::Whole, 1).unwrap_err();
    assert!(
        matches!(&error, DirectoryError::Fetch(FetchError::Silent { name, .. }) if name.contains("big")),
        "{error:?}"
    );
    let directory = Directory::open(site.root.path()).unwrap();
    assert_eq!(directory.current().unwrap(), Some(first.snapshot));
    assert!(site.tree().contains(&BIG[1..].to_owned()));

    site.world.upstream.heal();
    site.world.upstream.take_log();
    assert!(site.sync(Extent::Whole, 1).unwrap().changed);
    let log = site.world.upstream.take_log();
    assert!(
        log.contains(&BIG.to_owned()) && !log.contains(&"/debian/pool/apt_1+x_amd64.deb".to_owned()),
        "{log:?}"
    );
}

#[test]
fn a_mirror_serves_what_is_checked_takes_over_a_new_snapshot_and_mends_what_is_damaged() {
    let site = Site::new();
    site.sync(Extent::Closure, 1).unwrap();
    let (mirror, port) = site.serve();
    let original = site.world.upstream.state.lock().unwrap().files[BIG].clone();
    assert!(ask(port, "GET", BIG, "").2 == original);
    assert_eq!(ask(port, "GET", "/debian/pool/other.deb", "").0, 404);
    assert_eq!(ask(port, "GET", "/store/lock", "").0, 404);
    let release = ask(port, "GET", "/debian/dists/bookworm/InRelease", "").2;

    site.publish("Second");
    site.sync(Extent::Closure, 1).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(600));
    assert!(ask(port, "GET", "/debian/dists/bookworm/InRelease", "").2 != release, "the old one is served");

    // A byte is flipped on the disk.
    let path = site.root.path().join("current").join(&BIG[1..]);
    let mut bytes = original.clone();
    bytes[1234] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!(ask(port, "GET", BIG, "").2 == original);
    assert_eq!(mirror.stop().failures.len(), 2);
    // Served is one thing; in the tree for other servers it still is, though the store is whole.
    assert!(std::fs::read(&path).unwrap() == bytes);
    let directory = Directory::open(site.root.path()).unwrap();
    let verified = directory.verify(&site.fetcher(), &Silent).unwrap();
    assert_eq!((verified.repaired.len(), verified.lost.len()), (1, 0));
    assert!(std::fs::read(&path).unwrap() == original);
    let verified = directory.verify(&site.fetcher(), &Silent).unwrap();
    assert_eq!((verified.repaired.len(), verified.lost.len()), (0, 0));
}

#[test]
fn what_cannot_be_repaired_is_told_until_it_can_be_and_hides_nothing_else() {
    let site = Site::new();
    site.sync(Extent::Whole, 1).unwrap();
    let originals: Vec<(PathBuf, Vec<u8>)> = [&BIG[1..], "debian/pool/apt_1+x_amd64.deb"]
        .map(|path| site.root.path().join("current").join(path))
        .map(|path| (path.clone(), std::fs::read(&path).unwrap()))
        .into();
    for (path, original) in &originals {
        std::fs::write(path, &original[1..]).unwrap();
    }
    // What a check that was killed has left.
    std::fs::write(site.root.path().join(".repaired"), "x").unwrap();
    site.world.upstream.fault(BIG, Fault::Status(404));
    let directory = Directory::open(site.root.path()).unwrap();
    for repaired in [1, 0] {
        let verified = directory.verify(&site.fetcher(), &Silent).unwrap();
        assert_eq!(verified.repaired.len(), repaired);
        let [(path, FetchError::Status { status: 404, .. })] = verified.lost.as_slice() else {
            panic!("{verified:?}");
        };
        assert_eq!(path, &BIG[1..]);
        assert!(std::fs::read(&originals[1].0).unwrap() == originals[1].1);
    }
    site.world.upstream.heal();
    let verified = directory.verify(&site.fetcher(), &Silent).unwrap();
    assert_eq!((verified.repaired.len(), verified.lost.len()), (1, 0));
    assert!(std::fs::read(&originals[0].0).unwrap() == originals[0].1);
}

#[test]
fn a_tree_is_for_every_server_and_a_clock_that_went_back_stops_no_sync() {
    let site = Site::new();
    site.sync(Extent::Whole, 1).unwrap();
    let mode = std::fs::metadata(site.root.path().join("current").join(&BIG[1..])).unwrap().mode();
    assert_eq!(mode & 0o777, 0o644);
    // Later than now, by name; and what is no snapshot at all.
    let snapshots = site.root.path().join("snapshots");
    let directory = Directory::open(site.root.path()).unwrap();
    let newest = directory.snapshots().unwrap().remove(0);
    std::fs::rename(snapshots.join(newest), snapshots.join("20990101T000000Z")).unwrap();
    std::fs::remove_file(site.root.path().join("current")).unwrap();
    let tree = Path::new("snapshots/20990101T000000Z/tree");
    std::os::unix::fs::symlink(tree, site.root.path().join("current")).unwrap();
    for stray in ["lost+found", "backup"] {
        std::fs::create_dir(snapshots.join(stray)).unwrap();
    }
    for second in ["20990101T000001Z", "20990101T000002Z"] {
        site.publish(second);
        assert_eq!(site.sync(Extent::Whole, 1).unwrap().snapshot, second);
    }
    assert!(snapshots.join("lost+found").exists() && snapshots.join("backup").exists());
}

#[test]
fn a_sync_of_another_suite_does_not_take_the_first_away_unasked() {
    let site = Site::new();
    let first = site.sync(Extent::Whole, 1).unwrap();
    let fetcher = site.fetcher();
    let directory = Directory::open(site.root.path()).unwrap();
    let mut plan = directory.manifest(&first.snapshot).unwrap();
    plan.files.retain(|path, _| !path.contains("/dists/"));
    let other =
        |replace| Plan { folders: plan.folders.clone().into_iter().collect(), files: Vec::new(), replace };
    let error = directory.publish(other(false), 1, &fetcher, &Silent).unwrap_err();
    assert!(error.to_string().contains("the mirror has suite bookworm in its folder debian"), "{error}");
    assert_eq!(directory.current().unwrap(), Some(first.snapshot));
    assert_eq!(directory.publish(other(true), 1, &fetcher, &Silent).unwrap().files, 0);
}

#[test]
fn a_mirror_of_a_lock_has_what_its_build_read_and_not_what_the_archive_has_beside() {
    let site = Site::new();
    let fetcher = site.world.fetcher();
    let selection = site.world.select(&fetcher).unwrap();
    debian::fetch(&selection, &fetcher, &Silent).unwrap();
    let lock = Lock { suites: selection.locked_suites(), files: fetcher.brought(), ..Lock::new() };
    let extent = Extent::Digests(lock.digests().into_iter().collect());
    let supply = Supply { lock: Some(Arc::new(lock)), offline: false };
    let locked = site.fetcher_with(FetchOptions { supply, ..World::options() });
    assert!(site.sync_with(extent, 1, &locked).unwrap().changed);
    let tree = site.tree();
    assert!(
        tree.contains(&BIG[1..].to_owned()) && !tree.iter().any(|path| path.contains("i18n")),
        "{tree:?}"
    );
    // A mirror of the archive has that as well.
    site.sync(Extent::Whole, 1).unwrap();
    assert!(site.tree().iter().any(|path| path.contains("i18n")));
}

#[test]
fn builds_use_a_mirror_without_a_change_in_their_recipe() {
    let site = Site::new();
    site.sync(Extent::Whole, 1).unwrap();
    let (_mirror, port) = site.serve();
    site.world.upstream.take_log();
    let mirrors = vec![format!("http://127.0.0.1:{port}/")];
    let fetcher = site.world.fetcher_with(FetchOptions { mirrors, ..World::options() });
    let selection = site.world.select(&fetcher).unwrap();
    debian::fetch(&selection, &fetcher, &Silent).unwrap();
    assert_eq!(selection.repositories[0].name, "debian");
    // Neither an image nor a lock is told of it.
    let lock = Lock { suites: selection.locked_suites(), files: fetcher.brought(), ..Lock::new() };
    let told = selection.image_sources() + &lock.text().unwrap();
    assert!(told.contains(&site.world.upstream.url()) && !told.contains(&port.to_string()), "{told}");
    // And the lock's build asks it first as well.
    let supply = Supply { lock: Some(Arc::new(lock)), offline: false };
    let mirrors = vec![format!("http://127.0.0.1:{port}")];
    let other = World { directory: tempfile::tempdir().unwrap(), ..site.world };
    let fetcher = other.fetcher_with(FetchOptions { mirrors, supply, ..World::options() });
    debian::fetch(&other.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    assert_eq!(other.upstream.take_log(), Vec::<String>::new());
}
