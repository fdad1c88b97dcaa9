//! What Prometheus is told, by HTTP and by the real Prometheus.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::Duration;

use hostler_protocol::lease::LeaseState;
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_for};
use hostler_tests::patience::stretched;
use hostler_tests::place::{Place, kill};
use hostler_tests::{probe, program, scenario};
use serde_json::Value;

/// Leaves a mount, a loop device and a process.
const LEAK: &str = r#"
    device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt
    sleep 600 & exit 0
"#;

/// The body of an answer to GET.
pub(crate) fn get(address: SocketAddr, path: &str) -> Result<String, String> {
    let limit = stretched(Duration::from_secs(10));
    let mut stream = TcpStream::connect_timeout(&address, limit).map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(limit)).map_err(|error| error.to_string())?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").map_err(|error| error.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.0 200") || head.starts_with("HTTP/1.1 200") => {
            Ok(body.to_owned())
        }
        _ => Err(answer),
    }
}

/// Prometheus's text format as pairs.
fn series(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let pair = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    lines.map(|line| pair(line).or_fail(format_args!("{line:?} as a series"))).collect()
}

#[test]
fn what_is_pinned_is_seen_while_it_is_and_counted_once() {
    scenario::privileged("counted-pinned", |place| {
        let claim = place.directory("claim");
        let _ = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings { metrics: true, ..Settings::default() });
        let read = || series(&get(daemon.metrics(), "/metrics").or_fail("the metrics"));
        let script =
            "device=$(losetup --find --show image); mkdir mnt; mount \"$device\" mnt; touch ready; sleep 600";
        let mut run = daemon.run_script("pinned", &claim, script);
        let mut hostler = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().or_fail("starting hostler");
        wait_for("the mount", Duration::from_secs(10), || claim.join("ready").exists().then_some(()));
        let visitor = place.command("sleep").arg("600").current_dir(claim.join("mnt")).spawn();
        let mut visitor = visitor.or_fail("starting a visitor");
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        daemon.wait_for_state("pinned", LeaseState::Pinned, Duration::from_secs(10));
        // Long enough for a retry, which is no second leak.
        std::thread::sleep(Duration::from_millis(1500));
        let during = read();
        assert_eq!(during[r#"hostler_reclaims_total{kind="mount",outcome="pinned"}"#], 1.0);
        assert_eq!(during[r#"hostler_resources{kind="mount",verdict="pinned"}"#], 1.0);
        kill(visitor.id());
        visitor.wait().or_fail("waiting for the visitor");
        daemon.wait_for_state("pinned", LeaseState::Ended, Duration::from_secs(10));
        let after = read();
        assert_eq!(after[r#"hostler_reclaims_total{kind="mount",outcome="pinned"}"#], 1.0);
        assert_eq!(after[r#"hostler_reclaims_total{kind="mount",outcome="reclaimed"}"#], 1.0);
        bystander.assert_untouched();
    });
}

#[test]
fn a_reclaim_is_counted_by_kind_and_outcome() {
    scenario::privileged("counted", |place| {
        let claim = place.directory("claim");
        let _ = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings { metrics: true, ..Settings::default() });
        let read = || series(&get(daemon.metrics(), "/metrics").or_fail("the metrics"));
        let before = read();
        assert_eq!(before[r#"hostler_reclaims_total{kind="loop",outcome="reclaimed"}"#], 0.0);
        assert_eq!(before[r#"hostler_leases{state="open"}"#], 0.0);
        assert!(before["hostler_loop_devices_in_use"] >= 1.0);
        assert_eq!(program::finish(&mut daemon.run_script("leak", &claim, LEAK)).status, 0);
        let after = read();
        for (kind, count) in
            [("loop", 1.0), ("mount", 1.0), ("process", 1.0), ("cgroup", 1.0), ("directory", 0.0)]
        {
            let name = format!(r#"hostler_reclaims_total{{kind="{kind}",outcome="reclaimed"}}"#);
            assert_eq!(after[&name], count, "{name}");
            let name = format!(r#"hostler_reclaims_total{{kind="{kind}",outcome="pinned"}}"#);
            assert_eq!(after[&name], 0.0, "{name}");
        }
        assert_eq!(after["hostler_reclaim_seconds_count"], 1.0);
        assert!(after["hostler_reclaim_seconds_sum"] > 0.0);
        assert_eq!(after["hostler_leases_opened_total"], 1.0);
        assert_eq!(after[r#"hostler_leases{state="ended"}"#], 1.0);
        assert_eq!(after["hostler_journal_failures_total"], 0.0);
        bystander.assert_untouched();
    });
}

/// Debian's Prometheus, killed when it is dropped.
struct Prometheus {
    child: Child,
    address: SocketAddr,
}

impl Prometheus {
    fn start(place: &Place, target: SocketAddr) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = address.or_fail("finding a free port");
        let configuration = place.path("prometheus.yml");
        let text = format!(
            "global: {{ scrape_interval: 500ms, scrape_timeout: 500ms }}\nscrape_configs:\n  - job_name: hostler\n    static_configs: [ {{ targets: ['{target}'] }} ]\n"
        );
        std::fs::write(&configuration, text).or_fail("writing Prometheus's configuration");
        let log = std::fs::File::create(place.path("prometheus.log")).or_fail("making a log");
        let child = place
            .command("prometheus")
            .arg(format!("--config.file={}", configuration.display()))
            .arg(format!("--storage.tsdb.path={}", place.path("prometheus").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        Self { child: child.or_fail("starting prometheus"), address }
    }

    /// The value of a series by its HTTP API; `None` while it has none.
    fn value(&self, query: &str) -> Option<f64> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let body = get(self.address, &format!("/api/v1/query?query={encoded}")).ok()?;
        let answer: Value = serde_json::from_str(&body).ok()?;
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        kill(self.child.id());
        let _ = self.child.wait();
    }
}

#[test]
fn the_real_prometheus_scrapes_it() {
    let installed = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join("prometheus").is_file()));
    assert!(installed, "prometheus is missing: install Debian's package `prometheus`, or run `make test`");
    scenario::privileged("prometheus", |place| {
        let claim = place.directory("claim");
        let _ = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings { metrics: true, ..Settings::default() });
        let prometheus = Prometheus::start(place, daemon.metrics());
        assert_eq!(program::finish(&mut daemon.run_script("leak", &claim, LEAK)).status, 0);
        let limit = Duration::from_secs(25);
        let log = || std::fs::read_to_string(place.path("prometheus.log")).unwrap_or_default();
        for kind in ["loop", "mount", "process"] {
            let query = format!(r#"hostler_reclaims_total{{kind="{kind}",outcome="reclaimed"}}"#);
            let what = format!("{query} in Prometheus\n{}", log());
            wait_for(what, limit, || prometheus.value(&query).filter(|value| *value == 1.0));
        }
        let in_use = prometheus.value("hostler_loop_devices_in_use").or_fail("the loops in use");
        assert!((1.0..=4096.0).contains(&in_use), "{in_use}");
        assert_eq!(prometheus.value("up{job=\"hostler\"}"), Some(1.0));
        assert_eq!(prometheus.value("hostler_reclaim_seconds_count"), Some(1.0));
        assert!(prometheus.value(r#"histogram_quantile(0.9, hostler_reclaim_seconds_bucket)"#).is_some());
        drop(prometheus);
        assert_eq!(probe::mounts_below(&claim), []);
        bystander.assert_untouched();
    });
}
