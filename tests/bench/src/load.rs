//! The in-tree load generator: one connection, one thread, a fixed number of requests in flight.
//!
//! Called by `main` beside fio, so that no figure hangs on one client's habits. It sends as soon as an answer has come,
//! so the depth is always what was asked for. Must not know which server it measures.

use crate::fio::{Figures, Workload};
use anyhow::{Context, ensure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use spline_harness::nbd::{Connection, Kind, Receiver, Sender};
use std::path::Path;
use std::time::{Duration, Instant};

/// Limit of the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Runs `workload` on the export at a unix socket over its first `span_bytes` for `seconds`.
///
/// # Errors
/// Those of the connection, and the first request that the server fails.
pub fn run(
    socket: &Path,
    export: &str,
    workload: &Workload,
    span_bytes: u64,
    seconds: u32,
) -> anyhow::Result<Figures> {
    let connection = Connection::open(socket, export, HANDSHAKE)?;
    let blocks = span_bytes.min(connection.size()) / u64::from(workload.block_bytes);
    ensure!(blocks > 0, "the span holds no block: span={span_bytes} block={}", workload.block_bytes);
    let (sender, receiver) = connection.split()?;
    let mut random = StdRng::seed_from_u64(0x5eed);
    let mut data = vec![0; workload.block_bytes as usize];
    random.fill(&mut data[..]);
    let load = Load {
        sender,
        receiver,
        kind: if workload.rw.contains("read") { Kind::Read } else { Kind::Write },
        is_random: workload.rw.starts_with("rand"),
        block_bytes: workload.block_bytes,
        blocks,
        random,
        data,
        sent: 0,
        begun: vec![Instant::now(); workload.depth as usize],
    };
    load.run(Duration::from_secs(u64::from(seconds)))
}

struct Load {
    sender: Sender,
    receiver: Receiver,
    kind: Kind,
    is_random: bool,
    block_bytes: u32,
    blocks: u64,
    random: StdRng,
    data: Vec<u8>,
    sent: u64,
    /// When each slot's request was sent; the slot is the cookie.
    begun: Vec<Instant>,
}

impl Load {
    fn run(mut self, length: Duration) -> anyhow::Result<Figures> {
        let mut latencies = Vec::new();
        let started = Instant::now();
        for slot in 0..self.begun.len() {
            self.send(slot)?;
        }
        let mut in_flight = self.begun.len();
        while in_flight > 0 {
            let slot = self.receive()?;
            let now = Instant::now();
            latencies.push((now - self.begun[slot]).as_secs_f64() * 1e6);
            if now - started < length {
                self.send(slot)?;
            } else {
                in_flight -= 1;
            }
        }
        self.sender.send(Kind::Disconnect, 0, 0, 0, &[])?;
        Ok(figures(latencies, started.elapsed()))
    }

    fn send(&mut self, slot: usize) -> anyhow::Result<()> {
        let block =
            if self.is_random { self.random.random_range(0..self.blocks) } else { self.sent % self.blocks };
        self.sent += 1;
        let offset = block * u64::from(self.block_bytes);
        let data: &[u8] = if self.kind == Kind::Write { &self.data } else { &[] };
        self.begun[slot] = Instant::now();
        self.sender.send(self.kind, slot as u64, offset, self.block_bytes, data)
    }

    fn receive(&mut self) -> anyhow::Result<usize> {
        let reply = self.receiver.reply()?.context("the server closed the connection")?;
        ensure!(reply.errno == 0, "request failed: kind={:?} errno={}", self.kind, reply.errno);
        if self.kind == Kind::Read {
            self.receiver.data(&mut self.data)?;
        }
        Ok(reply.cookie as usize)
    }
}

/// Figures of latencies in microseconds; all of them were measured within `elapsed`.
pub fn figures(mut latencies: Vec<f64>, elapsed: Duration) -> Figures {
    latencies.sort_by(f64::total_cmp);
    let count = latencies.len();
    let at =
        |share: f64| latencies.get(((count as f64 * share) as usize).min(count - 1)).copied().unwrap_or(0.0);
    Figures {
        iops: count as f64 / elapsed.as_secs_f64(),
        mean_us: latencies.iter().sum::<f64>() / count as f64,
        p50_us: at(0.5),
        p99_us: at(0.99),
        requests: count as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_of_what_was_measured() {
        let found = figures((1..=1000).rev().map(f64::from).collect(), Duration::from_secs(2));
        assert_eq!((found.iops, found.requests), (500.0, 1000.0));
        assert_eq!((found.mean_us, found.p50_us, found.p99_us), (500.5, 501.0, 991.0));
    }
}
