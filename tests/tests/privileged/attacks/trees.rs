//! Directories that are not what they were: swapped, renamed, linked, bound, mounted over.

use std::fs;
use std::fs::File;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hostler_protocol::lease::LeaseState;
use hostler_tests::attached::Attached;
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::fuse::Fuse;
use hostler_tests::place::{Place, USER, kill, unmount_below};
use hostler_tests::sleeper::Sleeper;
use hostler_tests::wire::{Client, as_user};
use hostler_tests::{probe, program, scenario};
use nix::mount::{MsFlags, mount};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{Attacker, SOON, refusal};

/// A victim's directory: a mounted image with a process in it, and files.
struct Victim {
    bystander: Bystander,
    directory: PathBuf,
}

impl Victim {
    fn new(place: &Place, name: &str) -> Self {
        let directory = place.directory(name);
        let bystander = Bystander::new(place, &directory);
        fs::write(directory.join("precious"), "kept").or_fail("writing");
        fs::create_dir(directory.join("folder")).or_fail("making");
        Self { bystander, directory }
    }

    #[track_caller]
    fn assert_untouched(&self) {
        self.bystander.assert_untouched();
        assert_eq!(fs::read_to_string(self.directory.join("precious")).or_fail("reading"), "kept");
        assert!(self.directory.join("folder").is_dir());
    }
}

fn exchange(one: &Path, other: &Path) {
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).or_fail("exchanging two names");
}

#[test]
fn a_directory_swapped_for_a_link_or_for_anothers_takes_nobodys_things() {
    scenario::privileged("swapped", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let victim = Victim::new(place, "victim");
        let own = place.directory_of_user("own");
        let mut attacker = Attacker::new(place, &daemon);
        let (claimed, scratch) = (own.join("claimed"), own.join("scratch"));
        as_user(USER, || {
            fs::create_dir_all(claimed.join("bystander")).or_fail("making");
            fs::create_dir_all(scratch.join("folder")).or_fail("making");
        });
        assert!(attacker.claim(&claimed, false).is_ok() && attacker.claim(&scratch, true).is_ok());
        // Where they were are links to the victim's now, and below what they are now, too.
        as_user(USER, || {
            for (from, to) in [(&claimed, "moved"), (&scratch, "moved-scratch")] {
                fs::rename(from, own.join(to)).or_fail("renaming");
                symlink(&victim.directory, from).or_fail("linking");
                symlink(&victim.directory, own.join(to).join("link")).or_fail("linking");
                symlink(victim.directory.join("precious"), own.join(to).join("file")).or_fail("linking");
            }
        });
        // A mount of the victim's that was made after the claim is found by that path alone.
        let late = victim.directory.join("folder");
        program::succeed("mount", ["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), late.as_os_str()]);
        let number = probe::mount_number(&late);
        attacker.end();
        assert_eq!(probe::mount_number(&late), number, "the victim's mount was taken");
        program::succeed("umount", [late.as_os_str()]);
        victim.assert_untouched();
        assert!(!own.join("moved-scratch").exists(), "the user's own scratch directory");
        assert!(own.join("moved").is_dir());
    });
}

#[test]
fn an_ancestor_that_is_swapped_while_things_are_taken_back_leads_nowhere() {
    scenario::privileged_within("ancestors", Duration::from_secs(120), |place| {
        let mut daemon = Daemon::start(place, &Settings { term_timeout: "100ms", ..Settings::default() });
        // The same tree twice: the attacker's, and one below which the same names are the victim's.
        let victim = Victim::new(place, "trap/a/b");
        let late = victim.directory.join("folder");
        program::succeed("mount", ["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), late.as_os_str()]);
        let number = probe::mount_number(&late);
        let mut left = 0;
        for round in 0..12 {
            let base = place.directory_of_user(format!("own-{round}"));
            let claim = base.join("a/b");
            fs::create_dir_all(claim.join("folder")).or_fail("making");
            for path in [base.join("a"), claim.clone(), claim.join("folder")] {
                std::os::unix::fs::chown(&path, Some(USER), Some(USER)).or_fail("giving away");
            }
            let mut attacker = Attacker::new(place, &daemon);
            assert!(attacker.claim(&claim, round % 2 == 0).is_ok());
            // Root's builder, on the user's behalf.
            for name in ["one", "two", "bystander"] {
                let point = claim.join(name);
                fs::create_dir_all(&point).or_fail("making");
                let arguments = ["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), point.as_os_str()];
                program::succeed("mount", arguments);
            }
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let (trap, base, stop) = (place.path("trap"), &base, &stop);
                let swapper = scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        exchange(&trap.join("a"), &base.join("a"));
                        std::thread::sleep(Duration::from_micros(300));
                        exchange(&trap.join("a"), &base.join("a"));
                        std::thread::sleep(Duration::from_micros(700));
                    }
                });
                attacker.owner.take();
                std::thread::sleep(Duration::from_millis(400));
                stop.store(true, Ordering::Relaxed);
                swapper.join().unwrap_or_else(|_| panic!("the swapping thread failed"));
            });
            assert_eq!(probe::mount_number(&late), number, "the victim's mount was taken");
            victim.assert_untouched();
            // Whoever moves his directory all the while can keep his own mounts from being found in it: what
            // is left is his, and told of where a scratch directory cannot be removed for it.
            left += usize::from(!probe::mounts_below(&base).is_empty());
            drop(attacker);
        }
        println!("the attacker kept mounts of his own in {left} of 12 rounds");
        daemon.kill();
        for round in 0..12 {
            unmount_below(&place.path(format!("own-{round}")), place.mounts());
        }
        program::succeed("umount", [late.as_os_str()]);
    });
}

