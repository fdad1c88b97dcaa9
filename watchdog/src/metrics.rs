//! What Prometheus is told. One registry, owned by the daemon; every label is a closed set.

use hostler_protocol::lease::LeaseState;
use hostler_protocol::methods::BuildResult;
use hostler_protocol::resource::{Kind, Outcome, Verdict};
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// The daemon's metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    /// `hostler_resources{kind, verdict}`: what was there at the last look.
    pub resources: IntGaugeVec,
    /// `hostler_reclaims_total{kind, outcome}`.
    pub reclaims: IntCounterVec,
    /// `hostler_reclaim_seconds`: from a lease's end until nothing of it is left.
    pub reclaim_seconds: Histogram,
    /// `hostler_leases{state}`.
    pub leases: IntGaugeVec,
    /// `hostler_leases_opened_total`.
    pub leases_opened: IntCounter,
    /// `hostler_builds_total{result}`.
    pub builds: IntCounterVec,
    /// `hostler_build_seconds{result}`.
    pub build_seconds: HistogramVec,
    /// `hostler_download_bytes_total{source}`.
    pub download_bytes: IntCounterVec,
    /// `hostler_download_files_total{source}`.
    pub download_files: IntCounterVec,
    /// `hostler_upstream_failures_total`.
    pub upstream_failures: IntCounter,
    /// `hostler_loop_devices_in_use`.
    pub loops_in_use: IntGauge,
    /// `hostler_loop_devices_limit`: 0 where the kernel sets none.
    pub loops_limit: IntGauge,
    /// `hostler_stray_qemu`: qemu processes that belong to no lease.
    pub stray_qemu: IntGauge,
    /// `hostler_gaps`: what could not be read at the last look.
    pub gaps: IntGauge,
    /// `hostler_observation_failures_total`: looks that gave nothing.
    pub observation_failures: IntCounter,
    /// `hostler_journal_failures_total`: writes that are not durable.
    pub journal_failures: IntCounter,
    /// `hostler_connections_refused_total`: clients that were dropped for what they sent, or for
    /// being too many.
    pub connections_refused: IntCounter,
}

/// The states that a gauge of leases has.
pub const LEASE_STATES: [(LeaseState, &str); 5] = [
    (LeaseState::Open, "open"),
    (LeaseState::Closing, "closing"),
    (LeaseState::Reclaiming, "reclaiming"),
    (LeaseState::Pinned, "pinned"),
    (LeaseState::Ended, "ended"),
];

impl Metrics {
    /// Makes and registers all of them, each at zero.
    #[must_use]
    pub fn new() -> Self {
        let registry = Registry::new();
        let metrics = Self {
            resources: gauges("hostler_resources", "Resources at the last look.", &["kind", "verdict"]),
            reclaims: counters(
                "hostler_reclaims_total",
                "Resources of ended leases by what a second look says became of them; one that was pinned first counts for both.",
                &["kind", "outcome"],
            ),
            reclaim_seconds: valid(Histogram::with_opts(
                HistogramOpts::new(
                    "hostler_reclaim_seconds",
                    "From a lease's end until nothing of it was left.",
                )
                .buckets(vec![
                    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
                ]),
            )),
            leases: gauges("hostler_leases", "Leases by state.", &["state"]),
            leases_opened: counter("hostler_leases_opened_total", "Leases that were opened."),
            builds: counters(
                "hostler_builds_total",
                "Builds by result, as runners reported them.",
                &["result"],
            ),
            build_seconds: valid(HistogramVec::new(
                HistogramOpts::new("hostler_build_seconds", "How long builds took.").buckets(vec![
                    10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14400.0,
                ]),
                &["result"],
            )),
            download_bytes: counters(
                "hostler_download_bytes_total",
                "Bytes that builds used, from upstream or out of the cache.",
                &["source"],
            ),
            download_files: counters(
                "hostler_download_files_total",
                "Files that builds used: from upstream, a miss of the cache, or out of it, a hit.",
                &["source"],
            ),
            upstream_failures: counter(
                "hostler_upstream_failures_total",
                "What upstreams did wrong: refusals, breaks, silence, altered files.",
            ),
            loops_in_use: gauge("hostler_loop_devices_in_use", "Loop devices that are bound."),
            loops_limit: gauge(
                "hostler_loop_devices_limit",
                "How many loop devices the host can have; 0 means as many as are asked for.",
            ),
            stray_qemu: gauge(
                "hostler_stray_qemu",
                "qemu processes that belong to no lease; they are listed, never acted on.",
            ),
            gaps: gauge(
                "hostler_gaps",
                "What could not be read at the last look; it is kept, never reclaimed.",
            ),
            observation_failures: counter("hostler_observation_failures_total", "Looks that gave nothing."),
            journal_failures: counter("hostler_journal_failures_total", "Journal writes that failed."),
            connections_refused: counter("hostler_connections_refused_total", "Clients that were dropped."),
            registry,
        };
        metrics.register();
        metrics.start_at_zero();
        metrics
    }

