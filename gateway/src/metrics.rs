//! What the gateway counts. Everything starts with `spline_gateway_`.
//!
//! Called by links, sessions and engines; the handles of each operation are looked up once, not per request.

mod latency;

use latency::Latency;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use spline_process::metrics::latency_histogram;
use spline_types::{BlockOp, Fault};
use std::time::Duration;

type OpLabel = [(&'static str, &'static str); 1];
type FaultLabel = [(&'static str, &'static str); 2];
type OutcomeLabel = [(&'static str, &'static str); 1];

/// A request that takes longer is a stall: a guest's file system notices.
const STALL: Duration = Duration::from_millis(100);

/// One of each operation, in the order of [`slot`].
const OPS: [BlockOp; 7] = [
    BlockOp::Read,
    BlockOp::Write,
    BlockOp::Flush,
    BlockOp::Discard,
    BlockOp::WriteZeroes { no_hole: false, fast: false },
    BlockOp::Cache,
    BlockOp::Status,
];

const fn slot(op: BlockOp) -> usize {
    match op {
        BlockOp::Read => 0,
        BlockOp::Write => 1,
        BlockOp::Flush => 2,
        BlockOp::Discard => 3,
        BlockOp::WriteZeroes { .. } => 4,
        BlockOp::Cache => 5,
        BlockOp::Status => 6,
    }
}

/// Handles of all metrics of one gateway.
pub(crate) struct Metrics {
    ops: [OpMetrics; OPS.len()],
    faults: Family<FaultLabel, Counter>,
    pub(crate) sessions: Gauge,
    pub(crate) links: Gauge,
    /// Links whose nebd was told on which processor their thread stays.
    pub(crate) links_staying: Gauge,
    pub(crate) inflight_bytes: Gauge,
    pub(crate) opens_refused: Counter,
    pub(crate) sessions_lost: Counter,
    /// From when the process before took no more requests of a link, or of a volume without one that goes on, until this one did.
    pub(crate) upgrade_pause: Histogram,
    /// Sessions that were taken over from the process before.
    pub(crate) sessions_taken_over: Counter,
    /// Links of theirs that go on as they were.
    pub(crate) links_taken_over: Counter,
    /// How often a nebd that slept had to be woken for answers.
    pub(crate) link_wakeups: Counter,
    upgrades: Family<OutcomeLabel, Counter>,
    stalls: Counter,
}

