//! Counters of the client. Names are an interface to operators: change them with a line in the changelog.

use crate::retry::Reason;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use spline_types::{ChunkOp, Fault};
use std::sync::atomic::AtomicI64;
use std::time::Duration;

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OpLabel {
    op: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct FaultLabel {
    fault: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct MdsLabel {
    call: &'static str,
    result: &'static str,
}

const OPS: [ChunkOp; 5] =
    [ChunkOp::Read, ChunkOp::Write, ChunkOp::WriteZeroes, ChunkOp::Discard, ChunkOp::Status];

/// The client's metrics; the series of each op are looked up once.
pub(crate) struct Metrics {
    latency: [Histogram; OPS.len()],
    inflight: Gauge<i64, AtomicI64>,
    faults: Family<FaultLabel, Counter>,
    retries: Family<ReasonLabel, Counter>,
    pub(crate) abandoned: Counter,
    mds_calls: Family<MdsLabel, Counter>,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let latency = Family::<OpLabel, Histogram>::new_with_constructor(|| {
            // 10 µs to 10 s.
            Histogram::new(exponential_buckets(10e-6, 2.0, 21))
        });
        let of = |op: ChunkOp| latency.get_or_create(&OpLabel { op: op.name() }).clone();
        let metrics = Self {
            latency: OPS.map(of),
            inflight: Gauge::default(),
            faults: Family::default(),
            retries: Family::default(),
            abandoned: Counter::default(),
            mds_calls: Family::default(),
        };
        registry.register(
            "spline_client_request_seconds",
            "Time from a span's start to its answer, retries included",
            latency,
        );
        registry.register(
            "spline_client_inflight",
            "Spans that wait for an answer",
            metrics.inflight.clone(),
        );
        registry.register("spline_client_faults", "Spans answered with a fault", metrics.faults.clone());
        registry.register(
            "spline_client_retries",
            "Attempts that were made again, by reason",
            metrics.retries.clone(),
        );
        registry.register(
            "spline_client_abandoned_attempts",
            "Attempts given up without knowing whether they were carried out",
            metrics.abandoned.clone(),
        );
        registry.register(
            "spline_client_mds_calls",
            "Calls of the metadata server, by call and result",
            metrics.mds_calls.clone(),
        );
        metrics
    }

    /// Counts a span in until the guard is dropped.
    pub(crate) fn enter(&self) -> Inflight<'_> {
        self.inflight.inc();
        Inflight(self)
    }

    pub(crate) fn answered(&self, op: ChunkOp, took: Duration, fault: Option<Fault>) {
        let place = OPS.iter().position(|&o| o == op).unwrap_or(0);
        self.latency[place].observe(took.as_secs_f64());
        if let Some(fault) = fault {
            self.faults.get_or_create(&FaultLabel { fault: fault.name() }).inc();
        }
    }

    pub(crate) fn retried(&self, reason: Reason) {
        self.retries.get_or_create(&ReasonLabel { reason: reason.name() }).inc();
    }

    pub(crate) fn mds_called(&self, call: &'static str, result: &'static str) {
        self.mds_calls.get_or_create(&MdsLabel { call, result }).inc();
    }
}

/// See [`Metrics::enter`].
pub(crate) struct Inflight<'a>(&'a Metrics);

impl Drop for Inflight<'_> {
    fn drop(&mut self) {
        self.0.inflight.dec();
    }
}
