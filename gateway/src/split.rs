//! Cuts a request's range into the parts that lie in one segment or one chunk. Pure.
//!
//! Called by `fanout`. Invariant: `split_is_a_partition` (the parts are the range: in order, no gap, no overlap).

use spline_types::geometry::{chunk_ranges, segment_of};
use spline_types::limits::SEGMENT_BYTES;
use spline_types::{BlockOp, ByteRange, ChunkIndex, ChunkOp, ChunkRange, SegmentIndex};

/// The part of a range that lies in one chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    pub(crate) segment: SegmentIndex,
    /// The chunk's place in its segment, 0 to 63.
    pub(crate) place: usize,
    pub(crate) chunk: ChunkIndex,
    /// In bytes of the chunk.
    pub(crate) range: ChunkRange,
    /// Where the part starts in the request's payload, bytes.
    pub(crate) payload_at: u64,
}

/// What is asked of each chunk; `None` if there is nothing to ask: an answered write is durable, so flush has
/// nothing to do, and there is no cache to fill.
pub(crate) const fn chunk_op(op: BlockOp) -> Option<ChunkOp> {
    match op {
        BlockOp::Read => Some(ChunkOp::Read),
        BlockOp::Write => Some(ChunkOp::Write),
        BlockOp::WriteZeroes { no_hole: true, .. } => Some(ChunkOp::WriteZeroes),
        // A chunk's discarded range reads as zeros.
        BlockOp::WriteZeroes { no_hole: false, .. } | BlockOp::Discard => Some(ChunkOp::Discard),
        BlockOp::Status => Some(ChunkOp::Status),
        BlockOp::Flush | BlockOp::Cache => None,
    }
}

/// The parts of `range` by segment, in order.
pub(crate) fn segment_ranges(range: ByteRange) -> impl Iterator<Item = (SegmentIndex, ByteRange)> {
    let mut at = range.offset();
    std::iter::from_fn(move || {
        if at >= range.end() {
            return None;
        }
        let start = at;
        at = range.end().min((start / SEGMENT_BYTES + 1) * SEGMENT_BYTES);
        // A volume's segment index fits 32 bits: the geometry was checked.
        let index = SegmentIndex::new((start / SEGMENT_BYTES) as u32);
        ByteRange::new(start, at - start).map(|part| (index, part))
    })
}

/// The parts by chunk of `within`, in order; `within` is part of the request's `range`.
pub(crate) fn parts(range: ByteRange, within: ByteRange) -> impl Iterator<Item = Part> {
    chunk_ranges(within).map(move |(chunk, part)| {
        let (segment, place) = segment_of(chunk);
        let payload_at = part.in_volume(chunk).offset() - range.offset();
        Part { segment, place: place as usize, chunk, range: part, payload_at }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn split_is_a_partition(offset in 0u64..1 << 45, length in 0u64..3 << 30) {
            let range = ByteRange::new(offset, length).expect("fits");
            let (mut segment_at, mut at) = (offset, offset);
            for (segment, within) in segment_ranges(range) {
                prop_assert_eq!(within.offset(), segment_at);
                prop_assert!(!within.is_empty());
                segment_at = within.end();
                for part in parts(range, within) {
                    let place = part.range.in_volume(part.chunk);
                    prop_assert_eq!((place.offset(), part.payload_at), (at, at - offset));
                    prop_assert!(part.range.length() > 0);
                    prop_assert_eq!(part.segment, segment);
                    prop_assert!(part.place < 64);
                    at = place.end();
                }
                prop_assert_eq!(at, segment_at);
            }
            prop_assert_eq!(at, range.end());
        }
    }
}
