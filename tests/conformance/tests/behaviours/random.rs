//! Random requests of all kinds on four queues, many in flight, against a copy of the disk in memory.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use spline_conformance::disk::{Disk, Request, same};
use spline_conformance::place::{Place, QUEUES, on};
use spline_conformance::{MIB, pattern};

const DISK: u64 = 20 * MIB;
const SECTOR: u64 = 512;
/// Requests in flight together.
const BATCH: usize = 48;
/// The disk in strips: a request of a batch keeps to a strip of its own, since nothing orders those that overlap.
const STRIP: u64 = DISK / BATCH as u64 / SECTOR * SECTOR;

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let rounds = if std::env::var_os("SPLINE_ROUNDS").is_some() { 400 } else { 25 };
    let served = place.serve(DISK)?;
    on(&served, || {
        let mut disk = served.open_with(usize::from(QUEUES), false)?;
        let mut random = StdRng::seed_from_u64(0x5eed);
        let mut copy = vec![0; DISK as usize];
        for round in 0..rounds {
            batch(&mut *disk, &mut random, &mut copy)
                .map_err(|error| error.context(format!("round={round}")))?;
        }
        for (at, piece) in copy.chunks(MIB as usize).enumerate() {
            disk.holds(at as u64 * MIB, piece)?;
        }
        Ok(())
    })
}

/// A batch of requests; each read must find what the copy holds.
fn batch(disk: &mut dyn Disk, random: &mut StdRng, copy: &mut [u8]) -> anyhow::Result<()> {
    // Not always from the same place, so that strips cross one another from batch to batch.
    let shift = random.random_range(0..STRIP / SECTOR) * SECTOR;
    let mut requests = Vec::new();
    for strip in 0..BATCH as u64 - 1 {
        let begin = shift + strip * STRIP;
        let sectors = if random.random_range(0..4) == 0 { STRIP / SECTOR } else { 32 };
        let length = random.random_range(1..=sectors) * SECTOR;
        let offset = begin + random.random_range(0..=(STRIP - length) / SECTOR) * SECTOR;
        let queue = random.random_range(0..disk.queues());
        requests.push((queue, request(random, offset, length)));
    }
    let answers = disk.all_succeed(requests.clone())?;
    for ((_, request), found) in requests.into_iter().zip(answers) {
        match request {
            Request::Read { offset, .. } => {
                same(offset, &found, &copy[offset as usize..][..found.len()])?;
            }
            Request::Write { offset, pieces } => {
                let data = pieces.concat();
                copy[offset as usize..][..data.len()].copy_from_slice(&data);
            }
            Request::Discard { offset, length } | Request::Zero { offset, length, .. } => {
                copy[offset as usize..][..length as usize].fill(0);
            }
            Request::Flush => {}
        }
    }
    Ok(())
}

fn request(random: &mut StdRng, offset: u64, length: u64) -> Request {
    match random.random_range(0..10) {
        0..4 => Request::Read { offset, pieces: pieces(random, length) },
        4..8 => {
            let data = pattern(random.random(), offset, length as usize);
            let mut rest = &data[..];
            let mut cut = |length| {
                let (piece, left) = rest.split_at(length);
                rest = left;
                piece.to_vec()
            };
            Request::Write { offset, pieces: pieces(random, length).into_iter().map(&mut cut).collect() }
        }
        8 if random.random() => Request::Discard { offset, length },
        8 => Request::Flush,
        _ => Request::Zero { offset, length, unmap: random.random() },
    }
}

/// Up to five pieces of together `length` bytes.
fn pieces(random: &mut StdRng, length: u64) -> Vec<usize> {
    let mut left = length as usize;
    let mut pieces = Vec::new();
    while left > 0 && pieces.len() < 4 && random.random() {
        let piece = random.random_range(1..=left);
        pieces.push(piece);
        left -= piece;
    }
    pieces.extend((left > 0).then_some(left));
    pieces
}
