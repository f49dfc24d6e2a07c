//! The chunk file's bytes: two header slots, a checksum table, the data.
//!
//! Called by [`super::chunk_file`] and [`super::pool`]. Pure. Must not know: when anything is written.
//!
//! ```text
//! 0        4096     8192              24576                         16 MiB + 24576
//! | slot 0 | slot 1 | checksum table | data                       |
//! ```
//! The slots are written in turn and the newest valid one wins, so a header write that is torn by a power cut loses
//! nothing. All numbers are little-endian.

use super::checksum::crc32c;
use spline_types::limits::{CHUNK_BLOCKS, CHUNK_BYTES};
use spline_types::{ChunkId, ChunkIndex, VolumeId};

/// Versions of the layout, newest first.
pub const VERSIONS: [u32; 1] = [
    1, // two header slots, crc32c per 4 KiB block
];
/// Marks a header slot.
pub const MAGIC: [u8; 8] = *b"SPLCHUNK";
/// Bytes of a header slot: the unit that filesystems and disks write at once.
pub const SLOT_BYTES: u64 = 4096;
/// Where the checksum table starts.
pub const TABLE_AT: u64 = 2 * SLOT_BYTES;
/// Bytes of the checksum table: one u32 per block.
pub const TABLE_BYTES: usize = CHUNK_BLOCKS as usize * 4;
/// Where the data starts.
pub const DATA_AT: u64 = TABLE_AT + TABLE_BYTES as u64;
/// Bytes of a chunk file.
pub const FILE_BYTES: u64 = DATA_AT + CHUNK_BYTES as u64;

const BITMAP_BYTES: usize = CHUNK_BLOCKS as usize / 8;
const CRC_AT: usize = 48 + BITMAP_BYTES;
/// Bytes of a slot that mean something; the rest is zero.
pub const HEADER_BYTES: usize = CRC_AT + 4;

/// Which blocks of a chunk are allocated, one bit each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bitmap(Box<[u64; CHUNK_BLOCKS as usize / 64]>);

impl Default for Bitmap {
    fn default() -> Self {
        Self(Box::new([0; CHUNK_BLOCKS as usize / 64]))
    }
}

impl Bitmap {
    /// A bitmap with every block allocated.
    pub fn full() -> Self {
        Self(Box::new([u64::MAX; CHUNK_BLOCKS as usize / 64]))
    }

    /// Whether `block` is allocated.
    pub fn get(&self, block: u32) -> bool {
        (self.0[block as usize / 64] >> (block % 64)) & 1 == 1
    }

    /// Marks `block` allocated or not.
    pub fn set(&mut self, block: u32, allocated: bool) {
        let bit = 1 << (block % 64);
        let word = &mut self.0[block as usize / 64];
        *word = if allocated { *word | bit } else { *word & !bit };
    }

    /// Whether no block is allocated.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The runs of equal state in `blocks`, in order: first block, one past the last, allocated.
    pub fn runs(&self, blocks: std::ops::Range<u32>) -> impl Iterator<Item = (u32, u32, bool)> + '_ {
        let mut at = blocks.start;
        std::iter::from_fn(move || {
            let start = at;
            let state = (start < blocks.end).then(|| self.get(start))?;
            while at < blocks.end && self.get(at) == state {
                at += 1;
            }
            Some((start, at, state))
        })
    }

    /// The words, for digests.
    pub fn words(&self) -> &[u64] {
        &self.0[..]
    }
}

/// What a header slot says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Whose data this is.
    pub id: ChunkId,
    /// Grows by one with every header written.
    pub generation: u64,
    /// Which blocks are allocated.
    pub bitmap: Bitmap,
}

/// What is found in a slot.
#[derive(Debug)]
pub enum Slot {
    /// Nothing was ever written here.
    Blank,
    /// A sound header.
    Valid(Header),
    /// Torn or damaged; what is wrong.
    Bad(String),
}

impl Header {
    /// The bytes of a slot.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SLOT_BYTES as usize);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSIONS[0].to_le_bytes());
        out.extend_from_slice(&self.id.index.get().to_le_bytes());
        out.extend_from_slice(&self.id.volume.get().to_le_bytes());
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.resize(48, 0);
        for word in self.bitmap.words() {
            out.extend_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.resize(SLOT_BYTES as usize, 0);
        out
    }

    /// Reads a slot of [`SLOT_BYTES`].
    pub fn decode(slot: &[u8]) -> Slot {
        let Some(bytes) = slot.get(..HEADER_BYTES) else {
            return Slot::Bad(format!("short header bytes={}", slot.len()));
        };
        if bytes.iter().all(|byte| *byte == 0) {
            return Slot::Blank;
        }
        if bytes[..8] != MAGIC {
            return Slot::Bad("no magic".into());
        }
        let version = u32::from_le_bytes(take(bytes, 8));
        if !VERSIONS.contains(&version) {
            return Slot::Bad(format!("unknown layout version={version} known={VERSIONS:?}"));
        }
        if crc32c(&bytes[..CRC_AT]) != u32::from_le_bytes(take(bytes, CRC_AT)) {
            return Slot::Bad("checksum of the header does not match".into());
        }
        let mut bitmap = Bitmap::default();
        for (i, word) in bitmap.0.iter_mut().enumerate() {
            *word = u64::from_le_bytes(take(bytes, 48 + i * 8));
        }
        let index = ChunkIndex::new(u32::from_le_bytes(take(bytes, 12)));
        let volume = VolumeId::new(u64::from_le_bytes(take(bytes, 16)));
        let generation = u64::from_le_bytes(take(bytes, 24));
        Slot::Valid(Header { id: ChunkId { volume, index }, generation, bitmap })
    }
}

/// The fixed bytes at `at`; callers have checked the length.
fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let mut bitmap = Bitmap::default();
        bitmap.set(0, true);
        bitmap.set(4095, true);
        let id = ChunkId { volume: VolumeId::new(0x0102_0304_0506_0708), index: ChunkIndex::new(9) };
        Header { id, generation: 3, bitmap }
    }

    #[test]
    fn golden_bytes_of_version_1() {
        let bytes = header().encode();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(bytes[..16], *b"SPLCHUNK\x01\0\0\0\x09\0\0\0");
        assert_eq!(bytes[16..32], [8, 7, 6, 5, 4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((bytes[48], bytes[48 + 511]), (1, 0x80));
        assert_eq!(bytes[560..564], crc32c(&bytes[..560]).to_le_bytes());
        assert_eq!((DATA_AT, FILE_BYTES), (24_576, 16_801_792));
    }

    #[test]
    fn slots_are_judged() {
        let mut bytes = header().encode();
        assert!(matches!(Header::decode(&bytes), Slot::Valid(found) if found == header()));
        assert!(matches!(Header::decode(&[0; 4096]), Slot::Blank));
        bytes[100] ^= 1;
        assert!(matches!(Header::decode(&bytes), Slot::Bad(_)));
        bytes[8] = 7;
        assert!(matches!(Header::decode(&bytes), Slot::Bad(why) if why.contains("version=7")));
        assert!(matches!(Header::decode(&bytes[..10]), Slot::Bad(_)));
    }

    #[test]
    fn runs_cover_the_range() {
        let bitmap = header().bitmap;
        assert_eq!(
            bitmap.runs(0..4096).collect::<Vec<_>>(),
            [(0, 1, true), (1, 4095, false), (4095, 4096, true)]
        );
        assert_eq!(bitmap.runs(5..5).count(), 0);
    }
}
