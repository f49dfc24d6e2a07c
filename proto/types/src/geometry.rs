//! The shape of a volume, and the one check of a request against it.

use crate::fault::{Fault, Invalid};
use crate::ids::{ChunkIndex, SegmentIndex};
use crate::limits::{CHUNK_BYTES, REQUEST_BYTES_MAX, SEGMENT_CHUNKS};
use crate::range::{ByteRange, ChunkRange};
use crate::request::BlockOp;

/// The block size that a volume announces to its guests. Requests of any alignment are served; this is what
/// clients are told to keep to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockSize {
    /// 512 bytes.
    B512,
    /// 4096 bytes.
    B4096,
}

impl BlockSize {
    /// In bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }

    /// From bytes; `None` unless 512 or 4096.
    pub const fn from_bytes(bytes: u32) -> Option<Self> {
        match bytes {
            512 => Some(Self::B512),
            4096 => Some(Self::B4096),
            _ => None,
        }
    }
}

/// Size and block size of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of the volume; a multiple of the block size.
    pub size: u64,
    /// What guests are told to align to.
    pub block_size: BlockSize,
}

impl Geometry {
    /// Checks a request's range against the volume. Alignment is not judged here: every layer serves any.
    ///
    /// # Errors
    /// `Invalid::PastEnd` if the range does not lie inside the volume, `Invalid::TooLarge` if its data exceeds
    /// [`REQUEST_BYTES_MAX`].
    pub fn check(&self, op: BlockOp, range: ByteRange) -> Result<(), Fault> {
        if range.end() > self.size {
            return Err(Fault::Invalid(Invalid::PastEnd));
        }
        if op.carries_data() && range.length() > u64::from(REQUEST_BYTES_MAX) {
            return Err(Fault::Invalid(Invalid::TooLarge));
        }
        Ok(())
    }

    /// Number of segments that the volume spans.
    pub const fn segments(&self) -> u32 {
        (self.size.div_ceil(CHUNK_BYTES as u64 * SEGMENT_CHUNKS as u64)) as u32
    }
}

/// The chunk that holds the byte at `offset` of a volume, and the byte's place in it.
pub const fn locate(offset: u64) -> (ChunkIndex, u32) {
    (ChunkIndex::new((offset / CHUNK_BYTES as u64) as u32), (offset % CHUNK_BYTES as u64) as u32)
}

/// The segment that holds a chunk, and the chunk's place in it (0 to 63).
pub const fn segment_of(chunk: ChunkIndex) -> (SegmentIndex, u32) {
    (SegmentIndex::new(chunk.get() / SEGMENT_CHUNKS), chunk.get() % SEGMENT_CHUNKS)
}

/// The parts of `range` by chunk, in order; together they are exactly `range` (`split_is_a_partition`).
pub fn chunk_ranges(range: ByteRange) -> impl Iterator<Item = (ChunkIndex, ChunkRange)> {
    let mut at = range.offset();
    std::iter::from_fn(move || {
        if at >= range.end() {
            return None;
        }
        let (index, inside) = locate(at);
        let length = (range.end() - at).min(u64::from(CHUNK_BYTES - inside)) as u32;
        at += u64::from(length);
        ChunkRange::new(inside, length).map(|part| (index, part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_past_the_end_is_refused() {
        let geometry = Geometry { size: 1 << 20, block_size: BlockSize::B512 };
        let at = |offset, length| ByteRange::new(offset, length).expect("fits");
        assert_eq!(geometry.check(BlockOp::Write, at((1 << 20) - 512, 512)), Ok(()));
        assert_eq!(geometry.check(BlockOp::Write, at(1 << 20, 1)), Err(Fault::Invalid(Invalid::PastEnd)));
        let wide = Geometry { size: 1 << 40, block_size: BlockSize::B512 };
        assert_eq!(wide.check(BlockOp::Read, at(0, (32 << 20) + 1)), Err(Fault::Invalid(Invalid::TooLarge)));
        assert_eq!(wide.check(BlockOp::Discard, at(0, 1 << 40)), Ok(()));
    }

    proptest! {
        #[test]
        fn split_is_a_partition(offset in 0u64..1 << 45, length in 0u64..200 << 20) {
            let range = ByteRange::new(offset, length).expect("fits");
            let mut at = offset;
            for (index, part) in chunk_ranges(range) {
                let piece = part.in_volume(index);
                prop_assert_eq!(piece.offset(), at);
                prop_assert!(part.length() > 0);
                at = piece.end();
            }
            prop_assert_eq!(at, range.end());
        }
    }
}
