//! Counters of nebd, `spline_nebd_*`. Handles are resolved once: counting takes no look-up on the IO path.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use spline_process::metrics::latency_histogram;
use spline_types::{BlockOp, Fault};
use std::time::Duration;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OpLabel {
    op: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FaultLabel {
    fault: &'static str,
}

#[derive(Debug)]
struct PerOp {
    requests: Counter,
    bytes: Counter,
    latency: Histogram,
}

/// All counters.
#[derive(Debug)]
pub struct Metrics {
    ops: [PerOp; 7],
    faults: Family<FaultLabel, Counter>,
    /// Requests that guests wait for.
    pub inflight: Gauge,
    /// Requests sent again after a lost link.
    pub replays: Counter,
    /// 1 while a gateway serves the volume.
    pub link_up: Gauge,
    /// Accepted hellos.
    pub link_connects: Counter,
    /// Connected clients.
    pub connections: Gauge,
    /// Clients ever connected.
    pub connects: Counter,
    /// Connections cut because the client broke the protocol.
    pub protocol_errors: Counter,
    /// Times that a client was named for memory that it held and did not take while others waited for it.
    pub stuck: Counter,
}

const OPS: [BlockOp; 7] = [
    BlockOp::Read,
    BlockOp::Write,
    BlockOp::Flush,
    BlockOp::Discard,
    BlockOp::WriteZeroes { no_hole: false, fast: false },
    BlockOp::Cache,
    BlockOp::Status,
];

const fn place(op: BlockOp) -> usize {
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

impl Metrics {
    /// Registers the counters.
    pub fn new(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("spline_nebd");
        let requests = Family::<OpLabel, Counter>::default();
        let bytes = Family::<OpLabel, Counter>::default();
        let latency = Family::<OpLabel, Histogram>::new_with_constructor(latency_histogram);
        registry.register("requests", "Requests of guests answered", requests.clone());
        registry.register("bytes", "Bytes of answered requests' ranges", bytes.clone());
        registry.register("request_seconds", "Time from a request to its answer", latency.clone());
        let ops = OPS.map(|op| {
            let label = OpLabel { op: op.name() };
            PerOp {
                requests: requests.get_or_create_owned(&label),
                bytes: bytes.get_or_create_owned(&label),
                latency: latency.get_or_create_owned(&label),
            }
        });
        let metrics = Self {
            ops,
            faults: Family::default(),
            inflight: Gauge::default(),
            replays: Counter::default(),
            link_up: Gauge::default(),
            link_connects: Counter::default(),
            connections: Gauge::default(),
            connects: Counter::default(),
            protocol_errors: Counter::default(),
            stuck: Counter::default(),
        };
        registry.register("faults", "Requests answered with an error", metrics.faults.clone());
        registry.register("inflight_requests", "Requests that guests wait for", metrics.inflight.clone());
        registry.register("replays", "Requests sent again after a lost link", metrics.replays.clone());
        registry.register("link_up", "1 while a gateway serves the volume", metrics.link_up.clone());
        registry.register("link_connects", "Hellos accepted by a gateway", metrics.link_connects.clone());
        registry.register("connections", "Connected clients", metrics.connections.clone());
        registry.register("client_connects", "Clients ever connected", metrics.connects.clone());
        let protocol_errors = metrics.protocol_errors.clone();
        registry.register("protocol_errors", "Connections cut for a protocol error", protocol_errors);
        registry.register(
            "stuck_clients",
            "Clients that took nothing of what they held while others waited for it",
            metrics.stuck.clone(),
        );
        metrics
    }

    /// Counts an answered request of `length` bytes.
    pub fn answered(&self, op: BlockOp, length: u64, took: Duration, result: &Result<(), Fault>) {
        let per_op = &self.ops[place(op)];
        per_op.requests.inc();
        per_op.latency.observe(took.as_secs_f64());
        match result {
            Ok(()) => {
                per_op.bytes.inc_by(length);
            }
            Err(fault) => self.refused(*fault),
        }
    }

    /// Counts a request that was answered with an error.
    pub fn refused(&self, fault: Fault) {
        self.faults.get_or_create(&FaultLabel { fault: fault.name() }).inc();
    }
}
