//! One fio run against one NBD uri, and what of its JSON is worth keeping.
//!
//! Called by `main`. Must not know which server it measures. fio's nbd engine answers `--fdatasync` with an error and
//! a figure that looks real, so a run with a non-zero `error` field is refused.

use anyhow::{Context, bail};
use std::process::Command;

/// What is asked of a server.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Name in the tables.
    pub name: &'static str,
    /// fio's `--rw`.
    pub rw: &'static str,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// Requests in flight.
    pub depth: u32,
}

/// The matrix of `make bench`.
pub const WORKLOADS: [Workload; 8] = [
    Workload { name: "4K randread, depth 32", rw: "randread", block_bytes: 4096, depth: 32 },
    Workload { name: "4K randwrite, depth 32", rw: "randwrite", block_bytes: 4096, depth: 32 },
    Workload { name: "4K randread, depth 1", rw: "randread", block_bytes: 4096, depth: 1 },
    Workload { name: "4K randwrite, depth 1", rw: "randwrite", block_bytes: 4096, depth: 1 },
    Workload { name: "1M read, depth 32", rw: "read", block_bytes: 1 << 20, depth: 32 },
    Workload { name: "1M write, depth 32", rw: "write", block_bytes: 1 << 20, depth: 32 },
    Workload { name: "1M read, depth 1", rw: "read", block_bytes: 1 << 20, depth: 1 },
    Workload { name: "1M write, depth 1", rw: "write", block_bytes: 1 << 20, depth: 1 },
];

/// What one run gave.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Requests per second.
    pub iops: f64,
    /// Mean completion latency, microseconds.
    pub mean_us: f64,
    /// Median completion latency, microseconds.
    pub p50_us: f64,
    /// 99th percentile, microseconds.
    pub p99_us: f64,
    /// Requests completed.
    pub requests: f64,
}

/// Runs `workload` on `uri` over the first `span_bytes` of the export for `seconds`.
///
/// # Errors
/// fio missing, failing, or reporting an error of its job.
pub fn run(uri: &str, workload: &Workload, span_bytes: u64, seconds: u32) -> anyhow::Result<Figures> {
    figures_of(
        command(uri, workload, span_bytes).arg("--time_based").arg(format!("--runtime={seconds}")),
        workload,
    )
}

/// Writes the first `span_bytes` of the export once, so that later reads find data.
///
/// # Errors
/// As [`run`].
pub fn fill(uri: &str, workload: &Workload, span_bytes: u64) -> anyhow::Result<()> {
    figures_of(&mut command(uri, workload, span_bytes), workload).map(drop)
}

fn command(uri: &str, workload: &Workload, span_bytes: u64) -> Command {
    let mut command = Command::new("fio");
    command
        .args(["--name=bench", "--ioengine=nbd", "--output-format=json", "--randrepeat=0"])
        .args(["--norandommap", "--random_generator=tausworthe64", "--refill_buffers"])
        .arg(format!("--uri={uri}"))
        .arg(format!("--rw={}", workload.rw))
        .arg(format!("--bs={}", workload.block_bytes))
        .arg(format!("--iodepth={}", workload.depth))
        .arg(format!("--size={span_bytes}"));
    command
}

fn figures_of(command: &mut Command, workload: &Workload) -> anyhow::Result<Figures> {
    let output = command.output().context("cannot start fio; install it with: apt install fio")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map(|at| &text[at..]).unwrap_or_default();
    let report: serde_json::Value = serde_json::from_str(json)
        .with_context(|| format!("fio gave no JSON: stderr={}", String::from_utf8_lossy(&output.stderr)))?;
    let job = &report["jobs"][0];
    if job["error"].as_i64() != Some(0) || !output.status.success() {
        bail!("fio failed: error={} stderr={}", job["error"], String::from_utf8_lossy(&output.stderr));
    }
    let side = if workload.rw.contains("read") { &job["read"] } else { &job["write"] };
    let number =
        |value: &serde_json::Value, what: &str| value.as_f64().with_context(|| format!("fio gave no {what}"));
    Ok(Figures {
        iops: number(&side["iops"], "iops")?,
        mean_us: number(&side["clat_ns"]["mean"], "mean latency")? / 1e3,
        p50_us: number(&side["clat_ns"]["percentile"]["50.000000"], "median latency")? / 1e3,
        p99_us: number(&side["clat_ns"]["percentile"]["99.000000"], "p99 latency")? / 1e3,
        requests: number(&side["total_ios"], "request count")?,
    })
}
