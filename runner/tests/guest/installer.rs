//! Debian's own installer, out of its package, against a mirror: what a person reads when a file of the
//! archive is not to be had, and when a question is left open.
//!
//! Whether the archive that this host reaches has all of the installer's packages is not in this
//! test's hand, so the mirror here refuses one on purpose.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use hostler_runner::build::fetch_options;
use hostler_runner::cache::Refusal;
use hostler_runner::cache::{Cache, Fetcher, default_directory};
use hostler_runner::class::Class;
use hostler_runner::debian::{self, deb};
use hostler_runner::event::{Silent, Stage};
use hostler_runner::recipe::Recipe;
use hostler_runner::stop::Stop;
use hostler_runner::vm::NO_TIMER_CHECK;
use hostler_runner::vm::argv::{Accelerator, Boot, CONTROL_PORT, Network, VmSpec};
use hostler_runner::vm::outcome::{Failure, Refused};
use hostler_runner::vm::run::{Downloads, PowerOff, Report, Run, run};
use hostler_runner::vm::watch::Limits;
use sha2::{Digest as _, Sha256};

use super::{Cancel, failure, programs};

/// The installer's kernel and initial file system, and the kernel's release.
struct Media {
    folder: tempfile::TempDir,
    release: String,
}

fn media() -> &'static Media {
    static MEDIA: OnceLock<Media> = OnceLock::new();
    MEDIA.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let example = include_str!("../../examples/debian-12.toml");
        let recipe = Recipe::parse(example, Path::new("debian-12.toml")).unwrap();
        let directory = default_directory(|name| std::env::var_os(name)).unwrap();
        let cache = Arc::new(Cache::open(&directory).unwrap());
        let fetcher = Fetcher::new(cache, fetch_options(&Stop::default())).unwrap();
        let selection = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).unwrap();
        let id = selection.catalogue.candidate("debian-installer-12-netboot-amd64").unwrap();
        let wanted = selection.wanted(&selection.catalogue.file(id).unwrap());
        let package = fetcher.fetch(&wanted).unwrap();
        deb::read(package.as_slice(), |_, files| -> Result<(), deb::DebError> {
            for file in files.entries().unwrap() {
                let mut file = file.unwrap();
                let path = file.path().unwrap().into_owned();
                let name = path.file_name().unwrap_or_default().to_owned();
                let is_wanted = name == "linux" || name == "initrd.gz";
                if is_wanted && path.to_string_lossy().contains("/text/") {
                    file.unpack(folder.path().join(name)).unwrap();
                }
            }
            Ok(())
        })
        .unwrap();
        let mut plain = Vec::new();
        let initrd = File::open(folder.path().join("initrd.gz")).unwrap();
        flate2::read::GzDecoder::new(initrd).read_to_end(&mut plain).unwrap();
        let folder_of_modules = b"lib/modules/";
        let release = memchr::memmem::find_iter(&plain, folder_of_modules)
            .map(|at| &plain[at + folder_of_modules.len()..])
            .find(|rest| rest[0].is_ascii_digit())
            .and_then(|rest| rest.split(|byte| !byte.is_ascii_graphic() || *byte == b'/').next())
            .unwrap();
        Media { release: String::from_utf8(release.to_vec()).unwrap(), folder }
    })
}

/// Boots the installer with these answers; `serve` has the mirror's socket.
fn install(
    answers: Option<&str>,
    options: &str,
    serve: &dyn Fn(TcpListener) -> std::io::Result<()>,
    downloads: &dyn Fn() -> Downloads,
) -> (Report, tempfile::TempDir) {
    let media = media().folder.path();
    let folder = tempfile::tempdir().unwrap();
    let mut initrd = fs::read(media.join("initrd.gz")).unwrap();
    // The kernel unpacks one archive after another, each at a multiple of four bytes.
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    if let Some(answers) = answers {
        let entry = cpio::newc::Builder::new("preseed.cfg").mode(0o100_644);
        let mut entry = entry.write(initrd, answers.len().try_into().unwrap());
        entry.write_all(answers.as_bytes()).unwrap();
        initrd = cpio::newc::trailer(entry.finish().unwrap()).unwrap();
    }
    let initramfs = folder.path().join("initrd");
    fs::write(&initramfs, initrd).unwrap();
    let spec = VmSpec {
        accelerator: Accelerator::Tcg,
        processors: 2,
        memory_mib: 1024,
        boot: Boot::Kernel {
            kernel: media.join("linux"),
            initramfs,
            command_line: format!(
                "console=ttyS0 mitigations=off fb=false log_host=10.0.2.2 {options} {NO_TIMER_CHECK}"
            ),
        },
        disks: Vec::new(),
        network: Network::Mirror,
        port_name: CONTROL_PORT,
        log_port: None,
        smbios_serial: None,
    };
    let picture = folder.path().join("screen.png");
    let mut asked = Run {
        programs: &programs(),
        spec: &spec,
        nonce: "5fe7",
        limits: Limits {
            total: Duration::from_secs(400),
            used: Duration::ZERO,
            no_progress: Duration::from_secs(120),
        },
        register: &|_| Ok(()),
        serve,
        downloads,
        viewers: None,
        holds: false,
        installer_log: Some(File::create(folder.path().join("installer.log")).unwrap()),
        power_off: PowerOff { within: Duration::from_secs(15), is_needed: false },
        picture: Some(&picture),
        cancel: &Cancel::new().unwrap(),
        sink: &Silent,
        stage: Stage::Guest,
    };
    let log = File::create(folder.path().join("console.log")).unwrap();
    let report = run(&mut asked, log).unwrap();
    if let Some(kept) = std::env::var_os("HOSTLER_TESTS_KEEP") {
        for name in ["console.log", "installer.log", "screen.png"] {
            let _ = fs::copy(folder.path().join(name), Path::new(&kept).join(name));
        }
    }
    (report, folder)
}

