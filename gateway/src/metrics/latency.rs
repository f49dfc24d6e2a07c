//! A latency histogram without a lock: every request of every link counts here.
//!
//! Called by [`Metrics`](super::Metrics). Buckets are those of all of Spline ([`latency_histogram`]'s: 10 µs to 10 s).

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::histogram::exponential_buckets_range;
use prometheus_client::metrics::{MetricType, TypedMetric};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds: steps by a factor of about 2.15 from 10 µs to 10 s.
const BOUNDS: usize = 19;

/// Latencies of one operation. Clones are one histogram.
#[derive(Clone, Debug)]
pub(super) struct Latency(Arc<Buckets>);

#[derive(Debug)]
struct Buckets {
    /// In nanoseconds, rising.
    bounds: [u64; BOUNDS],
    /// How many were at most the bound and above the one before; the last is above all.
    counts: [AtomicU64; BOUNDS + 1],
    /// Nanoseconds; enough for five centuries of waiting.
    sum: AtomicU64,
}

impl Default for Latency {
    fn default() -> Self {
        let mut seconds = exponential_buckets_range(10e-6, 10.0, BOUNDS as u16);
        let bounds = std::array::from_fn(|_| (seconds.next().unwrap_or(f64::MAX) * 1e9) as u64);
        let counts = std::array::from_fn(|_| AtomicU64::new(0));
        Self(Arc::new(Buckets { bounds, counts, sum: AtomicU64::new(0) }))
    }
}

impl Latency {
    /// Counts one.
    pub(super) fn observe(&self, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let place = self.0.bounds.partition_point(|bound| *bound < nanoseconds);
        self.0.counts[place].fetch_add(1, Ordering::Relaxed);
        self.0.sum.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

impl EncodeMetric for Latency {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = self.0.bounds.iter().map(|bound| *bound as f64 / 1e9).chain([f64::MAX]);
        let counts = self.0.counts.iter().map(|count| count.load(Ordering::Relaxed));
        let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
        // The sum of the buckets, not a count of its own: what is shown agrees with itself.
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = self.0.sum.load(Ordering::Relaxed) as f64 / 1e9;
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

impl TypedMetric for Latency {
    const TYPE: MetricType = MetricType::Histogram;
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    /// As the library's own, which has a lock, shows the same.
    #[test]
    fn what_is_shown_is_what_the_locked_one_shows() {
        let (ours, theirs) = (Latency::default(), spline_process::metrics::latency_histogram());
        for micros in [0, 1, 9, 10, 11, 21, 22, 1_000, 999_999, 10_000_000, 10_000_001, 60_000_000] {
            ours.observe(Duration::from_micros(micros));
            theirs.observe(Duration::from_micros(micros).as_secs_f64());
        }
        let shown = |register: &dyn Fn(&mut Registry)| {
            let (mut registry, mut text) = (Registry::default(), String::new());
            register(&mut registry);
            encode(&mut text, &registry).expect("encodes");
            let lines = text.lines().filter(|line| !line.contains("_sum"));
            // Bounds are whole nanoseconds here.
            lines.map(|line| line.rsplit(' ').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
        };
        let ours_shown = shown(&|registry| registry.register("latency", "it", ours.clone()));
        assert_eq!(ours_shown, shown(&|registry| registry.register("latency", "it", theirs.clone())));
        assert!(ours_shown.contains(&"12".to_owned()), "{ours_shown:?}");
        assert_eq!(ours.0.sum.load(Ordering::Relaxed), 81_001_074_000);
    }
}
