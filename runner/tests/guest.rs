//! Boots real guests through the library and checks each verdict.
//!
//! Runs as root or as an ordinary user. Needs qemu-system-x86, gpgv and, for the guest's kernel and
//! busybox, the archive that the host's apt sources name or a filled cache.

#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hostler_runner::build::fetch_options;
use hostler_runner::cache::{Cache, Fetcher, default_directory};
use hostler_runner::cancel::Cancel;
use hostler_runner::child::find_program;
use hostler_runner::class::Class;
use hostler_runner::debian;
use hostler_runner::disk::builder_tools;
use hostler_runner::event::{Silent, Stage};
use hostler_runner::recipe::Recipe;
use hostler_runner::stop::Stop;
use hostler_runner::vm::NO_TIMER_CHECK;
use hostler_runner::vm::argv::{Accelerator, Boot, CONTROL_PORT, Network, VmSpec};
use hostler_runner::vm::canary::{Canary, Verdict};
use hostler_runner::vm::initramfs::Initramfs;
use hostler_runner::vm::launch::Programs;
use hostler_runner::vm::modules;
use hostler_runner::vm::nonce::nonce;
use hostler_runner::vm::outcome::{Activity, Because, Failure, Outcome};
use hostler_runner::vm::qemu;
use hostler_runner::vm::run::{Downloads, PowerOff, Report, Run, run};
use hostler_runner::vm::watch::Limits;

#[path = "guest/bad.rs"]
mod bad;
#[path = "guest/builder.rs"]
mod builder;
#[path = "guest/confined.rs"]
mod confined;
#[path = "guest/inspect.rs"]
mod inspect;
#[path = "guest/installer.rs"]
mod installer;
#[path = "guest/limits.rs"]
mod limits;
#[path = "guest/release_tree.rs"]
mod release_tree;

struct Tools {
    _folder: tempfile::TempDir,
    kernel: PathBuf,
    modules: PathBuf,
    busybox: PathBuf,
}

/// The builder's own kernel and busybox, out of the host's archive through the user's cache.
fn tools() -> &'static Tools {
    static TOOLS: OnceLock<Tools> = OnceLock::new();
    TOOLS.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let example = include_str!("../examples/debian-12.toml");
        let recipe = Recipe::parse(example, Path::new("debian-12.toml")).unwrap();
        let directory = default_directory(|name| std::env::var_os(name)).unwrap();
        let cache = Arc::new(Cache::open(&directory).unwrap());
        let fetcher = Fetcher::new(cache, fetch_options(&Stop::default())).unwrap();
        let selection = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).unwrap();
        let tools = builder_tools(&selection, &fetcher, folder.path(), &Silent).unwrap();
        Tools { kernel: tools.kernel, modules: tools.modules, busybox: tools.busybox, _folder: folder }
    })
}

fn programs() -> Programs {
    Programs {
        shim: env!("CARGO_BIN_EXE_hostler").into(),
        qemu: find_program("qemu-system-x86_64").expect("qemu-system-x86 is installed"),
    }
}

/// What every test guest does before its own script: modules, and the port as descriptor 3.
const PRELUDE: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
while [ -z "$(ls /sys/class/virtio-ports 2>/dev/null)" ]; do sleep 0.1; done
for directory in /sys/class/virtio-ports/*; do port="/dev/${directory##*/}"; done
exec 3>"$port"
read -r nonce </nonce
"#;

fn limits(no_progress: Duration) -> Limits {
    Limits { total: Duration::from_secs(90), used: Duration::ZERO, no_progress }
}

struct Guest<'a> {
    script: &'a str,
    network: Network,
    expected: Option<&'a str>,
    limits: Limits,
    serve: &'a dyn Fn(TcpListener) -> std::io::Result<()>,
    cancel: &'a Cancel,
    register: &'a dyn Fn(BorrowedFd<'_>) -> std::io::Result<()>,
    memory_mib: u64,
    /// Programs and libraries, by their paths.
    files: Vec<(String, Vec<u8>)>,
}

impl<'a> Guest<'a> {
    fn new(script: &'a str, cancel: &'a Cancel) -> Self {
        Self {
            script,
            network: Network::None,
            expected: None,
            limits: limits(Duration::from_secs(60)),
            serve: &|_| Ok(()),
            cancel,
            register: &|_| Ok(()),
            memory_mib: 256,
            files: Vec::new(),
        }
    }