/// An archive that names packages of the installer and has none of them.
struct Archive {
    release: String,
    packages: String,
    refused: Mutex<Vec<Refused>>,
    served: AtomicU64,
}

/// As long a name as such names are.
const MISSING: &str = "e2fsprogs-udeb_1.47.0-2_amd64.udeb";

impl Archive {
    fn new() -> Self {
        let packages = format!(
            "Package: e2fsprogs-udeb\nVersion: 1.47.0-2\nArchitecture: amd64\nPriority: standard\nSection: debian-installer\nKernel-Version: {}\nFilename: pool/main/e/e2fsprogs/{MISSING}\nSize: 10\nSHA256: {}\nDescription: none\n\n",
            media().release,
            "0".repeat(64),
        );
        let digest: String = Sha256::digest(&packages).iter().map(|byte| format!("{byte:02x}")).collect();
        let release = format!(
            "Origin: Debian\nSuite: oldstable\nCodename: bookworm\nArchitecture: amd64\nArchitectures: amd64\nComponents: main\nSHA256:\n {digest} {} main/debian-installer/binary-amd64/Packages\n",
            packages.len()
        );
        Self { release, packages, refused: Mutex::default(), served: AtomicU64::new(0) }
    }

    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut request = [0; 4096];
        let length = stream.read(&mut request)?;
        let request = String::from_utf8_lossy(&request[..length]).into_owned();
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let has_suite = path.contains("/dists/bookworm/") || path.contains("/dists/oldstable/");
        let body = if has_suite && path.ends_with("/Release") {
            Some(&self.release)
        } else if path.ends_with("/Packages") {
            Some(&self.packages)
        } else {
            None
        };
        let (status, body) = match body {
            Some(body) => ("200 OK", body.as_str()),
            None => ("404 Not Found", ""),
        };
        if body.is_empty() {
            let (refusal, status) = match path.ends_with(".udeb") {
                true => (Refusal::Unavailable, Some(404)),
                false => (Refusal::Unnamed, None),
            };
            let reason = "not there".into();
            self.refused.lock().unwrap().push(Refused { path, refusal, status, reason });
        }
        self.served.fetch_add(body.len() as u64, Ordering::SeqCst);
        let head =
            format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())
    }
}

const ANSWERS: &str = "d-i debian-installer/locale string en_US.UTF-8
d-i keyboard-configuration/xkb-keymap select us
d-i netcfg/choose_interface select auto
d-i netcfg/get_hostname string x
d-i netcfg/get_domain string test
d-i mirror/country string manual
d-i mirror/protocol string http
d-i mirror/http/hostname string 10.0.2.2:8080
d-i mirror/http/directory string /debian
d-i mirror/http/proxy string
d-i debian-installer/allow_unauthenticated boolean true
";

#[test]
fn a_person_reads_which_file_the_installer_did_not_get() {
    let archive = Archive::new();
    let over = std::sync::atomic::AtomicBool::new(false);
    let (report, folder) = std::thread::scope(|scope| {
        let (over, archive) = (&over, &archive);
        let serve = |listener: TcpListener| {
            listener.set_nonblocking(true)?;
            scope.spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    match listener.accept() {
                        Ok((stream, _)) => drop(archive.answer(stream)),
                        Err(_) => std::thread::sleep(Duration::from_millis(20)),
                    }
                }
            });
            Ok(())
        };
        let downloads = || Downloads {
            bytes: archive.served.load(Ordering::SeqCst),
            refused: archive.refused.lock().unwrap().clone(),
        };
        let done = install(Some(ANSWERS), "auto=true priority=critical", &serve, &downloads);
        over.store(true, Ordering::SeqCst);
        done
    });
    let failure = failure(&report);
    println!("after {:.0} s: [{}] {failure}", report.took.as_secs_f64(), failure.class());
    assert_eq!(failure.class(), Class::DownloadFailed, "{}", report.screen);
    assert_eq!(
        failure.to_string(),
        format!("debian-installer could not download {MISSING}: upstream answered 404")
    );
    assert!(report.screen.contains("Downloading a file failed"), "{}", report.screen);
    let log = fs::read_to_string(folder.path().join("installer.log")).unwrap();
    assert!(log.contains("net-retriever") && log.contains("anna"), "{log}");
    assert!(!log.contains("\n<"), "priorities of syslog are no text of the log");
}

#[test]
fn a_question_that_no_answer_is_there_for_is_known_within_a_minute() {
    let (report, folder) = install(None, "", &|_| Ok(()), &Downloads::default);
    let failure = failure(&report);
    println!("after {:.0} s: [{}] {failure}", report.took.as_secs_f64(), failure.class());
    assert_eq!(failure.class(), Class::WaitingForInput, "{}", report.screen);
    let Failure::Recognised { finding, .. } = failure else { panic!("{failure}") };
    assert_eq!(finding.pack, "debian-installer");
    assert!(finding.line.contains("Select a language"), "{finding}");
    assert!(report.screen.contains("Select a language"), "{}", report.screen);
    assert!(report.has_picture);
    let picture = fs::read(folder.path().join("screen.png")).unwrap();
    assert!(picture.starts_with(b"\x89PNG\r\n"), "{} bytes", picture.len());
}
