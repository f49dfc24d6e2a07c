//! The payload of a status reply: extents of 12 bytes each, length u64 | flags u32 (bit 0 hole, bit 1 zero).
//!
//! The list starts at the request's offset. It may cover less than was asked, but at least one extent: whoever
//! wants the rest asks again from where it ended.

use crate::error::LinkError;
use crate::fields::{u32_at, u64_at, within, zero};
use spline_types::Extent;

/// Bytes of one extent.
pub const EXTENT_BYTES: usize = 12;
/// Most extents of one reply (96 KiB): a request over a fragmented volume is answered in parts.
pub const EXTENTS_MAX: usize = 8192;

const FLAG_HOLE: u32 = 1;
const FLAG_ZERO: u32 = 2;

/// The payload; extents past [`EXTENTS_MAX`] are left out.
pub fn encode(extents: &[Extent]) -> Vec<u8> {
    let kept = &extents[..extents.len().min(EXTENTS_MAX)];
    let mut bytes = Vec::with_capacity(kept.len() * EXTENT_BYTES);
    for extent in kept {
        let hole = if extent.hole { FLAG_HOLE } else { 0 };
        let zero = if extent.zero { FLAG_ZERO } else { 0 };
        bytes.extend_from_slice(&extent.length.to_le_bytes());
        bytes.extend_from_slice(&(hole | zero).to_le_bytes());
    }
    bytes
}

/// Reads a payload for a request of `asked` bytes.
///
/// # Errors
/// `Mismatch` if it is not whole extents, empty, has an empty extent or covers more than `asked`; `Limit` if there
/// are too many.
pub fn decode(bytes: &[u8], asked: u64) -> Result<Vec<Extent>, LinkError> {
    let count = bytes.len() / EXTENT_BYTES;
    if count == 0 || !bytes.len().is_multiple_of(EXTENT_BYTES) {
        return Err(LinkError::Mismatch { field: "extents", value: bytes.len() as u64 });
    }
    within("extents", count as u64, EXTENTS_MAX as u64)?;
    let mut covered = 0u64;
    let mut extents = Vec::with_capacity(count);
    for entry in bytes.chunks_exact(EXTENT_BYTES) {
        let (length, flags) = (u64_at(entry, 0), u32_at(entry, 8));
        zero("extent_flags", u64::from(flags & !(FLAG_HOLE | FLAG_ZERO)))?;
        covered = covered.saturating_add(length);
        if length == 0 || covered > asked {
            return Err(LinkError::Mismatch { field: "extent_length", value: length });
        }
        extents.push(Extent { length, hole: flags & FLAG_HOLE != 0, zero: flags & FLAG_ZERO != 0 });
    }
    Ok(extents)
}
