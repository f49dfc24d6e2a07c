//! What is unanswered, kept in memory that outlives this process (vhost-user specification, "Inflight I/O tracking", split
//! virtqueues): the front-end holds the region while nebd is gone and hands it to the next one.
//!
//! Made by `device`, kept up to date by `queue`. [`track`] knows the order of the steps. Must not know: what the descriptors
//! mean. `complete_once`: after a crash exactly the heads that were fetched and not answered come back.
//!
//! Layout, in the machine's byte order; a queue's part starts at a multiple of 64 bytes: features u64 | version u16 |
//! descriptors u16 | last_batch_head u16 | used_index u16, then for each descriptor inflight u8 | reserved 5 | next u16 |
//! counter u64.

pub mod track;

pub use track::{RecordError, Recovered, Track};

use super::memory::{MapError, Mapping};
use crate::config::{QUEUE_SIZE_MAX, QUEUES_MAX};
use rustix::fs::{MemfdFlags, SealFlags};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use thiserror::Error;
use track::Cells;

/// Where the parts of queues start, a multiple of: as libvhost-user has it.
const ALIGN: u64 = 64;
/// Bytes before the first descriptor of a queue's part.
const HEAD_BYTES: u64 = 16;
/// Bytes of a descriptor's entry.
const ENTRY_BYTES: u64 = 16;

/// Version of a queue's part; newest first. 0 is a part that nobody has used yet.
///
/// 1: as described above.
const VERSION: u16 = 1;

/// Why a region is not taken.
#[derive(Debug, Error)]
pub enum InflightError {
    /// Numbers that no export has.
    #[error("impossible shape: queues={queues} queue_size={queue_size}")]
    Shape {
        /// Queues.
        queues: u16,
        /// Descriptors of each.
        queue_size: u16,
    },
    /// Too small for what it is to hold.
    #[error("region is too small: bytes={bytes} needed={needed}")]
    Small {
        /// What it has.
        bytes: u64,
        /// What its queues need.
        needed: u64,
    },
    /// It can not be mapped.
    #[error("region: {0}")]
    Map(#[from] MapError),
}

/// A region, mapped.
#[derive(Debug)]
pub struct InflightRegion {
    mapping: Mapping,
    queues: u16,
    queue_size: u16,
}

/// Bytes of one queue's part.
const fn part_bytes(queue_size: u16) -> u64 {
    (HEAD_BYTES + ENTRY_BYTES * queue_size as u64).next_multiple_of(ALIGN)
}

fn needed(queues: u16, queue_size: u16) -> Result<u64, InflightError> {
    let possible = queue_size.is_power_of_two() && queue_size <= QUEUE_SIZE_MAX;
    if !(1..=QUEUES_MAX).contains(&queues) || !possible {
        return Err(InflightError::Shape { queues, queue_size });
    }
    Ok(part_bytes(queue_size) * u64::from(queues))
}

impl InflightRegion {
    /// Makes the file of a new region, all zeros, that can neither shrink nor grow (VHOST_USER_GET_INFLIGHT_FD). Answers it
    /// and its bytes.
    ///
    /// # Errors
    /// If the numbers are impossible or the kernel has no memory left.
    pub fn create(queues: u16, queue_size: u16) -> Result<(OwnedFd, u64), InflightError> {
        let bytes = needed(queues, queue_size)?;
        let make = || {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let fd = rustix::fs::memfd_create("spline-inflight", flags)?;
            rustix::fs::ftruncate(&fd, bytes)?;
            rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(fd)
        };
        let fd = make().map_err(|error: rustix::io::Errno| MapError::Io(io::Error::from(error)))?;
        Ok((fd, bytes))
    }

    /// Maps `bytes` from `offset` of a region's file (VHOST_USER_SET_INFLIGHT_FD). What it says is judged when a queue starts.
    ///
    /// # Errors
    /// If the numbers are impossible, the region is too small, or it can not be mapped.
    pub fn adopt(
        fd: BorrowedFd<'_>,
        (offset, bytes): (u64, u64),
        queues: u16,
        queue_size: u16,
    ) -> Result<Self, InflightError> {
        let needed = needed(queues, queue_size)?;
        if bytes < needed {
            return Err(InflightError::Small { bytes, needed });
        }
        // Integers in it are aligned only if it starts so.
        if !offset.is_multiple_of(ALIGN) {
            return Err(MapError::Wraps { offset, length: bytes }.into());
        }
        Ok(Self { mapping: Mapping::shared(fd, offset, needed)?, queues, queue_size })
    }

    /// Queues that it has parts for.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Descriptors that each part has entries for.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// The record of queue `index`, which has `size` descriptors; `None` if the region has no such part, or a smaller one.
    pub fn queue(self: &Arc<Self>, index: u16, size: u16) -> Option<QueueRecord> {
        let fits = index < self.queues && size <= self.queue_size;
        let start = part_bytes(self.queue_size) * u64::from(index);
        fits.then(|| Track::new(Part { region: Arc::clone(self), start }, self.queue_size))
    }
}

/// One queue's part of a region.
#[derive(Debug)]
pub struct Part {
    region: Arc<InflightRegion>,
    start: u64,
}

/// Keeps the record of one queue.
pub type QueueRecord = Track<Part>;

impl Cells for Part {
    fn load_u8(&self, at: u64) -> u8 {
        self.region.mapping.load_u8(self.start + at, Ordering::Acquire)
    }

    fn load_u16(&self, at: u64) -> u16 {
        self.region.mapping.load_u16(self.start + at, Ordering::Acquire)
    }

    fn load_u64(&self, at: u64) -> u64 {
        self.region.mapping.load_u64(self.start + at, Ordering::Acquire)
    }

    fn store_u8(&mut self, at: u64, value: u8) {
        self.region.mapping.store_u8(self.start + at, value, Ordering::Release);
    }

    fn store_u16(&mut self, at: u64, value: u16) {
        self.region.mapping.store_u16(self.start + at, value, Ordering::Release);
    }

    fn store_u64(&mut self, at: u64, value: u64) {
        self.region.mapping.store_u64(self.start + at, value, Ordering::Release);
    }

    fn is_damaged(&self) -> bool {
        self.region.mapping.is_damaged()
    }
}

#[cfg(test)]
mod tests;
