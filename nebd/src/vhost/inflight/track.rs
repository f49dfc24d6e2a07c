//! The order of steps by which a queue's record stays true whenever the process dies (vhost-user specification, "Inflight I/O
//! tracking").
//!
//! Called by `queue` through [`QueueRecord`](super::QueueRecord). A pure core over [`Cells`]: each store is seen by whoever comes
//! next only after all stores before it. Must not know: where the cells lie.

use super::{ENTRY_BYTES, HEAD_BYTES, VERSION};
use thiserror::Error;

const FEATURES: u64 = 0;
const VERSION_AT: u64 = 8;
const DESCRIPTORS: u64 = 10;
const LAST_BATCH_HEAD: u64 = 12;
const USED_INDEX: u64 = 14;

const INFLIGHT: u64 = 0;
const NEXT: u64 = 6;
const COUNTER: u64 = 8;

/// Memory that outlives the process. Stores are release, loads are acquire.
pub trait Cells {
    /// One byte.
    fn load_u8(&self, at: u64) -> u8;
    /// Two bytes.
    fn load_u16(&self, at: u64) -> u16;
    /// Eight bytes.
    fn load_u64(&self, at: u64) -> u64;
    /// One byte.
    fn store_u8(&mut self, at: u64, value: u8);
    /// Two bytes.
    fn store_u16(&mut self, at: u64, value: u16);
    /// Eight bytes.
    fn store_u64(&mut self, at: u64, value: u64);
    /// Whether what is loaded may not be what was stored.
    fn is_damaged(&self) -> bool;
}

/// Why a queue can not go on from its record.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum RecordError {
    /// Another version, or with features: written by something newer.
    #[error("unknown version of an inflight record: version={version} features={features:#x}")]
    Version {
        /// The version.
        version: u16,
        /// The features.
        features: u64,
    },
    /// It does not make sense.
    #[error("inflight record contradicts itself: {what}={value} size={size}")]
    Contradiction {
        /// What is wrong.
        what: &'static str,
        /// What it says.
        value: u16,
        /// Descriptors that it has entries for.
        size: u16,
    },
    /// The region's file was truncated.
    #[error("inflight region has vanished")]
    Damaged,
}

/// What a record said when its queue started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Recovered {
    /// Nobody has used it: where the queue goes on is what the front-end says.
    Fresh,
    /// The queue goes on at the used index and the number of unanswered heads, whatever the front-end says.
    Known,
}

/// Keeps the record of one queue.
#[derive(Debug)]
pub struct Track<C> {
    cells: C,
    /// Descriptors that it has entries for.
    size: u16,
    counter: u64,
    last_batch_head: u16,
    /// Heads of the batch that is not published yet.
    batch: Vec<u16>,
}

const fn entry(head: u16, field: u64) -> u64 {
    HEAD_BYTES + ENTRY_BYTES * head as u64 + field
}

impl<C: Cells> Track<C> {
    /// Over a queue's part with `size` entries. Call [`recover`](Self::recover) before anything else.
    pub fn new(cells: C, size: u16) -> Self {
        Self { cells, size, counter: 0, last_batch_head: 0, batch: Vec::with_capacity(size.into()) }
    }

    /// To be called when the queue starts; `used_index` is what its used ring says. Finishes a batch that the last process could
    /// not, and puts the heads that were fetched and not answered into `out`, oldest first.
    ///
    /// # Errors
    /// If it does not make sense.
    pub fn recover(&mut self, used_index: u16, out: &mut Vec<u16>) -> Result<Recovered, RecordError> {
        out.clear();
        self.batch.clear();
        let features = self.cells.load_u64(FEATURES);
        let recovered = match self.cells.load_u16(VERSION_AT) {
            0 if features == 0 => {
                self.begin(used_index);
                Recovered::Fresh
            }
            VERSION if features == 0 => {
                self.finish_batch(used_index)?;
                Recovered::Known
            }
            version => return Err(RecordError::Version { version, features }),
        };
        let mut open: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.cells.load_u8(entry(*head, INFLIGHT)) != 0)
            .map(|head| (self.cells.load_u64(entry(head, COUNTER)), head))
            .collect();
        if self.cells.is_damaged() {
            return Err(RecordError::Damaged);
        }
        open.sort_unstable();
        self.counter = open.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        out.extend(open.iter().map(|(_, head)| head));
        Ok(recovered)
    }

    fn begin(&mut self, used_index: u16) {
        for head in 0..self.size {
            self.cells.store_u8(entry(head, INFLIGHT), 0);
        }
        self.last_batch_head = 0;
        self.cells.store_u16(LAST_BATCH_HEAD, 0);
        self.cells.store_u16(DESCRIPTORS, self.size);
        self.cells.store_u16(USED_INDEX, used_index);
        // Last: whoever finds it finds the rest.
        self.cells.store_u16(VERSION_AT, VERSION);
    }

    /// If the used ring is ahead of the record, its last batch was published and only the record of that is missing.
    fn finish_batch(&mut self, used_index: u16) -> Result<(), RecordError> {
        let size = self.size;
        let check = |what, value, fits: bool| {
            if fits { Ok(()) } else { Err(RecordError::Contradiction { what, value, size }) }
        };
        let descriptors = self.cells.load_u16(DESCRIPTORS);
        check("descriptors", descriptors, descriptors == size)?;
        let missing = used_index.wrapping_sub(self.cells.load_u16(USED_INDEX));
        check("batch", missing, missing <= size)?;
        self.last_batch_head = self.cells.load_u16(LAST_BATCH_HEAD);
        check("last_batch_head", self.last_batch_head, self.last_batch_head < size)?;
        let mut head = self.last_batch_head;
        for _ in 0..missing {
            check("next", head, head < size)?;
            self.cells.store_u8(entry(head, INFLIGHT), 0);
            head = self.cells.load_u16(entry(head, NEXT));
        }
        self.cells.store_u16(USED_INDEX, used_index);
        Ok(())
    }

    /// A head was fetched from the available ring. It must not be open already.
    pub fn fetched(&mut self, head: u16) {
        if head < self.size {
            self.cells.store_u64(entry(head, COUNTER), self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.cells.store_u8(entry(head, INFLIGHT), 1);
        }
    }

    /// A head is about to be published with the batch. To be called before the used index covers it.
    pub fn batch(&mut self, head: u16) {
        if head < self.size {
            self.cells.store_u16(entry(head, NEXT), self.last_batch_head);
            self.cells.store_u16(LAST_BATCH_HEAD, head);
            self.last_batch_head = head;
            self.batch.push(head);
        }
    }

    /// The used ring says `used_index` now, which covers the batch.
    pub fn published(&mut self, used_index: u16) {
        for head in self.batch.drain(..) {
            self.cells.store_u8(entry(head, INFLIGHT), 0);
        }
        self.cells.store_u16(USED_INDEX, used_index);
    }

    /// Descriptors that it has entries for.
    pub fn size(&self) -> u16 {
        self.size
    }
}
