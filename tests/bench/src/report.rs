//! Rounds of figures to a table of medians and ratios. Pure.

use crate::fio::Figures;
use std::fmt::Write;

/// What one server gave for one workload, over all rounds.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// Requests per second, one per round.
    pub iops: Vec<f64>,
    /// Mean latency, microseconds.
    pub mean_us: Vec<f64>,
    /// Median latency, microseconds.
    pub p50_us: Vec<f64>,
    /// 99th percentile, microseconds.
    pub p99_us: Vec<f64>,
    /// CPU microseconds of all server processes per request.
    pub cpu_us: Vec<f64>,
}

impl Series {
    /// Adds a round.
    pub fn push(&mut self, figures: Figures, cpu_seconds: f64) {
        self.iops.push(figures.iops);
        self.mean_us.push(figures.mean_us);
        self.p50_us.push(figures.p50_us);
        self.p99_us.push(figures.p99_us);
        self.cpu_us.push(cpu_seconds * 1e6 / figures.requests.max(1.0));
    }
}

/// The middle value; of an even number, the mean of the two. 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// The least value that at least this share of the values does not pass. 0 of none.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

/// The head of a table of [`rows`].
pub const HEAD: &str = "\n| workload | client | server | IOPS | MB/s | mean µs | p50 µs | p99 µs | CPU s per 1000 IO | IOPS ratio | CPU ratio |\n\
    |---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n";

/// One workload by one client: a row a server; ratios are taken round by round against the first server.
pub fn rows(workload: &str, client: &str, block_bytes: u32, servers: &[(String, Series)]) -> String {
    let mut text = String::new();
    let Some((_, first)) = servers.first() else { return text };
    for (name, series) in servers {
        let iops = median(&series.iops);
        // Writing to a String can not fail.
        let _ = writeln!(
            text,
            "| {workload} | {client} | {name} | {iops:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.4} | {:.2} | {:.2} |",
            iops * f64::from(block_bytes) / 1e6,
            median(&series.mean_us),
            median(&series.p50_us),
            median(&series.p99_us),
            median(&series.cpu_us) / 1000.0,
            each(&series.iops, &first.iops, |a, b| a / b),
            each(&series.cpu_us, &first.cpu_us, |a, b| a / b),
        );
    }
    text
}

/// The head of a table of [`against`].
pub const AGAINST_HEAD: &str = "\n| workload | client | against | IOPS ratio | CPU ratio | mean latency, µs more | ratio | p50, µs more | ratio | p99, µs more |\n\
    |---|---|---|---:|---:|---:|---:|---:|---:|---:|\n";

/// What the last of the servers gives against each of the others, a row each: medians of what each round says.
pub fn against(workload: &str, client: &str, servers: &[(String, Series)]) -> String {
    let mut text = String::new();
    let Some(((_, ours), others)) = servers.split_last() else { return text };
    for (name, theirs) in others {
        let ratio = |of: fn(&Series) -> &Vec<f64>| each(of(ours), of(theirs), |a, b| a / b);
        let more = |of: fn(&Series) -> &Vec<f64>| each(of(ours), of(theirs), |a, b| a - b);
        // Writing to a String can not fail.
        let _ = writeln!(
            text,
            "| {workload} | {client} | {name} | {:.2} | {:.2} | {:+.1} | {:.2} | {:+.1} | {:.2} | {:+.1} |",
            ratio(|series| &series.iops),
            ratio(|series| &series.cpu_us),
            more(|series| &series.mean_us),
            ratio(|series| &series.mean_us),
            more(|series| &series.p50_us),
            ratio(|series| &series.p50_us),
            more(|series| &series.p99_us),
        );
    }
    text
}

/// The median of what each round says.
fn each(ours: &[f64], theirs: &[f64], what: fn(f64, f64) -> f64) -> f64 {
    let rounds = ours.iter().zip(theirs).map(|(a, b)| what(*a, b.max(f64::MIN_POSITIVE)));
    median(&rounds.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn percentiles_are_values_that_were_seen() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!((percentile(&values, 0.5), percentile(&values, 0.99)), (100.0, 198.0));
        assert_eq!(percentile(&values[..30], 0.99), 200.0);
        assert_eq!(percentile(&[], 0.99), 0.0);
    }

    #[test]
    fn the_last_is_set_against_the_others_round_by_round() {
        let series = |iops: &[f64], us: f64| {
            let (latency, cpu_us) = (vec![us; iops.len()], vec![us / 10.0; iops.len()]);
            Series {
                iops: iops.to_vec(),
                mean_us: latency.clone(),
                p50_us: latency.clone(),
                p99_us: latency,
                cpu_us,
            }
        };
        let rows = [
            ("a".to_owned(), series(&[10.0, 100.0, 10.0], 40.0)),
            ("b".to_owned(), series(&[40.0, 40.0, 40.0], 10.0)),
            ("c".to_owned(), series(&[20.0, 50.0, 20.0], 50.0)),
        ];
        let text = against("w", "fio", &rows);
        assert!(
            text.contains("| w | fio | a | 2.00 | 1.25 | +10.0 | 1.25 | +10.0 | 1.25 | +10.0 |\n"),
            "{text}"
        );
        assert!(text.contains("| w | fio | b | 0.50 | 5.00 | +40.0 | 5.00 |"), "{text}");
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let series =
            |iops: &[f64]| Series { iops: iops.to_vec(), cpu_us: vec![1.0; iops.len()], ..Series::default() };
        let rows =
            [("a".to_owned(), series(&[10.0, 100.0, 10.0])), ("b".to_owned(), series(&[20.0, 50.0, 20.0]))];
        let text = super::rows("w", "fio", 4096, &rows);
        assert!(text.contains("| w | fio | b | 20 |") && text.contains("| 2.00 | 1.00 |"), "{text}");
    }
}
