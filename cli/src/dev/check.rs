//! `spline dev --check`: writes, reads back and verifies through NBD, on a volume of its own.
//!
//! Called by `dev`. Must not know how anything is started. What it leaves on the volume is found by the next check:
//! that is how a restart is verified.

use super::state::DevDir;
use crate::nbd_client::{NbdAddress, NbdClient};
use crate::nebd::NebdSpec;
use crate::output::{Output, unix_ms};
use anyhow::{Context, ensure};
use serde::Serialize;
use spline_types::ByteSize;
use spline_types::limits::CHUNK_BYTES;
use std::time::Duration;

/// Time for one request. Requests wait for the cluster rather than fail; a check must end.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// Offset and bytes of what a check leaves for the next one; crosses from chunk 3 into chunk 4.
const KEPT: (u64, usize) = (4 * CHUNK_BYTES as u64 - (1 << 20), 2 << 20);
/// Requests of the scattered part, and the bytes of each. Each lands in another chunk, of which three replicas take their
/// full 16 MiB on the disk.
const SCATTERED: (u64, usize) = (16, 256 << 10);
/// Where the unaligned part lies: across a chunk's end, at an odd byte.
const UNALIGNED: (u64, usize) = (9 * CHUNK_BYTES as u64 - 1537, 4099);
/// Where the discarded part lies.
const DISCARDED: (u64, usize) = (12 * CHUNK_BYTES as u64, 1 << 20);

/// What was done.
#[derive(Serialize)]
struct Report {
    uri: String,
    volume_bytes: u64,
    done: Vec<String>,
}

/// Checks the export of `spec`, which listens at `address`, and prints what it did.
///
/// # Errors
/// What did not read back as written, or what request failed.
pub fn run(dir: &DevDir, spec: &NebdSpec, address: &NbdAddress, output: Output) -> anyhow::Result<()> {
    let mut client = NbdClient::connect(address, &spec.volume, REQUEST_LIMIT)?;
    let seed = unix_ms();
    let mut done = Vec::new();
    if let Some(earlier) = dir.state().checked {
        verify(&mut client, KEPT.0, &pattern(earlier, KEPT.0, KEPT.1)).context("data of the check before")?;
        done.push(format!("found what the check before wrote: bytes={}", KEPT.1));
    }
    scattered(&mut client, seed, &mut done)?;
    unaligned(&mut client, seed, &mut done)?;
    zeroed(&mut client, seed, &mut done)?;
    client.write(KEPT.0, &pattern(seed, KEPT.0, KEPT.1))?;
    client.flush()?;
    client.disconnect()?;

    let mut again = NbdClient::connect(address, &spec.volume, REQUEST_LIMIT)?;
    verify(&mut again, KEPT.0, &pattern(seed, KEPT.0, KEPT.1)).context("after a new connection")?;
    done.push(format!("wrote, flushed, connected anew and read back: bytes={}", KEPT.1));
    let volume_bytes = again.size();
    again.disconnect()?;
    dir.remember_check(seed)?;
    let report = Report { uri: spec.place(), volume_bytes, done };
    output.print(&report, |report| {
        let size = ByteSize(report.volume_bytes);
        let mut text = format!("checking {} ({size})\n", report.uri);
        report.done.iter().for_each(|line| text += &format!("  {line}\n"));
        text + "all data is as written\n"
    })
}

/// Writes blocks all over the volume, then reads them all back.
fn scattered(client: &mut NbdClient, seed: u64, done: &mut Vec<String>) -> anyhow::Result<()> {
    let (count, bytes) = SCATTERED;
    // Every stride lands in another chunk; the last quarter of the volume is left to the other parts' neighbours.
    let stride = client.size() / count;
    ensure!(stride >= bytes as u64, "volume is too small for the check: bytes={}", client.size());
    let places: Vec<u64> =
        (0..count).map(|at| at * stride).filter(|at| !overlaps_others(*at, bytes)).collect();
    for at in &places {
        client.write(*at, &pattern(seed, *at, bytes))?;
    }
    client.flush()?;
    for at in &places {
        verify(client, *at, &pattern(seed, *at, bytes))?;
    }
    done.push(format!(
        "wrote and read back {} places all over the volume: bytes={}",
        places.len(),
        places.len() * bytes
    ));
    Ok(())
}

fn overlaps_others(at: u64, bytes: usize) -> bool {
    [KEPT, UNALIGNED, DISCARDED]
        .iter()
        .any(|(start, length)| at < start + *length as u64 && *start < at + bytes as u64)
}

/// Writes an odd range across a chunk's end, and verifies its neighbours too.
fn unaligned(client: &mut NbdClient, seed: u64, done: &mut Vec<String>) -> anyhow::Result<()> {
    let (at, bytes) = UNALIGNED;
    let around = (at - 512, bytes + 1024);
    let mut wanted = pattern(seed, around.0, around.1);
    client.write(around.0, &wanted)?;
    let odd = pattern(seed + 1, at, bytes);
    client.write(at, &odd)?;
    wanted[512..512 + bytes].copy_from_slice(&odd);
    verify(client, around.0, &wanted).context("unaligned write across two chunks")?;
    done.push(format!(
        "wrote an odd range across two chunks, neighbours are untouched: offset={at} bytes={bytes}"
    ));
    Ok(())
}

/// Discards one half of a range and zeroes the other; both must read as zeros.
fn zeroed(client: &mut NbdClient, seed: u64, done: &mut Vec<String>) -> anyhow::Result<()> {
    let (at, bytes) = DISCARDED;
    let half = (bytes / 2) as u32;
    client.write(at, &pattern(seed, at, bytes))?;
    client.trim(at, half)?;
    client.write_zeroes(at + u64::from(half), half)?;
    verify(client, at, &vec![0; bytes]).context("discarded and zeroed range")?;
    done.push(format!("discarded and zeroed a range, it reads as zeros: bytes={bytes}"));
    Ok(())
}

/// Bytes that tell their seed and place, so that data of another place or time is recognised.
fn pattern(seed: u64, offset: u64, bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 8);
    let mut word = offset;
    while out.len() < bytes {
        // splitmix64: every word of every seed differs.
        let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(word);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        out.extend((z ^ (z >> 31)).to_le_bytes());
        word += 8;
    }
    out.truncate(bytes);
    out
}

fn verify(client: &mut NbdClient, offset: u64, wanted: &[u8]) -> anyhow::Result<()> {
    let mut found = vec![0; wanted.len()];
    client.read(offset, &mut found)?;
    match found.iter().zip(wanted).position(|(found, wanted)| found != wanted) {
        None => Ok(()),
        Some(at) => anyhow::bail!(
            "data differs from what was written: offset={} found={:#04x} wanted={:#04x}",
            offset + at as u64,
            found[at],
            wanted[at]
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_tell_seed_and_place() {
        assert_eq!(pattern(1, 0, 16)[8..], pattern(1, 8, 8));
        assert_ne!(pattern(1, 0, 8), pattern(2, 0, 8));
        assert_ne!(pattern(1, 0, 8), pattern(1, 8, 8));
        assert_eq!(pattern(1, 0, 4099).len(), 4099);
    }

    #[test]
    fn the_parts_do_not_overlap() {
        let around = (UNALIGNED.0 - 512, UNALIGNED.1 + 1024);
        for (a, b) in [(KEPT, around), (around, DISCARDED), (KEPT, DISCARDED)] {
            assert!(a.0 + a.1 as u64 <= b.0, "{a:?} {b:?}");
        }
    }
}
