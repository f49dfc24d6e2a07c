//! The log's counters.
//!
//! Written by the committer and the preparer, read by the metrics endpoint.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::segments::Segments;

/// Counters, histograms and gauges of one log.
pub(super) struct Metrics {
    /// Seconds of one durable write.
    pub(super) sync_seconds: Histogram,
    /// Records per batch.
    pub(super) batch_records: Histogram,
    /// Bytes per batch, padding included.
    pub(super) batch_bytes: Histogram,
    /// Bytes written, padding included.
    pub(super) written_bytes: Counter,
    /// Entries read from the disk because they were no longer in memory.
    pub(super) disk_reads: Counter,
    live: Gauge,
    ready: Gauge,
    free: Gauge,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Metrics {
        let metrics = Metrics {
            sync_seconds: Histogram::new(exponential_buckets(20e-6, 2.0, 18)),
            batch_records: Histogram::new(exponential_buckets(1.0, 2.0, 12)),
            batch_bytes: Histogram::new(exponential_buckets(512.0, 4.0, 9)),
            written_bytes: Counter::default(),
            disk_reads: Counter::default(),
            live: Gauge::default(),
            ready: Gauge::default(),
            free: Gauge::default(),
        };
        let m = &metrics;
        registry.register("spline_wal_sync_seconds", "Durable write of one batch", m.sync_seconds.clone());
        registry.register("spline_wal_batch_records", "Records per batch", m.batch_records.clone());
        registry.register("spline_wal_batch_bytes", "Bytes per batch with padding", m.batch_bytes.clone());
        registry.register("spline_wal_written_bytes", "Bytes written with padding", m.written_bytes.clone());
        registry.register("spline_wal_disk_reads", "Entries read from the disk", m.disk_reads.clone());
        registry.register("spline_wal_segments_live", "Segments with needed records", m.live.clone());
        registry.register("spline_wal_segments_ready", "Segments prepared for use", m.ready.clone());
        registry.register("spline_wal_segments_free", "Segments to be reused or deleted", m.free.clone());
        metrics
    }

    /// Sets the segment gauges.
    pub(super) fn segments(&self, segments: &Segments) {
        self.live.set(segments.live.len() as i64);
        self.ready.set(segments.ready.len() as i64);
        self.free.set(segments.free.len() as i64);
    }
}
