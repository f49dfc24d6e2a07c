//! Ranges: where in a volume or a chunk something lies. Never empty of meaning: a range always fits its space
//! because the constructors refuse overflow.

use crate::ids::ChunkIndex;
use crate::limits::CHUNK_BYTES;

/// A range of a volume, in bytes. `offset + length` never overflows. May be empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct ByteRange {
    offset: u64,
    length: u64,
}

impl ByteRange {
    /// No bytes: the range of requests that have none, such as a flush.
    pub const EMPTY: Self = Self { offset: 0, length: 0 };

    /// A range, or `None` if its end would overflow 64 bits.
    pub const fn new(offset: u64, length: u64) -> Option<Self> {
        match offset.checked_add(length) {
            Some(_) => Some(Self { offset, length }),
            None => None,
        }
    }

    /// First byte.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Number of bytes.
    pub const fn length(self) -> u64 {
        self.length
    }

    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.offset + self.length
    }

    /// Whether the range has no bytes.
    pub const fn is_empty(self) -> bool {
        self.length == 0
    }

    /// Whether two ranges share a byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

/// A range of one chunk, in bytes from the chunk's start. Lies inside the chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct ChunkRange {
    offset: u32,
    length: u32,
}

impl ChunkRange {
    /// A range, or `None` if it does not lie inside a chunk.
    pub const fn new(offset: u32, length: u32) -> Option<Self> {
        match offset.checked_add(length) {
            Some(end) if end <= CHUNK_BYTES => Some(Self { offset, length }),
            _ => None,
        }
    }

    /// The whole chunk.
    pub const fn whole() -> Self {
        Self { offset: 0, length: CHUNK_BYTES }
    }

    /// First byte, from the chunk's start.
    pub const fn offset(self) -> u32 {
        self.offset
    }

    /// Number of bytes.
    pub const fn length(self) -> u32 {
        self.length
    }

    /// One past the last byte.
    pub const fn end(self) -> u32 {
        self.offset + self.length
    }

    /// Where this range of chunk `index` lies in its volume.
    pub const fn in_volume(self, index: ChunkIndex) -> ByteRange {
        ByteRange {
            offset: index.get() as u64 * CHUNK_BYTES as u64 + self.offset as u64,
            length: self.length as u64,
        }
    }
}

/// A run of bytes of one allocation state, as a status request answers it. Consecutive extents follow each other
/// without gaps from the start of the asked range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Bytes of the run.
    pub length: u64,
    /// No space is allocated for it.
    pub hole: bool,
    /// It reads as zeros.
    pub zero: bool,
}

impl Extent {
    /// Appends `extent` to a list, merged with the last one if both are alike.
    pub fn push_merged(list: &mut Vec<Extent>, extent: Extent) {
        match list.last_mut() {
            Some(last) if last.hole == extent.hole && last.zero == extent.zero => {
                last.length += extent.length
            }
            _ if extent.length == 0 => {}
            _ => list.push(extent),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_refuse_overflow() {
        assert!(ByteRange::new(u64::MAX, 1).is_none());
        assert!(ByteRange::new(u64::MAX, 0).is_some());
        assert!(ChunkRange::new(CHUNK_BYTES - 1, 2).is_none());
        assert!(ChunkRange::new(u32::MAX, 1).is_none());
        assert_eq!(ChunkRange::new(CHUNK_BYTES, 0).map(ChunkRange::end), Some(CHUNK_BYTES));
    }

    #[test]
    fn extents_merge_only_when_alike() {
        let mut list = Vec::new();
        Extent::push_merged(&mut list, Extent { length: 4, hole: true, zero: true });
        Extent::push_merged(&mut list, Extent { length: 6, hole: true, zero: true });
        Extent::push_merged(&mut list, Extent { length: 1, hole: false, zero: true });
        assert_eq!(list.iter().map(|e| e.length).collect::<Vec<_>>(), [10, 1]);
    }
}
