//! Counters of nebd, `spline_nebd_*`. Handles are resolved once: counting takes no look-up on the IO path, and each thread has
//! its own, so that no lock is shared between queues.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};
use spline_process::metrics::latency_histogram;
use spline_types::{BlockOp, Fault};
use std::time::Duration;

/// Whose counters these are.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Owner {
    /// The volume.
    pub volume: String,
    /// The thread that counts: `nbd`, or `vhost-0` and so on.
    pub thread: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OpLabel {
    #[prometheus(flatten)]
    owner: Owner,
    op: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FaultLabel {
    #[prometheus(flatten)]
    owner: Owner,
    fault: &'static str,
}

type Counters = Family<Owner, Counter>;
type Gauges = Family<Owner, Gauge>;

/// All counters of a process, by owner.
#[derive(Clone, Debug)]
pub struct Families {
    requests: Family<OpLabel, Counter>,
    bytes: Family<OpLabel, Counter>,
    latency: Family<OpLabel, Histogram>,
    faults: Family<FaultLabel, Counter>,
    inflight: Gauges,
    replays: Counters,
    link_up: Gauges,
    link_connects: Counters,
    link_wakeups: Counters,
    polls: Counters,
    poll_hits: Counters,
    stalls: Counters,
    connections: Gauges,
    connects: Counters,
    protocol_errors: Counters,
    stuck: Counters,
    resubmitted: Counters,
    broken_queues: Counters,
    refused_messages: Counters,
}

impl Families {
    /// Registers the counters; once for a process.
    pub fn new(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("spline_nebd");
        Self {
            requests: add(registry, "requests", "Requests of guests answered", Family::default()),
            bytes: add(registry, "bytes", "Bytes of answered requests' ranges", Family::default()),
            latency: add(
                registry,
                "request_seconds",
                "Time from a request to its answer",
                Family::new_with_constructor(latency_histogram as fn() -> Histogram),
            ),
            faults: add(registry, "faults", "Requests answered with an error", Family::default()),
            inflight: add(registry, "inflight_requests", "Requests that guests wait for", Family::default()),
            replays: add(
                registry,
                "replays",
                "Requests sent again: their link was lost, or their gateway left",
                Family::default(),
            ),
            link_up: add(registry, "link_up", "1 while a gateway serves the volume", Family::default()),
            link_connects: add(registry, "link_connects", "Hellos accepted by a gateway", Family::default()),
            link_wakeups: add(
                registry,
                "link_wakeups",
                "Times that the gateway slept and had to be woken for requests in a ring",
                Family::default(),
            ),
            polls: add(
                registry,
                "polls",
                "Times that a guest's queues, or the ring of a link of NBD clients, were looked at for a moment before a sleep",
                Family::default(),
            ),
            poll_hits: add(
                registry,
                "poll_hits",
                "Such looks that made the sleep needless",
                Family::default(),
            ),
            stalls: add(registry, "stalls", "Requests answered later than after 100 ms", Family::default()),
            connections: add(registry, "connections", "Connected clients", Family::default()),
            connects: add(registry, "client_connects", "Clients ever connected", Family::default()),
            protocol_errors: add(
                registry,
                "protocol_errors",
                "Connections cut for a protocol error",
                Family::default(),
            ),
            stuck: add(
                registry,
                "stuck_clients",
                "Clients that took nothing of what they held while others waited for it",
                Family::default(),
            ),
            resubmitted: add(
                registry,
                "resubmitted_requests",
                "Requests of a guest that an earlier process left unanswered",
                Family::default(),
            ),
            broken_queues: add(
                registry,
                "broken_queues",
                "Virtqueues that made no sense and were not served until their reset",
                Family::default(),
            ),
            refused_messages: add(
                registry,
                "refused_messages",
                "Messages of vhost-user front-ends that were answered with an error",
                Family::default(),
            ),
        }
    }

    /// The handles of one owner.
    pub fn of(&self, volume: &str, thread: &str) -> Metrics {
        let owner = Owner { volume: volume.to_owned(), thread: thread.to_owned() };
        let ops = OPS.map(|op| {
            let label = OpLabel { owner: owner.clone(), op: op.name() };
            PerOp {
                requests: self.requests.get_or_create_owned(&label),
                bytes: self.bytes.get_or_create_owned(&label),
                latency: self.latency.get_or_create_owned(&label),
            }
        });
        Metrics {
            ops,
            faults: self.faults.clone(),
            inflight: self.inflight.get_or_create_owned(&owner),
            replays: self.replays.get_or_create_owned(&owner),
            link_up: self.link_up.get_or_create_owned(&owner),
            link_connects: self.link_connects.get_or_create_owned(&owner),
            link_wakeups: self.link_wakeups.get_or_create_owned(&owner),
            polls: self.polls.get_or_create_owned(&owner),
            poll_hits: self.poll_hits.get_or_create_owned(&owner),
            stalls: self.stalls.get_or_create_owned(&owner),
            connections: self.connections.get_or_create_owned(&owner),
            connects: self.connects.get_or_create_owned(&owner),
            protocol_errors: self.protocol_errors.get_or_create_owned(&owner),
            stuck: self.stuck.get_or_create_owned(&owner),
            resubmitted: self.resubmitted.get_or_create_owned(&owner),
            broken_queues: self.broken_queues.get_or_create_owned(&owner),
            refused_messages: self.refused_messages.get_or_create_owned(&owner),
            owner,
        }
    }
}

fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

#[derive(Debug)]
struct PerOp {
    requests: Counter,
    bytes: Counter,
    latency: Histogram,
}

/// What a guest notices: a request that takes longer has stalled.
pub const STALL: Duration = Duration::from_millis(100);

/// The counters of one thread.
#[derive(Debug)]
pub struct Metrics {
    owner: Owner,
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
    /// Times that the gateway had to be woken for requests in a ring.
    pub link_wakeups: Counter,
    /// Looks at rings before a sleep.
    pub polls: Counter,
    /// Those that made it needless.
    pub poll_hits: Counter,
    /// Requests answered later than after [`STALL`].
    pub stalls: Counter,
    /// Connected clients.
    pub connections: Gauge,
    /// Clients ever connected.
    pub connects: Counter,
    /// Connections cut because the client broke the protocol.
    pub protocol_errors: Counter,
    /// Times that a client was named for memory that it held and did not take while others waited for it.
    pub stuck: Counter,
    /// Requests of a guest that an earlier process left unanswered.
    pub resubmitted: Counter,
    /// Virtqueues that made no sense.
    pub broken_queues: Counter,
    /// Messages of vhost-user front-ends that were answered with an error.
    pub refused_messages: Counter,
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
    /// Counts an answered request of `length` bytes.
    pub fn answered(&self, op: BlockOp, length: u64, took: Duration, result: &Result<(), Fault>) {
        let per_op = &self.ops[place(op)];
        per_op.requests.inc();
        per_op.latency.observe(took.as_secs_f64());
        if took > STALL {
            self.stalls.inc();
        }
        match result {
            Ok(()) => {
                per_op.bytes.inc_by(length);
            }
            Err(fault) => self.refused(*fault),
        }
    }

    /// Counts a request that was answered with an error.
    pub fn refused(&self, fault: Fault) {
        self.faults.get_or_create(&FaultLabel { owner: self.owner.clone(), fault: fault.name() }).inc();
    }
}
