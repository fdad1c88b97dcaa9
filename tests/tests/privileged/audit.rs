//! What systemd's journal is told: an event with fields for each thing that is done.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::Stdio;
use std::time::{Duration, Instant};

use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::leak::MOUNTED_IMAGE;
use hostler_tests::place::kill;
use hostler_tests::{probe, program, scenario};
use nix::mount::{MsFlags, mount};

type Event = BTreeMap<String, String>;

/// The fields of a datagram in the journal's own format: each by its name and its length.
fn event(datagram: &[u8]) -> Event {
    let mut fields = Event::new();
    let mut rest = datagram;
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let line = String::from_utf8_lossy(&rest[..end]).into_owned();
        rest = &rest[end + 1..];
        if let Some((name, value)) = line.split_once('=') {
            fields.insert(name.to_owned(), value.to_owned());
        } else {
            let (length, after) = rest.split_first_chunk::<8>().or_fail("a field's length");
            let length = usize::try_from(u64::from_le_bytes(*length)).or_fail("a length");
            fields.insert(line, String::from_utf8_lossy(&after[..length]).into_owned());
            rest = &after[length + 1..];
        }
    }
    fields
}

#[test]
fn each_act_is_one_event_with_whose_what_and_on_whose_word() {
    scenario::privileged("audit", |place| {
        // A journal of the test's own, in its own mount namespace.
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).or_fail("mounting /run");
        fs::create_dir_all("/run/systemd/journal").or_fail("making its directory");
        let journal = UnixDatagram::bind("/run/systemd/journal/socket").or_fail("the journal's socket");
        journal.set_read_timeout(Some(Duration::from_millis(100))).or_fail("a timeout");
        let mut daemon = Daemon::start(place, &Settings::default());
        daemon.kill();
        let mut command = place.command(program::path("hostlerd"));
        command.arg("--config").arg(place.path("hostlerd.toml")).arg("--own-mount-namespace");
        let mut child = command
            .env("JOURNAL_STREAM", "1:1")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .or_fail("starting hostlerd");
        let mut events: Vec<Event> = Vec::new();
        let mut buffer = vec![0u8; 256 * 1024];
        let mut listen_until = |what: &str, is_it: &dyn Fn(&Event) -> bool| {
            let begun = Instant::now();
            while !events.iter().any(is_it) {
                assert!(begun.elapsed() < Duration::from_secs(20), "no event for {what}: {events:#?}");
                if let Ok(length) = journal.recv(&mut buffer) {
                    events.push(event(&buffer[..length]));
                }
            }
            events.clone()
        };
        listen_until("its start", &|event| {
            event.get("MESSAGE").is_some_and(|said| said.ends_with("is ready"))
        });
        let claim = place.directory("claim");
        let image = place.image("claim/image", 4);
        let script = format!("{MOUNTED_IMAGE}; echo $$ >shell; sleep 600");
        let mut run = daemon.run_script("audited", &claim, &script);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("shell"));
        let device = probe::loop_of(&image);
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        let is = |event: &Event, name: &str, value: &str| event.get(name).is_some_and(|it| it == value);
        let all = listen_until("its end", &|event| is(event, "HOSTLER_EVENT", "ended"));
        let of = |kind: &str| -> Vec<&Event> {
            all.iter().filter(|event| is(event, "HOSTLER_EVENT", kind)).collect()
        };
        let opened = of("opened");
        assert_eq!(opened.len(), 1, "{all:#?}");
        let pid = hostler.id().to_string();
        for (name, value) in [
            ("HOSTLER_LEASE", "1"),
            ("HOSTLER_UID", "0"),
            ("HOSTLER_BY_PID", &pid),
            ("HOSTLER_NAME", "audited"),
        ] {
            assert!(is(opened[0], name, value), "{name}: {:#?}", opened[0]);
        }
        let claimed = of("claimed");
        assert!(
            claimed.iter().any(|event| event["HOSTLER_PATH"] == claim.display().to_string()),
            "{claimed:#?}"
        );
        assert_eq!(of("owner ended").len(), 1);
        let steps = of("step");
        assert!(steps.len() >= 4, "{steps:#?}");
        for step in &steps {
            assert!(
                is(step, "HOSTLER_LEASE", "1") && is(step, "HOSTLER_BECAUSE", "owner ended"),
                "{step:#?}"
            );
            assert!(is(step, "HOSTLER_RESULT", "done"), "{step:#?}");
            for field in ["HOSTLER_DOES", "HOSTLER_ROUND", "HOSTLER_STEP", "HOSTLER_UID", "MESSAGE"] {
                assert!(step.contains_key(field), "{field}: {step:#?}");
            }
            let identity: serde_json::Value =
                serde_json::from_str(&step["HOSTLER_IDENTITY"]).or_fail("an identity");
            assert!(identity.as_array().is_some_and(|all| !all.is_empty()), "{identity}");
        }
        let sequence = format!("\"sequence\":{}", device.sequence);
        assert!(steps.iter().any(|step| step["HOSTLER_IDENTITY"].contains(&sequence)), "{steps:#?}");
        kill(child.id());
        child.wait().or_fail("waiting for hostlerd");
        daemon.start_again();
    });
}