    fn boot(&self) -> Report {
        let tools = tools();
        let folder = tempfile::tempdir().unwrap();
        let given = nonce().unwrap();
        let busybox = std::fs::read(&tools.busybox).unwrap();
        let mut initramfs = Initramfs::new(busybox, &format!("{PRELUDE}{}", self.script));
        let wanted = ["virtio_pci", "virtio_console", "virtio_net"];
        let mut order = String::new();
        for module in modules::load_ordered(&tools.modules, &wanted).unwrap() {
            order.push_str(&format!("{}.ko\n", module.name));
            initramfs.file(&format!("modules/{}.ko", module.name), 0o644, module.bytes);
        }
        for (path, bytes) in &self.files {
            initramfs.file(path, 0o755, bytes.clone());
        }
        initramfs.file("modules/order", 0o644, order);
        initramfs.file("nonce", 0o400, format!("{given}\n"));
        let path = folder.path().join("initramfs.cpio");
        initramfs.write(File::create(&path).unwrap()).unwrap();
        let spec = VmSpec {
            accelerator: Accelerator::Tcg,
            processors: 1,
            memory_mib: self.memory_mib,
            boot: Boot::Kernel {
                kernel: tools.kernel.clone(),
                initramfs: path,
                command_line: format!("console=ttyS0 panic=-1 mitigations=off {NO_TIMER_CHECK}"),
            },
            disks: Vec::new(),
            network: self.network,
            port_name: CONTROL_PORT,
            log_port: None,
            smbios_serial: None,
        };
        let log = File::create(folder.path().join("console.log")).unwrap();
        let mut asked = Run {
            programs: &programs(),
            spec: &spec,
            nonce: self.expected.unwrap_or(&given),
            limits: self.limits,
            register: self.register,
            serve: self.serve,
            downloads: &Downloads::default,
            viewers: None,
            holds: false,
            installer_log: None,
            power_off: PowerOff { within: Duration::from_secs(15), is_needed: false },
            picture: None,
            cancel: self.cancel,
            sink: &Silent,
            stage: Stage::Guest,
        };
        run(&mut asked, log).unwrap()
    }
}

fn failure(report: &Report) -> &Failure {
    match &report.outcome {
        Outcome::Failed(failure) => failure,
        Outcome::Proven => panic!("this guest cannot have succeeded:\n{}", report.screen),
    }
}

#[test]
fn the_right_nonce_is_a_success_and_the_process_was_registered_before_and_is_gone_after() {
    let cancel = Cancel::new().unwrap();
    let pid = AtomicU64::new(0);
    let register = |pidfd: BorrowedFd<'_>| {
        use std::os::fd::AsRawFd as _;
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pid:")).unwrap();
        pid.store(line.trim().parse().unwrap(), Ordering::SeqCst);
        // For a moment of its exec a process has no command line.
        let name = (0..500).find_map(|_| {
            let name = std::fs::read(format!("/proc/{}/cmdline", line.trim())).unwrap();
            std::thread::sleep(Duration::from_millis(if name.is_empty() { 10 } else { 0 }));
            (!name.is_empty()).then_some(name)
        });
        assert!(name.is_some_and(|name| name.ends_with(b"\0__vm\0")), "nothing else has run yet");
        Ok(())
    };
    let guest = Guest {
        register: &register,
        ..Guest::new("echo \"stage one\" >&3; echo \"done $nonce\" >&3; poweroff -f", &cancel)
    };
    let report = guest.boot();
    assert_eq!(report.outcome, Outcome::Proven, "{}", report.screen);
    assert_eq!(report.stages.len(), 1);
    assert!(report.console_bytes > 0);
    let pid = pid.load(Ordering::SeqCst);
    assert!(pid > 0);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_wrong_nonce_is_no_proof() {
    let cancel = Cancel::new().unwrap();
    let guest = Guest::new("echo \"done 0123456789abcdef0123456789abcdef\" >&3; sleep 60", &cancel);
    assert_eq!(failure(&guest.boot()).class(), Class::NoProof);
}

#[test]
fn an_orderly_end_without_the_nonce_is_a_failure() {
    let cancel = Cancel::new().unwrap();
    let report = Guest::new("echo all is well; poweroff -f", &cancel).boot();
    let Failure::NoProof { instead, .. } = failure(&report) else {
        panic!("{:?}", report.outcome);
    };
    assert!(instead.contains("switched itself off"), "{instead}");
    assert!(report.screen.contains("all is well"), "{}", report.screen);
}

#[test]
fn a_panic_ends_the_run_with_its_line() {
    let cancel = Cancel::new().unwrap();
    let report = Guest::new("echo last words; exit 3", &cancel).boot();
    let Failure::Recognised { finding, .. } = failure(&report) else {
        panic!("{:?}", report.outcome);
    };
    assert_eq!(finding.class, Class::KernelPanic);
    assert!(finding.line.contains("Attempted to kill init"), "{finding}");
    assert!(report.screen.contains("last words"), "{}", report.screen);
}

#[test]
fn silence_is_a_stall() {
    let cancel = Cancel::new().unwrap();
    let guest = Guest {
        limits: limits(Duration::from_secs(15)),
        ..Guest::new("echo \"stage waiting\" >&3; sleep 1000", &cancel)
    };
    assert_eq!(
        failure(&guest.boot()),
        &Failure::Stalled {
            limit: Duration::from_secs(15),
            stage: Some("waiting".into()),
            activity: Activity::Idle
        }
    );
}