#[test]
fn links_and_binds_into_anothers_tree_take_only_themselves() {
    scenario::privileged("binds", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let victim = Victim::new(place, "victim");
        let image = place.image("victim/late.img", 4);
        let own = place.directory_of_user("own");
        let mut attacker = Attacker::new(place, &daemon);
        for name in ["claimed", "scratch"] {
            let directory = own.join(name);
            as_user(USER, || fs::create_dir(&directory)).or_fail("making");
            assert!(attacker.claim(&directory, name == "scratch").is_ok());
            // What a builder with root's rights may have made for him.
            fs::hard_link(&image, directory.join("late.img")).or_fail("linking");
            fs::hard_link(victim.directory.join("precious"), directory.join("precious")).or_fail("linking");
            let point = directory.join("bind");
            fs::create_dir(&point).or_fail("making");
            mount(
                Some(&victim.directory),
                &point,
                None::<&str>,
                MsFlags::MS_BIND | MsFlags::MS_REC,
                None::<&str>,
            )
            .or_fail("binding");
        }
        // Attached after the claims, by the victim's own name for the file.
        let late = Attached::by(&image, &image);
        attacker.end();
        late.assert_untouched();
        victim.assert_untouched();
        assert_eq!(probe::mounts_below(&own), []);
        assert!(!own.join("scratch").exists() && own.join("claimed/precious").exists());
    });
}

#[test]
fn a_scratch_directory_is_not_emptied_through_what_a_bystander_holds_in_it() {
    scenario::privileged("held-bind", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let victim = Victim::new(place, "victim");
        let scratch = place.directory_of_user("scratch");
        let mut attacker = Attacker::new(place, &daemon);
        assert!(attacker.claim(&scratch, true).is_ok());
        let point = scratch.join("bind");
        fs::create_dir(&point).or_fail("making");
        mount(Some(&victim.directory), &point, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .or_fail("binding");
        let mut inside = place.command("sleep");
        inside.current_dir(&point);
        let inside = Sleeper::run(inside);
        attacker.owner.take();
        daemon.wait_for_state("attack", LeaseState::Pinned, SOON);
        victim.assert_untouched();
        assert!(inside.runs());
        drop(inside);
        daemon.wait_for_end("attack", SOON);
        victim.assert_untouched();
        assert!(!scratch.exists());
    });
}

