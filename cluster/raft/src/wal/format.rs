//! What lies on the disk: segment header, batch header, record header. All integers are little-endian.
//!
//! A segment file is a 4096-byte header area and then batches, each starting on a 512-byte sector. A batch is its header,
//! its records back to back, and zeros up to the sector. Called by the committer (encoding), recovery and reads
//! (decoding). Knows no file and no group state.
//!
//! `acked_is_durable`: every batch names the log, the generation of its segment and its own sequence number, which grows
//! by one from batch to batch across segments. So bytes of a segment's earlier use can never pass for new ones, and a
//! missing batch shows as a gap. The log's random number keeps payload written by guests from passing for a batch.

use bytes::Bytes;

use super::aligned::AlignedBuffer;
use super::config::WalEntry;
use crate::command::{GroupId, LogCommand};

/// Unit of writing, in bytes: no two batches share a sector, so a torn write never harms an acknowledged batch.
pub const SECTOR: usize = 512;
/// Bytes before the first batch of a segment.
pub const SEGMENT_HEADER: usize = 4096;
/// Bytes of the segment header area that carry meaning in every version of the format.
const SEGMENT_HEADER_USED: usize = 64;
/// Bytes of a batch header.
pub const BATCH_HEADER: usize = 48;
/// Bytes of a record header.
pub const RECORD_HEADER: usize = 32;

const SEGMENT_MAGIC: [u8; 8] = *b"SPLNWAL\n";
const BATCH_MAGIC: [u8; 4] = *b"SPWB";

/// No index, generation or sequence number comes near this; a larger one is damage under a checksum that happens to be right.
/// So sums of what was decoded never overflow.
pub const NUMBER_MAX: u64 = 1 << 62;

/// Versions of the segment format, newest first. The first 64 bytes of the header keep their layout in every version.
pub const VERSIONS: [u32; 1] = [
    1, // segment header 64 of 4096 bytes, batch header 48 bytes, record header 32 bytes, crc32c
];

fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(bytes, at))
}

/// First 64 bytes of a segment: magic 0..8, version 8..12, zero 12..16, log 16..24, generation 24..32, bytes 32..40, zero
/// 40..60, crc32c of 0..60 at 60..64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Random number of the log, the same in all its segments.
    pub log: u64,
    /// Number of this use of the file: unique in the log and growing.
    pub generation: u64,
    /// Size of the file in bytes.
    pub bytes: u64,
}

/// Why a segment header was not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// Magic or crc do not fit: never written, torn, or damaged.
    Bad,
    /// Intact, but of this unknown version.
    Version(u32),
}

impl SegmentHeader {
    /// The whole header area of a segment.
    pub fn encode(&self) -> AlignedBuffer {
        let mut area = AlignedBuffer::zeroed(SEGMENT_HEADER);
        let bytes = area.as_mut();
        bytes[0..8].copy_from_slice(&SEGMENT_MAGIC);
        bytes[8..12].copy_from_slice(&VERSIONS[0].to_le_bytes());
        bytes[16..24].copy_from_slice(&self.log.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.generation.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.bytes.to_le_bytes());
        let crc = crc32c(&bytes[..SEGMENT_HEADER_USED - 4]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        area
    }

    /// Reads a header from the first bytes of a segment.
    pub fn decode(bytes: &[u8]) -> Result<SegmentHeader, HeaderError> {
        if bytes.len() < SEGMENT_HEADER_USED
            || bytes[0..8] != SEGMENT_MAGIC
            || u32_at(bytes, 60) != crc32c(&bytes[..60])
        {
            return Err(HeaderError::Bad);
        }
        match u32_at(bytes, 8) {
            version if !VERSIONS.contains(&version) => Err(HeaderError::Version(version)),
            _ if u64_at(bytes, 24) > NUMBER_MAX => Err(HeaderError::Bad),
            _ => Ok(SegmentHeader {
                log: u64_at(bytes, 16),
                generation: u64_at(bytes, 24),
                bytes: u64_at(bytes, 32),
            }),
        }
    }
}

/// First 48 bytes of a batch: magic 0..4, crc32c of 8..length at 4..8, length 8..12, records 12..16, log 16..24, generation
/// 24..32, sequence 32..40, oldest 40..48.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Bytes of the batch with header and padding, a multiple of the sector.
    pub length: u32,
    /// Number of records.
    pub records: u32,
    /// Random number of the log.
    pub log: u64,
    /// Generation of the segment it was written to.
    pub generation: u64,
    /// One more than the batch before.
    pub sequence: u64,
    /// Generation of the oldest segment needed when it was written; older ones may have been recycled since.
    pub oldest: u64,
}

impl BatchHeader {
    /// The batch at the start of `bytes`, if it is one, whole and intact. `bytes` may go on past its end.
    pub fn decode(bytes: &[u8]) -> Option<BatchHeader> {
        if bytes.len() < SECTOR || bytes[0..4] != BATCH_MAGIC {
            return None;
        }
        let header = BatchHeader {
            length: u32_at(bytes, 8),
            records: u32_at(bytes, 12),
            log: u64_at(bytes, 16),
            generation: u64_at(bytes, 24),
            sequence: u64_at(bytes, 32),
            oldest: u64_at(bytes, 40),
        };
        let numbers = [header.generation, header.sequence, header.oldest];
        if numbers.iter().any(|number| *number > NUMBER_MAX) {
            return None;
        }
        let length = header.length as usize;
        let whole = length >= SECTOR && length.is_multiple_of(SECTOR) && length <= bytes.len();
        (whole && u32_at(bytes, 4) == crc32c(&bytes[8..length])).then_some(header)
    }
}

