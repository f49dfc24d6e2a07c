//! The chunkserver's metrics, `spline_chunkserver_*`.
//!
//! Called by every module that has something to count. Must not know: where metrics are served.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use spline_process::metrics::latency_histogram;
use spline_types::{ChunkOp, Fault};
use std::fmt::{self, Write};
use std::time::Duration;

/// What a request's counters are labelled with.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    op: Text,
    /// `done`, or the fault.
    outcome: Text,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OpLabels {
    op: Text,
}

/// A label out of a closed list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Text(&'static str);

impl EncodeLabelValue for Text {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(self.0)
    }
}

/// The metrics of one chunkserver.
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    request_seconds: Family<OpLabels, Histogram, fn() -> Histogram>,
    /// Bytes carried by requests and answers.
    pub request_bytes: Counter,
    /// Time to apply one batch of log entries.
    pub apply_seconds: Histogram,
    /// Time to make a copyset's checkpoint durable.
    pub checkpoint_seconds: Histogram,
    /// Blocks found that do not match their checksum.
    pub checksum_errors: Counter,
    /// Damaged blocks written again from a peer.
    pub mended: Counter,
    /// Commands refused in apply by the fence.
    pub fenced: Counter,
    /// Replicas on this server.
    pub copysets: Gauge,
    /// Replicas that lead.
    pub leaders: Gauge,
    /// Chunk files ready.
    pub pool_files: Gauge,
    /// Chunk files in use.
    pub chunk_files: Gauge,
    /// Chunk files open.
    pub open_chunks: Gauge,
    /// 1 while no more chunks fit.
    pub full: Gauge,
    /// Heartbeats that the metadata server did not answer.
    pub heartbeat_failures: Counter,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(latency_histogram),
            request_bytes: Counter::default(),
            apply_seconds: latency_histogram(),
            checkpoint_seconds: latency_histogram(),
            checksum_errors: Counter::default(),
            mended: Counter::default(),
            fenced: Counter::default(),
            copysets: Gauge::default(),
            leaders: Gauge::default(),
            pool_files: Gauge::default(),
            chunk_files: Gauge::default(),
            open_chunks: Gauge::default(),
            full: Gauge::default(),
            heartbeat_failures: Counter::default(),
        };
        let registry = registry.sub_registry_with_prefix("spline_chunkserver");
        let m = &metrics;
        registry.register("requests", "chunk requests by operation and outcome", m.requests.clone());
        registry.register("request_seconds", "time to answer chunk requests", m.request_seconds.clone());
        registry.register(
            "request_bytes",
            "bytes of data in chunk requests and answers",
            m.request_bytes.clone(),
        );
        registry.register("apply_seconds", "time to apply a batch of log entries", m.apply_seconds.clone());
        registry.register("checkpoint_seconds", "time of copyset checkpoints", m.checkpoint_seconds.clone());
        registry.register("checksum_errors", "damaged blocks found", m.checksum_errors.clone());
        registry.register("blocks_mended", "damaged blocks written again from a peer", m.mended.clone());
        registry.register("fenced", "logged commands refused by the fence", m.fenced.clone());
        registry.register("copysets", "replicas on this server", m.copysets.clone());
        registry.register("leaders", "replicas on this server that lead", m.leaders.clone());
        registry.register("pool_files", "chunk files ready for use", m.pool_files.clone());
        registry.register("chunk_files", "chunk files in use", m.chunk_files.clone());
        registry.register("open_chunks", "chunk files open", m.open_chunks.clone());
        registry.register("full", "1 while no more chunks fit", m.full.clone());
        registry.register("heartbeat_failures", "heartbeats without answer", m.heartbeat_failures.clone());
        metrics
    }

    /// Counts an answered request.
    pub fn answered(&self, op: ChunkOp, result: Result<(), Fault>, took: Duration) {
        let op = Text(op.name());
        let outcome = Text(result.err().map_or("done", Fault::name));
        self.request_seconds.get_or_create(&OpLabels { op: op.clone() }).observe(took.as_secs_f64());
        self.requests.get_or_create(&RequestLabels { op, outcome }).inc();
    }
}