struct OpMetrics {
    requests: Counter,
    bytes: Counter,
    inflight: Gauge,
    latency: Latency,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("spline_gateway");
        let requests = Family::<OpLabel, Counter>::default();
        let bytes = Family::<OpLabel, Counter>::default();
        let inflight = Family::<OpLabel, Gauge>::default();
        let latency = Family::<OpLabel, Latency>::default();
        let metrics = Self {
            ops: OPS.map(|op| {
                let label = [("op", op.name())];
                OpMetrics {
                    requests: requests.get_or_create(&label).clone(),
                    bytes: bytes.get_or_create(&label).clone(),
                    inflight: inflight.get_or_create(&label).clone(),
                    latency: latency.get_or_create(&label).clone(),
                }
            }),
            faults: Family::default(),
            sessions: Gauge::default(),
            links: Gauge::default(),
            links_staying: Gauge::default(),
            inflight_bytes: Gauge::default(),
            opens_refused: Counter::default(),
            sessions_lost: Counter::default(),
            upgrade_pause: latency_histogram(),
            sessions_taken_over: Counter::default(),
            links_taken_over: Counter::default(),
            link_wakeups: Counter::default(),
            upgrades: Family::default(),
            stalls: Counter::default(),
        };
        registry.register("requests", "Requests that ended, by operation", requests);
        registry.register_with_unit("data", "Data of requests that succeeded", Unit::Bytes, bytes);
        registry.register("inflight_requests", "Requests that were taken and not answered yet", inflight);
        registry.register_with_unit(
            "request_latency",
            "From a request's last byte to its answer",
            Unit::Seconds,
            latency,
        );
        registry.register("faults", "Requests that failed, by operation and fault", metrics.faults.clone());
        registry.register("sessions", "Open sessions", metrics.sessions.clone());
        registry.register("links", "Links that are served", metrics.links.clone());
        registry.register(
            "links_staying",
            "Links whose thread stays on its processor, where nebd comes to it",
            metrics.links_staying.clone(),
        );
        registry.register(
            "link_wakeups",
            "Times that a sleeping nebd was woken for answers in its ring",
            metrics.link_wakeups.clone(),
        );
        registry.register_with_unit(
            "inflight",
            "Data of requests that were taken and not answered yet",
            Unit::Bytes,
            metrics.inflight_bytes.clone(),
        );
        registry.register("opens_refused", "Hellos that were refused", metrics.opens_refused.clone());
        registry.register(
            "sessions_lost",
            "Sessions that went to someone newer",
            metrics.sessions_lost.clone(),
        );
        metrics.register_upgrades(registry);
        metrics
    }

    fn register_upgrades(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "upgrade_pause",
            "From when the process before took no more requests of a link until this one did",
            Unit::Seconds,
            self.upgrade_pause.clone(),
        );
        registry.register(
            "sessions_taken_over",
            "Sessions taken over from the process before",
            self.sessions_taken_over.clone(),
        );
        registry.register(
            "links_taken_over",
            "Links that go on as they were in the process before",
            self.links_taken_over.clone(),
        );
        registry.register("upgrades", "Planned upgrades that were tried, by outcome", self.upgrades.clone());
        registry.register("stalls", "Requests that took more than 100 ms", self.stalls.clone());
    }

    /// A planned upgrade ended: `refused`, `failed`, `done` or `broken`.
    pub(crate) fn upgrade_ended(&self, outcome: &'static str) {
        self.upgrades.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// A request of `bytes` of data was taken.
    pub(crate) fn started(&self, op: BlockOp, bytes: u64) {
        self.ops[slot(op)].inflight.inc();
        self.inflight_bytes.inc_by(bytes as i64);
    }

    /// It ended with an answer.
    pub(crate) fn ended(&self, op: BlockOp, bytes: u64, fault: Option<Fault>, took: Duration) {
        self.dropped(op, bytes);
        let metrics = &self.ops[slot(op)];
        metrics.requests.inc();
        metrics.latency.observe(took);
        if took > STALL {
            self.stalls.inc();
        }
        match fault {
            None => drop(metrics.bytes.inc_by(bytes)),
            Some(fault) => {
                self.faults.get_or_create(&[("op", op.name()), ("fault", fault.name())]).inc();
            }
        }
    }

    /// It was given up without an answer.
    pub(crate) fn dropped(&self, op: BlockOp, bytes: u64) {
        self.ops[slot(op)].inflight.dec();
        self.inflight_bytes.dec_by(bytes as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_shown() {
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        for op in OPS {
            metrics.started(op, 512);
        }
        metrics.ended(BlockOp::Read, 512, None, Duration::from_millis(1));
        metrics.ended(BlockOp::Write, 512, Some(Fault::NoSpace), Duration::from_millis(101));
        metrics.upgrade_ended("done");
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("encodes");
        for line in [
            "spline_gateway_requests_total{op=\"read\"} 1\n",
            "spline_gateway_data_bytes_total{op=\"read\"} 512\n",
            "spline_gateway_data_bytes_total{op=\"write\"} 0\n",
            "spline_gateway_inflight_requests{op=\"read\"} 0\n",
            "spline_gateway_inflight_requests{op=\"flush\"} 1\n",
            "spline_gateway_faults_total{op=\"write\",fault=\"no_space\"} 1\n",
            "spline_gateway_stalls_total 1\n",
            "spline_gateway_upgrades_total{outcome=\"done\"} 1\n",
            "spline_gateway_upgrade_pause_seconds_count 0\n",
            "spline_gateway_inflight_bytes 2560\n",
            "spline_gateway_request_latency_seconds_count{op=\"read\"} 1\n",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
