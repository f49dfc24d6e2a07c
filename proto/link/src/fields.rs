//! Fixed-place little-endian fields of a message whose length the caller has already checked.

use crate::error::LinkError;

/// Copies `N` bytes at `at`; the caller has checked that the message is that long.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

pub(crate) fn u128_at(bytes: &[u8], at: usize) -> u128 {
    u128::from_le_bytes(array(bytes, at))
}

/// Writes `field` at `at`.
pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// Refuses a reserved field that is not zero: a later version may give it a meaning.
pub(crate) fn zero(field: &'static str, value: u64) -> Result<(), LinkError> {
    if value == 0 { Ok(()) } else { Err(LinkError::Mismatch { field, value }) }
}

/// Refuses a field beyond its limit.
pub(crate) fn within(field: &'static str, value: u64, limit: u64) -> Result<(), LinkError> {
    if value <= limit { Ok(()) } else { Err(LinkError::Limit { field, value, limit }) }
}
