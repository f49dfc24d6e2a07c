//! The load generator that is a guest: the `blkio` crate's driver on one virtqueue, a fixed number of requests in flight.
//!
//! Called by `main` for vhost-user-blk exports, ours and others'. Requests that are longer than a device's pieces may be come
//! in pieces. Must not know which server it measures.

use crate::fio::{Figures, Workload};
use crate::load::figures;
use anyhow::ensure;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use spline_harness::virtio::{Answered, Slot, VirtioDisk, Wish};
use std::path::Path;
use std::time::{Duration, Instant};

/// Descriptors of the queue: enough for 32 requests of 1 MiB in pieces of 256 KiB.
const QUEUE_SIZE: u16 = 256;
/// No answer takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// One virtqueue, and memory for requests.
pub fn wish(memory: usize) -> Wish {
    Wish { queues: 1, queue_size: QUEUE_SIZE, read_only: false, memory }
}

/// Runs `workload` on the device at a socket over its first `span_bytes` for `seconds`.
///
/// # Errors
/// Those of the device, and the first request that it fails.
pub fn run(socket: &Path, workload: &Workload, span_bytes: u64, seconds: u32) -> anyhow::Result<Figures> {
    let (block, depth) = (workload.block_bytes as usize, workload.depth as usize);
    let disk = VirtioDisk::open(socket, wish(block * depth))?;
    let blocks = span_bytes.min(disk.facts().size) / block as u64;
    ensure!(blocks > 0, "the span holds no block: span={span_bytes} block={block}");
    let mut random = StdRng::seed_from_u64(0x5eed);
    let mut data = vec![0; block];
    random.fill(&mut data[..]);
    let slots =
        (0..depth).map(|slot| disk.slot(slot * block, &[block])).collect::<anyhow::Result<Vec<_>>>()?;
    (0..depth).try_for_each(|slot| disk.fill(slot * block, &data))?;
    let load = Load {
        disk,
        slots,
        reads: workload.rw.contains("read"),
        is_random: workload.rw.starts_with("rand"),
        block: block as u64,
        blocks,
        random,
        sent: 0,
        begun: vec![Instant::now(); depth],
    };
    load.run(Duration::from_secs(u64::from(seconds)))
}

/// Writes the first `bytes` of the device, as a guest.
///
/// # Errors
/// Those of the device, and the first request that it fails.
pub fn write_whole(socket: &Path, bytes: u64) -> anyhow::Result<()> {
    const BLOCK: usize = 1 << 20;
    let mut disk = VirtioDisk::open(socket, wish(BLOCK))?;
    let slot = disk.slot(0, &[BLOCK])?;
    let mut data = vec![0; BLOCK];
    StdRng::seed_from_u64(0xf111).fill(&mut data[..]);
    disk.fill(0, &data)?;
    for at in 0..bytes.div_ceil(BLOCK as u64) {
        disk.write(0, at * BLOCK as u64, &slot, 0);
        let mut answers = Vec::new();
        disk.reap(0, 1, PATIENCE, &mut answers)?;
        ensure!(answers == [Answered { tag: 0, result: 0 }], "{answers:?}");
    }
    Ok(())
}

/// Time from a connection to the answer of its first read, microseconds.
///
/// # Errors
/// Those of the device.
pub fn first_read_us(socket: &Path) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let mut disk = VirtioDisk::open(socket, wish(4096))?;
    let slot = disk.slot(0, &[4096])?;
    disk.read(0, 0, &slot, 0);
    let mut answers = Vec::new();
    disk.reap(0, 1, PATIENCE, &mut answers)?;
    ensure!(answers == [Answered { tag: 0, result: 0 }], "{answers:?}");
    Ok(begun.elapsed().as_secs_f64() * 1e6)
}

/// A guest that is connected and asks for nothing.
///
/// # Errors
/// Those of the device.
pub fn idle(socket: &Path) -> anyhow::Result<VirtioDisk> {
    let mut disk = VirtioDisk::open(socket, wish(4096))?;
    let slot = disk.slot(0, &[4096])?;
    disk.read(0, 0, &slot, 0);
    disk.reap(0, 1, PATIENCE, &mut Vec::new())?;
    Ok(disk)
}

struct Load {
    disk: VirtioDisk,
    slots: Vec<Slot>,
    reads: bool,
    is_random: bool,
    block: u64,
    blocks: u64,
    random: StdRng,
    sent: u64,
    /// When each slot's request was sent; the slot is the tag.
    begun: Vec<Instant>,
}

impl Load {
    fn run(mut self, length: Duration) -> anyhow::Result<Figures> {
        let mut latencies = Vec::new();
        let mut answers = Vec::new();
        let started = Instant::now();
        (0..self.slots.len()).for_each(|slot| self.send(slot));
        let mut in_flight = self.slots.len();
        while in_flight > 0 {
            answers.clear();
            self.disk.reap(0, 1, PATIENCE, &mut answers)?;
            let now = Instant::now();
            for answer in &answers {
                ensure!(answer.result == 0, "request failed: reads={} error={}", self.reads, answer.result);
                latencies.push((now - self.begun[answer.tag]).as_secs_f64() * 1e6);
                if now - started < length {
                    self.send(answer.tag);
                } else {
                    in_flight -= 1;
                }
            }
        }
        Ok(figures(latencies, started.elapsed()))
    }

    /// The device is told with the next look for answers.
    fn send(&mut self, slot: usize) {
        let block =
            if self.is_random { self.random.random_range(0..self.blocks) } else { self.sent % self.blocks };
        self.sent += 1;
        self.begun[slot] = Instant::now();
        if self.reads {
            self.disk.read(0, block * self.block, &self.slots[slot], slot);
        } else {
            self.disk.write(0, block * self.block, &self.slots[slot], slot);
        }
    }
}
