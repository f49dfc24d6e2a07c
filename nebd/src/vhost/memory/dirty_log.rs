//! The dirty log: which pages of the guest were written, for a migration that copies its memory meanwhile (vhost-user
//! specification, "Migration").
//!
//! Made by `device`, marked through `GuestMemory`. Must not know: who writes, and why.

use super::mapping::{MapError, Mapping};
use std::os::fd::BorrowedFd;

/// VHOST_LOG_PAGE: bytes that one bit stands for.
pub const LOG_PAGE_BYTES: u64 = 4096;
/// Guest bytes that one byte of the log stands for.
const BYTES_PER_BYTE: u64 = 8 * LOG_PAGE_BYTES;

/// A bit for each page, shared with the front-end, from guest address 0 on.
#[derive(Debug)]
pub struct DirtyLog {
    bits: Mapping,
}

impl DirtyLog {
    /// Maps the log: `length` bytes from `offset` of what the front-end sent.
    ///
    /// # Errors
    /// Those of [`Mapping::shared`].
    pub fn map(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Self, MapError> {
        Ok(Self { bits: Mapping::shared(fd, offset, length)? })
    }

    /// Whether every page below `guest_address` has a bit.
    pub fn covers(&self, guest_address: u64) -> bool {
        guest_address.div_ceil(BYTES_PER_BYTE) <= self.bits.length()
    }

    /// Marks the pages of a range. Those without a bit are left out.
    pub fn mark(&self, guest_address: u64, length: u64) {
        if length == 0 {
            return;
        }
        let last_bit = (self.bits.length() * 8).saturating_sub(1);
        let first = guest_address / LOG_PAGE_BYTES;
        let last = (guest_address.saturating_add(length - 1) / LOG_PAGE_BYTES).min(last_bit);
        let mut page = first;
        while page <= last {
            let until = last.min(page | 7);
            // Bits from `page` to `until`, both within one byte.
            let bits = (0xff_u8 << (page % 8)) & (0xff_u8 >> (7 - until % 8));
            self.bits.set_bits(page / 8, bits);
            page = until + 1;
        }
    }
}