#[test]
fn a_scratch_directory_is_not_removed_with_what_others_have_in_it() {
    scenario::privileged("shared-scratch", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        // Where everybody puts things.
        let shared = place.directory_of_user("shared");
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).or_fail("sharing");
        let mut attacker = Attacker::new(place, &daemon);
        let why = refusal(attacker.claim(&shared, true));
        assert!(why.contains("chmod o-w"), "{why}");
        // Another lease's directory in it, of the same user.
        let outer = place.directory_of_user("outer");
        let inner = outer.join("inner");
        as_user(USER, || fs::create_dir(&inner)).or_fail("making");
        fs::write(inner.join("precious"), "data").or_fail("writing");
        let mut other = Client::connect_as(USER, &daemon.socket());
        let owner = Sleeper::start(place, true);
        let lease = other.open_lease("other", &owner);
        let directory = as_user(USER, || File::open(&inner)).or_fail("opening");
        other.claim(lease, directory, false).or_fail("claiming");
        assert!(attacker.claim(&outer, true).is_ok());
        attacker.owner.take();
        let (pinned, _) = daemon.wait_for_state("attack", LeaseState::Pinned, SOON);
        let report = format!("{:?}", pinned.report);
        assert!(report.contains(&format!("lease {} has claimed a directory in it", lease.lease)), "{report}");
        assert!(inner.join("precious").exists());
        drop(owner);
        daemon.wait_for_end("other", SOON);
        daemon.wait_for_end("attack", SOON);
        assert!(!outer.exists());
    });
}

#[test]
fn another_users_mounts_below_a_claim_stay() {
    scenario::privileged("others-below", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let claim = place.directory_of_user("claim");
        let (before, after) = (claim.join("before"), claim.join("after"));
        for directory in [&before, &after] {
            fs::create_dir(directory).or_fail("making");
        }
        let others = USER + 1;
        let early = Fuse::of_user(&before, others);
        let mut attacker = Attacker::new(place, &daemon);
        assert!(attacker.claim(&claim, false).is_ok());
        // As the set-user-ID program that mounts FUSE file systems does it for an ordinary user.
        let late = Fuse::of_user(&after, others);
        let own = claim.join("own");
        fs::create_dir(&own).or_fail("making");
        let users = Fuse::of_user(&own, USER);
        let mounted = || [&before, &after].map(|point| probe::mounts_below(point));
        let were = mounted();
        attacker.end();
        assert_eq!(mounted(), were);
        assert_eq!(probe::mounts_below(&own), [], "the user's own goes");
        drop((early, late, users));
    });
}

#[test]
fn a_claim_of_anothers_tree_by_a_builders_namespace_is_refused() {
    scenario::privileged("own-namespace", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let victim = Victim::new(place, "victim");
        let own = place.directory_of_user("own");
        // In a namespace of his own the user binds the victim's tree over his directory, and passes that.
        let script = r#"mount --rbind "$1" "$2" && exec "$3" run --name trick --claim "$2" -- sleep 600"#;
        let mut command = place.command_of_user("unshare");
        command.args(["--user", "--map-root-user", "--mount", "--", "sh", "-c", script, "sh"]);
        command.arg(&victim.directory).arg(&own).arg(program::path("hostler"));
        let told = program::finish(command.env("HOSTLER_SOCKET", daemon.socket()).current_dir("/"));
        assert_eq!(told.status, 3, "{told:?}");
        assert!(told.stderr.contains("belongs to user 0"), "{told:?}");
        victim.assert_untouched();
        daemon.wait_until_idle(SOON);
    });
}

#[test]
fn a_claim_that_root_was_talked_into_is_not_a_way_to_remove_a_users_files() {
    scenario::privileged("talked-into", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let users = place.directory_of_user("users");
        fs::write(users.join("file"), "kept").or_fail("writing");
        let mut hostler = daemon
            .hostler(&["run", "--name", "roots", "--claim"])
            .arg(&users)
            .args(["--", "sleep", "600"])
            .stdout(Stdio::null())
            .spawn()
            .or_fail("starting hostler");
        hostler_tests::failure::wait_until("the lease", SOON, || daemon.lease("roots").is_some());
        let lease = Client::connect_as(USER, &daemon.socket());
        drop(lease);
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        daemon.wait_for_end("roots", SOON);
        assert_eq!(fs::read_to_string(users.join("file")).or_fail("reading"), "kept");
    });
}
