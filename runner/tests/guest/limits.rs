//! The limits of a machine's control group, for real: in a guest whose kernel has all controllers in version 2,
//! in a group that was delegated to an ordinary user. What runs in there is this program once more.

use std::fs;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use hostler_runner::cancel::Cancel;
use hostler_runner::vm::control_group::{Group, Unlimited};
use hostler_runner::vm::outcome::Outcome;
use hostler_runner::vm::watch::Limits;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::{Guest, limits};

const USER: u32 = 1000;

/// Makes a group of the user's, and has this program try what it can do in there, alone and beside another.
const SCRIPT: &str = r#"
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo '+memory +pids' >/sys/fs/cgroup/cgroup.subtree_control
for group in ci other; do
    mkdir "/sys/fs/cgroup/$group"
    for file in . cgroup.procs cgroup.subtree_control; do chown 1000 "/sys/fs/cgroup/$group/$file"; done
done
mkdir /tmp && chmod 1777 /tmp
inside() { (echo 0 >"/sys/fs/cgroup/$2/cgroup.procs" && exec /probe --exact "limits::$1" --ignored --nocapture); }
inside a_user_to_whom_a_group_is_delegated ci || { echo "fail delegated 1" >&3; sleep 60; }
(echo 0 >/sys/fs/cgroup/other/cgroup.procs && exec sleep 1000) &
inside a_user_who_is_not_alone other || { echo "fail shared 1" >&3; sleep 60; }
echo "done $nonce" >&3
poweroff -f
"#;

#[test]
fn a_machine_has_limits_where_a_group_is_delegated_to_its_user() {
    let folder = tempfile::tempdir().unwrap();
    let probe = folder.path().join("probe");
    let own = std::env::current_exe().unwrap();
    let stripped = Command::new("strip").arg("-o").arg(&probe).arg(&own).status().unwrap();
    assert!(stripped.success());
    let mut files = vec![("probe".to_owned(), fs::read(&probe).unwrap())];
    let listed = Command::new("ldd").arg(&own).output().unwrap();
    let libraries = String::from_utf8(listed.stdout).unwrap();
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        files.push((library[1..].to_owned(), fs::read(library).unwrap()));
    }
    let cancel = Cancel::new().unwrap();
    let guest = Guest {
        memory_mib: 1792,
        files,
        // Much memory is written, under emulation.
        limits: Limits { total: Duration::from_secs(240), ..limits(Duration::from_secs(120)) },
        ..Guest::new(SCRIPT, &cancel)
    };
    let report = guest.boot();
    assert_eq!(report.outcome, Outcome::Proven, "{}", report.screen);
}

fn become_user() {
    setgroups(&[]).unwrap();
    setresgid(Gid::from_raw(USER), Gid::from_raw(USER), Gid::from_raw(USER)).unwrap();
    setresuid(Uid::from_raw(USER), Uid::from_raw(USER), Uid::from_raw(USER)).unwrap();
}

fn own_group() -> String {
    fs::read_to_string("/proc/self/cgroup").unwrap().trim().to_owned()
}

#[test]
#[ignore = "only in the guest of this test"]
fn a_user_to_whom_a_group_is_delegated() {
    let ci = Path::new("/sys/fs/cgroup/ci");
    assert_eq!(Group::around(1, None, 1).unwrap_err(), Unlimited::Root);
    become_user();
    assert_eq!(own_group(), "0::/ci");
    // What a killed build has left.
    fs::create_dir(ci.join("hostler-999999-7")).unwrap();
    let mut child = Command::new("/bin/sh")
        .args(["-c", "read -r line; exec dd if=/dev/zero of=/dev/null bs=1600M count=1"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let process = child.id();
    let groups = || fs::read_dir(ci).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count();
    let group_of =
        |process: &str| fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap().trim().to_owned();
    // What the kernel takes for no limit is none, which is seen when the process is in the group already.
    let refused = Group::around(process, Some(process), u64::MAX).unwrap_err();
    assert!(matches!(refused, Unlimited::Refused { .. }), "{refused}");
    assert_eq!([group_of("self"), group_of(&process.to_string())], ["0::/ci", "0::/ci"]);
    assert_eq!(groups(), 0, "a group is left");
    let group = Group::around(process, Some(process), 1).unwrap();
    assert_eq!(group.memory, (1 << 30) + (1 << 20));
    let own = std::process::id();
    assert_eq!(group_of(&process.to_string()), format!("0::/ci/hostler-{own}-{process}"));
    assert_eq!(own_group(), format!("0::/ci/hostler-{own}-aside"));
    assert!(!ci.join("hostler-999999-7").exists());
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9), "it had more memory than its group may");
    let events = ci.join(format!("hostler-{own}-{process}/memory.events"));
    let events = fs::read_to_string(events).unwrap();
    let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill ")).unwrap();
    assert_ne!(kills, "0", "it ended for another reason");
    drop(group);
    assert_eq!(own_group(), "0::/ci");
    assert_eq!(fs::read_to_string(ci.join("cgroup.subtree_control")).unwrap().trim(), "");
    assert_eq!(groups(), 0, "a group is left");
}

#[test]
#[ignore = "only in the guest of this test"]
fn a_user_who_is_not_alone() {
    become_user();
    let mut child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
    let refused = Group::around(child.id(), Some(child.id()), 1).unwrap_err();
    assert_eq!(refused, Unlimited::Shared { path: "/sys/fs/cgroup/other".into() });
    // Where a watchdog has put it elsewhere, it stays there.
    let refused = Group::around(child.id(), Some(1), 1).unwrap_err();
    assert_eq!(refused, Unlimited::Leased);
    child.kill().unwrap();
    child.wait().unwrap();
}
