//! From arbitrary bytes to segment files that are nearly right: right checksums around arbitrary fields, then damage.
//!
//! Each step is a byte and its arguments; what the input lacks at its end is zero.

use super::SEGMENT_BYTES;
use super::memory::Image;
use bytes::Bytes;
use spline_raft::wal::WalEntry;
use spline_raft::wal::aligned::AlignedBuffer;
use spline_raft::wal::format::{
    BATCH_HEADER, BatchHeader, NUMBER_MAX, Record, SECTOR, SEGMENT_HEADER, SegmentHeader, finish_batch,
    start_batch,
};
use spline_raft::{GroupId, LogCommand};

/// Files of one image.
const SEGMENTS_MAX: usize = 6;
/// A log whose numbers are used up can take nothing more, and none gets there: this many are kept for what an input and the
/// target add to the numbers written down.
const LAST_GOOD: u64 = 1 << 10;
/// The log's random number, unless an input says otherwise.
const LOG: u64 = 7;

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A small number, or any but the last good ones.
    fn number(&mut self) -> u64 {
        let number = match self.byte() {
            255 => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
            254 => u64::MAX - u64::from(self.byte()),
            small => small.into(),
        };
        let last_good = NUMBER_MAX - LAST_GOOD..=NUMBER_MAX;
        if last_good.contains(&number) { number - 2 * LAST_GOOD } else { number }
    }

    fn some(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }
}

/// A segment that is being written.
struct Segment {
    bytes: Vec<u8>,
    log: u64,
    generation: u64,
    end: usize,
}

/// Writes the image that `input` describes.
pub fn run(input: &[u8]) -> Image {
    let mut input = Input(input);
    let mut segments: Vec<Segment> = Vec::new();
    let mut sequence = 1;
    while !input.0.is_empty() {
        let step = input.byte();
        if step % 8 == 0 || segments.is_empty() {
            if segments.len() == SEGMENTS_MAX {
                break;
            }
            segments.push(segment(&mut input, segments.len() as u64 + 1));
            continue;
        }
        let Some(segment) = segments.last_mut() else { break };
        match step % 8 {
            1..=3 => batch(&mut input, segment, &mut sequence, step % 8 == 3),
            4 => {
                // Bytes of nobody, where the next batch would be.
                let count = input.byte().into();
                let junk = input.some(count);
                put(segment, &junk);
            }
            5 => segment.end = (segment.end + SECTOR).min(segment.bytes.len()),
            6 => flip(&mut input, segment),
            _ => {
                // Cut short, at any byte.
                let keep = usize::from(input.byte()) << 8 | usize::from(input.byte());
                segment.bytes.truncate(keep);
                segment.end = segment.end.min(keep);
            }
        }
    }
    segments
        .into_iter()
        .enumerate()
        .map(|(at, segment)| (format!("segment-{at:08}.wal"), segment.bytes))
        .collect()
}

fn segment(input: &mut Input<'_>, place: u64) -> Segment {
    let kind = input.byte();
    let log = if kind & 1 == 0 { LOG } else { input.number() };
    let generation = if kind & 2 == 0 { place } else { input.number() };
    let announced = if kind & 4 == 0 { SEGMENT_BYTES } else { input.number() };
    let mut bytes = vec![0; SEGMENT_BYTES as usize];
    if kind & 8 == 0 {
        let header = SegmentHeader { log, generation, bytes: announced }.encode();
        bytes[..SEGMENT_HEADER].copy_from_slice(header.as_ref());
    }
    Segment { bytes, log, generation, end: SEGMENT_HEADER }
}

/// Writes a batch: its number follows the one before, unless the input says otherwise. `raw` puts bytes of the input where
/// the records would be, under a right checksum of the batch.
fn batch(input: &mut Input<'_>, segment: &mut Segment, sequence: &mut u64, raw: bool) {
    let kind = input.byte();
    let mut header = BatchHeader {
        length: 0,
        records: u32::from(kind >> 5),
        log: segment.log,
        generation: segment.generation,
        sequence: *sequence,
        oldest: u64::from(kind >> 3 & 3),
    };
    match kind & 7 {
        1 => header.log = input.number(),
        2 => header.generation = input.number(),
        3 => header.sequence = input.number(),
        4 => header.oldest = input.number(),
        5 => header.records = input.number() as u32,
        _ => {}
    }
    let mut buffer = AlignedBuffer::default();
    start_batch(&mut buffer);
    if raw {
        let count = input.byte().into();
        buffer.extend(&input.some(count));
    } else {
        for _ in 0..header.records.min(8) {
            record(input).encode(GroupId(u32::from(input.byte() % 3)), &mut buffer);
        }
    }
    debug_assert!(buffer.as_ref().len() >= BATCH_HEADER);
    *sequence = header.sequence.wrapping_add(1);
    finish_batch(&mut buffer, header);
    put(segment, buffer.as_ref());
}

fn record(input: &mut Input<'_>) -> Record {
    let kind = input.byte();
    let index = input.number();
    let bytes = Bytes::from(input.some(usize::from(kind >> 4)));
    match kind % 8 {
        0..=3 => {
            let command = LogCommand { meta: Bytes::from_static(b"m"), payload: bytes.clone() };
            Record::Entry(WalEntry { index, header: bytes, command })
        }
        4 => Record::Vote(bytes),
        5 => Record::Truncate(index),
        6 => Record::Purge(index, bytes),
        _ => Record::Remove,
    }
}

/// Puts bytes at the segment's end, as far as they fit; the next ones start on a sector of their own.
fn put(segment: &mut Segment, bytes: &[u8]) {
    let room = segment.bytes.len().saturating_sub(segment.end).min(bytes.len());
    segment.bytes[segment.end..][..room].copy_from_slice(&bytes[..room]);
    segment.end = (segment.end + room).next_multiple_of(SECTOR).min(segment.bytes.len());
}

fn flip(input: &mut Input<'_>, segment: &mut Segment) {
    let at = usize::from(input.byte()) << 8 | usize::from(input.byte());
    let bit = input.byte() % 8;
    if let Some(byte) = segment.bytes.get_mut(at) {
        *byte ^= 1 << bit;
    }
}