    fn register(&self) {
        let all: [Box<dyn prometheus::core::Collector>; 17] = [
            Box::new(self.resources.clone()),
            Box::new(self.reclaims.clone()),
            Box::new(self.reclaim_seconds.clone()),
            Box::new(self.leases.clone()),
            Box::new(self.leases_opened.clone()),
            Box::new(self.builds.clone()),
            Box::new(self.build_seconds.clone()),
            Box::new(self.download_bytes.clone()),
            Box::new(self.download_files.clone()),
            Box::new(self.upstream_failures.clone()),
            Box::new(self.loops_in_use.clone()),
            Box::new(self.loops_limit.clone()),
            Box::new(self.stray_qemu.clone()),
            Box::new(self.gaps.clone()),
            Box::new(self.observation_failures.clone()),
            Box::new(self.journal_failures.clone()),
            Box::new(self.connections_refused.clone()),
        ];
        for collector in all {
            valid(self.registry.register(collector));
        }
    }

    /// A series that only appears with its first event has no rate for that event.
    fn start_at_zero(&self) {
        for kind in Kind::ALL {
            for verdict in Verdict::ALL {
                self.resources.with_label_values(&[kind.name(), verdict.name()]).set(0);
            }
            for outcome in Outcome::ALL {
                self.reclaims.with_label_values(&[kind.name(), outcome.name()]).reset();
            }
        }
        for (_, name) in LEASE_STATES {
            self.leases.with_label_values(&[name]).set(0);
        }
        for result in BuildResult::ALL {
            self.builds.with_label_values(&[result.name()]).reset();
            let _made = self.build_seconds.with_label_values(&[result.name()]);
        }
        for source in ["upstream", "cache"] {
            self.download_bytes.with_label_values(&[source]).reset();
            self.download_files.with_label_values(&[source]).reset();
        }
    }

    /// All of them in Prometheus's text format.
    ///
    /// # Errors
    /// When the library cannot encode one.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        String::from_utf8(bytes).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn valid<T>(result: prometheus::Result<T>) -> T {
    result.expect("names and labels are constants of this file, each used once")
}

fn counter(name: &str, help: &str) -> IntCounter {
    valid(IntCounter::new(name, help))
}

fn counters(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    valid(IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauge(name: &str, help: &str) -> IntGauge {
    valid(IntGauge::new(name, help))
}

fn gauges(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    valid(IntGaugeVec::new(Opts::new(name, help), labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_is_there_from_the_start() {
        let text = Metrics::new().text().expect("encodable");
        for line in [
            "hostler_resources{kind=\"loop\",verdict=\"leaked\"} 0",
            "hostler_reclaims_total{kind=\"mount\",outcome=\"pinned\"} 0",
            "hostler_leases{state=\"open\"} 0",
            "hostler_builds_total{result=\"failed\"} 0",
            "hostler_build_seconds_count{result=\"succeeded\"} 0",
            "hostler_reclaim_seconds_count 0",
            "hostler_resources{kind=\"mount\",verdict=\"quarantined\"} 0",
            "hostler_loop_devices_in_use 0",
            "hostler_stray_qemu 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing from\n{text}");
        }
    }
}