#[test]
fn a_failed_step_is_told_with_its_status() {
    let cancel = Cancel::new().unwrap();
    let script = "echo 'cp: No space left on device'; echo \"fail configure 100\" >&3; poweroff -f";
    let report = Guest::new(script, &cancel).boot();
    let Failure::StepFailed { step, status, because: Because { sign, .. } } = failure(&report) else {
        panic!("{:?}", report.outcome);
    };
    assert_eq!((step.as_str(), *status), ("configure", 100));
    assert!(sign.as_ref().is_some_and(|sign| sign.line.contains("No space left")));
    assert_eq!(failure(&report).class(), Class::DiskFull);
}

#[test]
fn the_wish_to_stop_ends_a_guest_within_five_seconds() {
    let cancel = Cancel::new().unwrap();
    let asked = std::sync::Mutex::new(None);
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(4));
            *asked.lock().unwrap() = Some(Instant::now());
            cancel.cancel();
        });
        Guest::new("sleep 1000", &cancel).boot()
    });
    assert_eq!(failure(&report), &Failure::Cancelled);
    assert!(asked.lock().unwrap().unwrap().elapsed() < Duration::from_secs(5));
}

#[test]
fn a_guest_reaches_the_mirror_and_nothing_else() {
    // A service of this host, on every address it has, which no guest may reach.
    let outside = TcpListener::bind("0.0.0.0:0").unwrap();
    outside.set_nonblocking(true).unwrap();
    let port = outside.local_addr().unwrap().port();
    let script = format!(
        r#"
ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
get() {{
    printf 'GET /%s HTTP/1.0\r\n\r\n' "$1" | nc 10.0.2.2 8080 | grep -q mirrored
}}
get hello || {{ echo "fail mirror 1" >&3; sleep 60; }}
get again || {{ echo "fail second 1" >&3; sleep 60; }}
for target in 10.0.2.2:{port} {address}:{port} 127.0.0.1:{port}; do
    if echo | nc -w 5 "${{target%:*}}" "${{target#*:}}"; then
        echo "fail reached-$target 1" >&3; sleep 60
    fi
done
echo "done $nonce" >&3
poweroff -f
"#,
        address = own_address(),
    );
    let cancel = Cancel::new().unwrap();
    let served = AtomicU64::new(0);
    let report = std::thread::scope(|scope| {
        let serve = |listener: TcpListener| {
            listener.set_nonblocking(true)?;
            let served = &served;
            let started = Instant::now();
            scope.spawn(move || {
                while served.load(Ordering::SeqCst) < 2 && started.elapsed() < Duration::from_secs(60) {
                    let Ok((mut stream, _)) = listener.accept() else {
                        std::thread::sleep(Duration::from_millis(20));
                        continue;
                    };
                    stream.set_nonblocking(false).unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    let _ = stream.read(&mut [0; 1024]);
                    let answer =
                        b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nmirrored\n";
                    stream.write_all(answer).unwrap();
                    served.fetch_add(1, Ordering::SeqCst);
                }
            });
            Ok(())
        };
        Guest { network: Network::Mirror, serve: &serve, ..Guest::new(&script, &cancel) }.boot()
    });
    assert_eq!(report.outcome, Outcome::Proven, "{}", report.screen);
    assert!(report.isolated);
    assert_eq!(served.load(Ordering::SeqCst), 2);
    assert!(outside.accept().is_err(), "the guest reached a service of the host");
}

/// An address of this host that is not the loopback's, or the loopback's where there is none.
fn own_address() -> String {
    let output = Command::new("hostname").arg("-I").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let first = text.split_whitespace().find(|address| !address.contains(':'));
    first.unwrap_or("127.0.0.1").to_owned()
}

#[test]
fn the_canary_tells_what_really_runs_a_guest_and_remembers_it() {
    let tools = tools();
    let folder = tempfile::tempdir().unwrap();
    let memory = folder.path().join("memory");
    let programs = programs();
    let stop = Stop::default();
    let version = qemu::version(&programs.qemu, &stop).unwrap().unwrap();
    let canary = Canary {
        programs: &programs,
        qemu_version: &version,
        kernel: &tools.kernel,
        busybox: &tools.busybox,
        scratch: folder.path(),
        register: &|_| Ok(()),
        stop: &stop,
    };
    let verdicts = canary.judge(Some(&memory)).unwrap();
    println!("{verdicts}");
    assert!(verdicts.best().is_some(), "{verdicts}");
    // Either kvm ran a guest, or TCG had to, and there is a reason.
    match (&verdicts.kvm, &verdicts.tcg) {
        (Verdict::Works { .. }, None) | (Verdict::Refused { .. }, Some(Verdict::Works { .. })) => {}
        other => panic!("{other:?}"),
    }
    let started = Instant::now();
    assert_eq!(canary.judge(Some(&memory)).unwrap(), verdicts);
    assert!(started.elapsed() < Duration::from_secs(2), "the second verdict comes from memory");
}