/// Starts a batch in an empty buffer: records follow, then [`finish_batch`].
pub fn start_batch(buffer: &mut AlignedBuffer) {
    buffer.clear();
    buffer.resize(BATCH_HEADER);
}

/// Pads the batch to the sector and fills in its header; the header's length is taken from the buffer.
pub fn finish_batch(buffer: &mut AlignedBuffer, header: BatchHeader) {
    let length = buffer.as_ref().len().next_multiple_of(SECTOR);
    buffer.resize(length);
    let bytes = buffer.as_mut();
    bytes[0..4].copy_from_slice(&BATCH_MAGIC);
    // A batch is no longer than a segment, whose size the configuration bounds to u32.
    bytes[8..12].copy_from_slice(&(length as u32).to_le_bytes());
    bytes[12..16].copy_from_slice(&header.records.to_le_bytes());
    bytes[16..24].copy_from_slice(&header.log.to_le_bytes());
    bytes[24..32].copy_from_slice(&header.generation.to_le_bytes());
    bytes[32..40].copy_from_slice(&header.sequence.to_le_bytes());
    bytes[40..48].copy_from_slice(&header.oldest.to_le_bytes());
    let crc = crc32c(&bytes[8..]);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// What a record says of its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Kind 1: an entry.
    Entry(WalEntry),
    /// Kind 2: a vote.
    Vote(Bytes),
    /// Kind 3: every entry from this index on is void.
    Truncate(u64),
    /// Kind 4: entries up to and including the index are no longer needed, and the state saved with that.
    Purge(u64, Bytes),
    /// Kind 5: the group is gone.
    Remove,
}

impl Record {
    /// Bytes in a batch.
    pub fn encoded_length(&self) -> usize {
        let (_, _, parts) = self.parts();
        RECORD_HEADER + parts.iter().map(|part| part.len()).sum::<usize>()
    }

    /// Kind, index, and the three byte strings (header, meta, payload).
    fn parts(&self) -> (u8, u64, [&[u8]; 3]) {
        match self {
            Record::Entry(e) => (1, e.index, [&e.header, &e.command.meta, &e.command.payload]),
            Record::Vote(vote) => (2, 0, [vote, &[], &[]]),
            Record::Truncate(first) => (3, *first, [&[], &[], &[]]),
            Record::Purge(upto, state) => (4, *upto, [state, &[], &[]]),
            Record::Remove => (5, 0, [&[], &[], &[]]),
        }
    }

    /// Appends the record: crc32c of 4..end at 0..4, kind 4, zero 5..8, group 8..12, header length 12..16, index 16..24,
    /// meta length 24..28, payload length 28..32, then header, meta, payload. Lengths must fit a segment.
    pub fn encode(&self, group: GroupId, buffer: &mut AlignedBuffer) {
        let (kind, index, [header, meta, payload]) = self.parts();
        let start = buffer.as_ref().len();
        let mut fixed = [0; RECORD_HEADER];
        fixed[4] = kind;
        fixed[8..12].copy_from_slice(&group.0.to_le_bytes());
        fixed[12..16].copy_from_slice(&(header.len() as u32).to_le_bytes());
        fixed[16..24].copy_from_slice(&index.to_le_bytes());
        fixed[24..28].copy_from_slice(&(meta.len() as u32).to_le_bytes());
        fixed[28..32].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        for part in [&fixed, header, meta, payload] {
            buffer.extend(part);
        }
        let bytes = &mut buffer.as_mut()[start..];
        let crc = crc32c(&bytes[4..]);
        bytes[0..4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Bytes of an entry in a batch.
pub fn entry_length(entry: &WalEntry) -> usize {
    RECORD_HEADER + entry.header.len() + entry.command.bytes()
}

/// A record found in a batch; `bytes` are the whole record.
#[derive(Clone, Copy)]
pub struct RawRecord<'a> {
    /// Whose it is.
    pub group: GroupId,
    kind: u8,
    index: u64,
    lengths: [usize; 3],
    bytes: &'a [u8],
}

impl<'a> RawRecord<'a> {
    /// The intact record at the start of `bytes`, which may go on past its end.
    pub fn decode(bytes: &'a [u8]) -> Option<RawRecord<'a>> {
        if bytes.len() < RECORD_HEADER {
            return None;
        }
        let lengths = [u32_at(bytes, 12), u32_at(bytes, 24), u32_at(bytes, 28)].map(|length| length as usize);
        let length = RECORD_HEADER + lengths.iter().sum::<usize>();
        let index = u64_at(bytes, 16);
        if length > bytes.len() || index > NUMBER_MAX || u32_at(bytes, 0) != crc32c(&bytes[4..length]) {
            return None;
        }
        Some(RawRecord {
            group: GroupId(u32_at(bytes, 8)),
            kind: bytes[4],
            index,
            lengths,
            bytes: &bytes[..length],
        })
    }

    /// Bytes of the record.
    pub fn length(&self) -> usize {
        self.bytes.len()
    }

    /// Index of the entry, if it is one: spares recovery the copy of its payload.
    pub fn entry_index(&self) -> Option<u64> {
        (self.kind == 1).then_some(self.index)
    }

    /// The record with its content copied out; `None` for an unknown kind.
    pub fn to_record(self) -> Option<Record> {
        let body = Bytes::copy_from_slice(&self.bytes[RECORD_HEADER..]);
        let [header, meta, _] = self.lengths;
        match self.kind {
            1 => Some(Record::Entry(WalEntry {
                index: self.index,
                header: body.slice(..header),
                command: LogCommand {
                    meta: body.slice(header..header + meta),
                    payload: body.slice(header + meta..),
                },
            })),
            2 => Some(Record::Vote(body)),
            3 => Some(Record::Truncate(self.index)),
            4 => Some(Record::Purge(self.index, body)),
            5 => Some(Record::Remove),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
