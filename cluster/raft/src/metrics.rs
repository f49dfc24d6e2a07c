//! The crate's counters and histograms, registered once per host.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Counters of one host; incremented from any task.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) proposals: Counter,
    pub(crate) proposals_refused: Counter,
    pub(crate) propose_seconds: Histogram,
    pub(crate) round_proposals: Histogram,
    pub(crate) applied: Counter,
    pub(crate) replayed: Counter,
    pub(crate) reads_by_lease: Counter,
    pub(crate) reads_by_round: Counter,
    pub(crate) reads_refused: Counter,
    pub(crate) appends_sent: Counter,
    pub(crate) appends_received: Counter,
    pub(crate) entries_sent: Counter,
    pub(crate) elections: Counter,
    pub(crate) votes_withheld: Counter,
    pub(crate) beats_refused: Counter,
    pub(crate) requests_refused: Counter,
    pub(crate) checkpoints: Counter,
    pub(crate) snapshot_items_sent: Counter,
    pub(crate) snapshot_items_received: Counter,
    pub(crate) links_broken: Counter,
    pub(crate) replicas_ended: Counter,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Metrics {
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(format!("spline_raft_{name}"), help, counter.clone());
            counter
        };
        let metrics = Metrics {
            proposals: counter("proposals", "Commands proposed here"),
            proposals_refused: counter("proposals_refused", "Proposals that ended without an answer"),
            applied: counter("applied", "Commands applied"),
            replayed: counter("replayed", "Commands applied that were in the log at the start"),
            reads_by_lease: counter("reads_by_lease", "Reads allowed by the leader lease alone"),
            reads_by_round: counter("reads_by_round", "Reads that needed a round to the followers"),
            reads_refused: counter("reads_refused", "Reads refused: not the leader, or no quorum"),
            appends_sent: counter("appends_sent", "Append messages sent"),
            appends_received: counter("appends_received", "Append messages received"),
            entries_sent: counter("entries_sent", "Log entries sent to followers"),
            elections: counter("elections", "Elections this host asked for, pre-votes included"),
            votes_withheld: counter("votes_withheld", "Votes withheld while a leader had its lease"),
            beats_refused: counter(
                "beats_refused",
                "Heartbeats that a follower did not accept, sent again alone",
            ),
            requests_refused: counter(
                "requests_refused",
                "Requests of peers refused: too many wait, or the log does",
            ),
            checkpoints: counter("checkpoints", "Checkpoints completed"),
            snapshot_items_sent: counter("snapshot_items_sent", "Snapshot items sent"),
            snapshot_items_received: counter("snapshot_items_received", "Snapshot items received"),
            links_broken: counter("links_broken", "Connections to peers that broke"),
            replicas_ended: counter("replicas_ended", "Replicas that ended before they were stopped"),
            // 20 µs to 10 s.
            propose_seconds: Histogram::new(exponential_buckets(20e-6, 2.0, 20)),
            round_proposals: Histogram::new(exponential_buckets(1.0, 2.0, 12)),
        };
        let latency = metrics.propose_seconds.clone();
        registry.register("spline_raft_propose_seconds", "From proposal to answer", latency);
        let sizes = metrics.round_proposals.clone();
        registry.register("spline_raft_round_proposals", "Proposals gathered into one round", sizes);
        metrics
    }
}
