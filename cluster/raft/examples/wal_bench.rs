//! Appends per second of the write-ahead log beside a plain write + fdatasync of the same bytes, in turns, in one run.
//!
//! Usage: `cargo run --release -p spline-raft --example wal_bench -- [directory] [seconds per row]`

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus_client::registry::Registry;
use spline_raft::wal::aligned::AlignedBuffer;
use spline_raft::wal::disk::{Directory, WriteMode};
use spline_raft::wal::{Wal, WalConfig, WalDone, WalEntry};
use spline_raft::{GroupId, LogCommand};

const PAYLOAD: usize = 4096;
const ROUNDS: usize = 3;
/// Entries of a group after which its log is purged, so that segments are recycled during the run.
const PURGE_EVERY: u64 = 4096;

struct Row {
    name: String,
    per_second: f64,
    p50: Duration,
    p99: Duration,
    cpu: Duration,
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let base = PathBuf::from(arguments.next().unwrap_or_else(|| "wal-bench".to_owned()));
    let seconds: f64 = arguments.next().unwrap_or_else(|| "2".to_owned()).parse()?;
    let time = Duration::from_secs_f64(seconds);
    std::fs::create_dir_all(&base)?;
    println!("{:<34}{:>10}{:>12}{:>12}{:>14}", "", "per s", "p50 us", "p99 us", "cpu us each");
    for _ in 0..ROUNDS {
        for mode in [WriteMode::DirectSync, WriteMode::DirectDsync] {
            print(&plain(&base, mode, time)?);
            for depth in [1, 16, 64] {
                print(&log(&base, mode, depth, time)?);
            }
        }
    }
    std::fs::remove_dir_all(&base)?;
    Ok(())
}

fn print(row: &Row) {
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "{:<34}{:>10.0}{:>12.0}{:>12.0}{:>14.1}",
        row.name,
        row.per_second,
        us(row.p50),
        us(row.p99),
        us(row.cpu)
    );
}

fn row(name: String, started: (Instant, Duration), mut times: Vec<Duration>) -> anyhow::Result<Row> {
    let count = times.len().max(1);
    times.sort_unstable();
    Ok(Row {
        name,
        per_second: times.len() as f64 / started.0.elapsed().as_secs_f64(),
        p50: times.get(count / 2).copied().unwrap_or_default(),
        p99: times.get(count * 99 / 100).copied().unwrap_or_default(),
        cpu: (cpu()? - started.1) / count as u32,
    })
}

/// CPU time of this process so far.
fn cpu() -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_millis((ticks(11) + ticks(12)) * 1000 / per_second))
}

/// The floor: one thread writes one sector more than the payload (as the log does) at a time and makes it durable.
fn plain(base: &Path, mode: WriteMode, time: Duration) -> anyhow::Result<Row> {
    const SIZE: u64 = 64 << 20;
    let path = base.join("plain");
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).custom_flags(direct).open(&path)?;
    let zeros = AlignedBuffer::zeroed(1 << 20);
    for at in 0..SIZE >> 20 {
        file.write_all_at(zeros.as_ref(), at << 20)?;
    }
    file.sync_all()?;
    let buffer = AlignedBuffer::zeroed(PAYLOAD + 512);
    let length = buffer.as_ref().len() as u64;
    let started = (Instant::now(), cpu()?);
    let (mut times, mut offset) = (Vec::new(), 0);
    while started.0.elapsed() < time {
        let begun = Instant::now();
        if mode == WriteMode::DirectDsync {
            let parts = [std::io::IoSlice::new(buffer.as_ref())];
            rustix::io::pwritev2(&file, &parts, offset, rustix::io::ReadWriteFlags::DSYNC)?;
        } else {
            file.write_all_at(buffer.as_ref(), offset)?;
            file.sync_data()?;
        }
        times.push(begun.elapsed());
        offset = (offset + length) % (SIZE - length) / 512 * 512;
    }
    let row = row(format!("plain {mode:?}"), started, times);
    std::fs::remove_file(path)?;
    row
}

/// One thread keeps `depth` appends of as many groups in flight.
fn log(base: &Path, mode: WriteMode, depth: u64, time: Duration) -> anyhow::Result<Row> {
    let path = base.join("log");
    let disk = Directory::open_with(&path, Some(mode))?;
    let (wal, _) = Wal::open_on(Arc::new(disk), WalConfig::default(), &mut Registry::default())?;
    let (sender, receiver) = mpsc::channel();
    let payload = Bytes::from(vec![0x5a; PAYLOAD]);
    let append = |group: u64, index: u64| {
        let command = LogCommand { meta: Bytes::from_static(&[0; 64]), payload: payload.clone() };
        let entry = WalEntry { index, header: Bytes::from_static(&[0; 25]), command };
        let (sender, begun) = (sender.clone(), Instant::now());
        let done = WalDone::call(move |outcome| {
            // The receiver lives until every append has answered.
            let _ = sender.send((group, index, begun, outcome));
        });
        wal.append(GroupId(group as u32), vec![entry], done);
    };
    append(0, 0);
    receiver.recv()?.3?;
    let started = (Instant::now(), cpu()?);
    let mut times = Vec::new();
    (1..=depth).for_each(|group| append(group, 0));
    let mut flying = depth;
    while flying > 0 {
        let (group, index, begun, outcome) = receiver.recv()?;
        outcome?;
        times.push(begun.elapsed());
        if index % PURGE_EVERY == PURGE_EVERY - 1 {
            wal.purge(GroupId(group as u32), index - 1, Bytes::from_static(b"purged"));
        }
        if started.0.elapsed() < time {
            append(group, index + 1);
        } else {
            flying -= 1;
        }
    }
    let row = row(format!("log {mode:?} {depth} in flight"), started, times);
    wal.close();
    std::fs::remove_dir_all(path)?;
    row
}
