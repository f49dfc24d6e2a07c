//! One split virtqueue (virtio 1.2, 2.7): chains of descriptors in, used entries out, notifications when asked for.
//!
//! Called by the worker that owns the queue. Must not know: what the buffers mean, sockets. `guest_cannot_crash_us`: every
//! word of the rings is read once into private memory, then checked, then used; a queue whose rings make no sense is broken,
//! which is an error here and the end of this queue alone. `complete_once`: a head is used once for each time it was fetched.

use super::inflight::{QueueRecord, RecordError, Recovered};
use super::memory::{GuestMemory, OutsideMemory, Ring, Segment};
use super::order::{QueueStart, Rings};
use crate::config::QUEUE_SIZE_MAX;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use thiserror::Error;

/// VIRTIO_F_RING_INDIRECT_DESC.
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_RING_EVENT_IDX.
pub const FEATURE_EVENT_INDEX: u64 = 1 << 29;
/// Descriptors of an indirect table: as many as the largest queue has.
const INDIRECT_MAX: usize = QUEUE_SIZE_MAX as usize;
/// Bytes of a descriptor (virtio 1.2, 2.7.5).
const DESCRIPTOR_BYTES: usize = 16;

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY.
const NO_NOTIFY: u16 = 1;

/// Bytes of a queue's three parts: descriptor table, available ring and used ring, the event words included.
pub const fn ring_bytes(size: u16) -> (u64, u64, u64) {
    let size = size as u64;
    (16 * size, 6 + 2 * size, 6 + 8 * size)
}

/// Why a queue is broken. Nothing of the guest's chain can be answered; the guest must reset the queue.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum QueueError {
    /// The available index ran ahead of the queue.
    #[error("available index is ahead of the queue: available={available} next={next} size={size}")]
    AvailableIndex {
        /// What the guest wrote.
        available: u16,
        /// What is fetched next.
        next: u16,
        /// The queue's size.
        size: u16,
    },
    /// A head that is no descriptor.
    #[error("available ring names a descriptor that is not there: head={head} size={size}")]
    Head {
        /// What the guest wrote.
        head: u16,
        /// The queue's size.
        size: u16,
    },
    /// A head that is not answered yet.
    #[error("available ring names a descriptor that is in use: head={0}")]
    HeadInUse(u16),
    /// A chain that goes on at a descriptor that is not there.
    #[error("chain goes on at a descriptor that is not there: next={next} size={size}")]
    Next {
        /// What the guest wrote.
        next: u16,
        /// Descriptors of the table.
        size: usize,
    },
    /// A chain that is longer than its table: it loops.
    #[error("chain has more descriptors than its table: head={0}")]
    Loop(u16),
    /// A device-readable descriptor behind a device-writable one.
    #[error("chain has a readable descriptor behind a writable one: head={0}")]
    Order(u16),
    /// An indirect table inside an indirect table, or beside other descriptors, or without the feature.
    #[error("indirect descriptor where none may be: head={0}")]
    Indirect(u16),
    /// An indirect table of a size that none has.
    #[error("indirect table has a wrong size: bytes={0}")]
    IndirectSize(u32),
    /// A buffer outside the guest's memory.
    #[error(transparent)]
    Outside(#[from] OutsideMemory),
    /// No room for the header, or none for the status byte.
    #[error(
        "chain has no room for a header and a status: head={head} readable={readable} writable={writable}"
    )]
    Framing {
        /// The chain.
        head: u16,
        /// Device-readable bytes.
        readable: u64,
        /// Device-writable bytes.
        writable: u64,
    },
    /// Memory vanished under the queue.
    #[error("guest memory was truncated by the front-end")]
    Truncated,
    /// What an earlier process left of the queue.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A descriptor that does not do what an eventfd does.
    #[error("front-end gave a descriptor that can not be used: error={0}")]
    Bell(String),
}

/// A chain of descriptors, copied out of the guest's reach. Used again for each fetch.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// Its first descriptor: what the used ring names.
    pub head: u16,
    /// What the guest gives us, in order.
    pub readable: Vec<Segment>,
    /// What the guest wants filled, in order.
    pub writable: Vec<Segment>,
    /// Bytes of `readable`.
    pub readable_bytes: u64,
    /// Bytes of `writable`.
    pub writable_bytes: u64,
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(bytes: &[u8; DESCRIPTOR_BYTES]) -> Self {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = *bytes;
        Self {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The queue.
#[derive(Debug)]
pub struct Queue {
    size: u16,
    memory: Arc<GuestMemory>,
    rings: Rings,
    event_index: bool,
    indirect: bool,
    record: Option<QueueRecord>,
    /// Heads that an earlier process fetched and did not answer, oldest last.
    orphans: Vec<u16>,
    next_available: u16,
    /// Used entries written, whether the guest sees them or not.
    used: u16,
    /// Used entries that the guest sees.
    published: u16,
    /// Heads that are fetched and not used, a bit each.
    in_use: [u64; QUEUE_SIZE_MAX as usize / 64],
    open: u16,
    /// The guest was last told to notify.
    listening: bool,
    table: Vec<u8>,
}

impl Queue {
    /// Takes over a queue. What an earlier process has left unanswered comes first, oldest first.
    ///
    /// # Errors
    /// What that process recorded makes no sense.
    pub fn start(start: &mut QueueStart) -> Result<Self, QueueError> {
        let mut queue = Self {
            size: start.size,
            memory: Arc::clone(&start.memory),
            rings: start.rings.clone(),
            event_index: start.features & FEATURE_EVENT_INDEX != 0,
            indirect: start.features & FEATURE_INDIRECT != 0,
            record: start.record.take(),
            orphans: Vec::new(),
            next_available: start.next_available,
            used: 0,
            published: 0,
            in_use: [0; QUEUE_SIZE_MAX as usize / 64],
            open: 0,
            listening: true,
            table: Vec::new(),
        };
        queue.used = queue.rings.used.load_u16(2, Ordering::Acquire);
        queue.published = queue.used;
        if let Some(record) = &mut queue.record {
            if record.recover(queue.used, &mut queue.orphans)? == Recovered::Known {
                queue.next_available = queue.used.wrapping_add(queue.orphans.len() as u16);
            }
            queue.orphans.reverse();
        }
        Ok(queue)
    }

    /// The rings lie elsewhere now, or memory has come or gone.
    pub fn remap(&mut self, memory: &Arc<GuestMemory>, rings: Rings) {
        (self.memory, self.rings) = (Arc::clone(memory), rings);
    }

    /// The guest's memory as new chains see it.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Heads that an earlier process left unanswered and that are not fetched again yet.
    pub fn orphans(&self) -> usize {
        self.orphans.len()
    }

    /// Heads that are fetched and not used.
    pub fn open(&self) -> u16 {
        self.open
    }

    /// What the guest's driver would have us fetch next (VHOST_USER_GET_VRING_BASE).
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Whether there is something to fetch.
    pub fn has_work(&self) -> bool {
        !self.orphans.is_empty() || self.available() != self.next_available
    }

    fn available(&self) -> u16 {
        // Acquire: what the guest wrote before the index is seen after it.
        self.rings.available.load_u16(2, Ordering::Acquire)
    }

    /// Fetches the next chain into `chain`; false if there is none.
    ///
    /// # Errors
    /// The queue is broken.
    pub fn fetch(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if let Some(head) = self.orphans.last().copied() {
            self.walk(head, chain)?;
            self.orphans.pop();
            self.take(head);
            return Ok(true);
        }
        let (available, next, size) = (self.available(), self.next_available, self.size);
        let waiting = available.wrapping_sub(next);
        if waiting == 0 {
            return Ok(false);
        }
        if waiting > size {
            return Err(QueueError::AvailableIndex { available, next, size });
        }
        let at = 4 + 2 * usize::from(next % size);
        let head = self.rings.available.load_u16(at, Ordering::Relaxed);
        self.walk(head, chain)?;
        if let Some(record) = &mut self.record {
            record.fetched(head);
        }
        self.next_available = next.wrapping_add(1);
        self.take(head);
        Ok(true)
    }

    fn take(&mut self, head: u16) {
        self.in_use[usize::from(head / 64)] |= 1 << (head % 64);
        self.open += 1;
    }

    /// Copies a chain out of the guest's reach.
    fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        if head >= self.size {
            return Err(QueueError::Head { head, size: self.size });
        }
        if self.in_use[usize::from(head / 64)] & 1 << (head % 64) != 0 {
            return Err(QueueError::HeadInUse(head));
        }
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        (chain.readable_bytes, chain.writable_bytes) = (0, 0);
        let mut at = head;
        for count in 0..self.size {
            let descriptor = self.descriptor(at);
            if descriptor.has(FLAG_INDIRECT) {
                // An indirect table is a chain of its own, not a part of one.
                if !self.indirect || count > 0 || descriptor.has(FLAG_NEXT) {
                    return Err(QueueError::Indirect(head));
                }
                return self.walk_indirect(&descriptor, chain);
            }
            chain.push(&self.memory, &descriptor)?;
            if !descriptor.has(FLAG_NEXT) {
                return Ok(());
            }
            at = descriptor.next;
            if at >= self.size {
                return Err(QueueError::Next { next: at, size: usize::from(self.size) });
            }
        }
        Err(QueueError::Loop(head))
    }

    fn descriptor(&self, at: u16) -> Descriptor {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        self.rings.descriptors.read(DESCRIPTOR_BYTES * usize::from(at), &mut bytes);
        Descriptor::parse(&bytes)
    }

    fn walk_indirect(&mut self, table: &Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        let bytes = table.length as usize;
        let entries = bytes / DESCRIPTOR_BYTES;
        if entries == 0 || entries > INDIRECT_MAX || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(QueueError::IndirectSize(table.length));
        }
        self.copy_table(table, chain)?;
        let mut at = 0;
        for _ in 0..entries {
            let entry = self.table.as_chunks::<DESCRIPTOR_BYTES>().0.get(at);
            let descriptor = Descriptor::parse(entry.ok_or(QueueError::Loop(chain.head))?);
            if descriptor.has(FLAG_INDIRECT) {
                return Err(QueueError::Indirect(chain.head));
            }
            chain.push(&self.memory, &descriptor)?;
            if !descriptor.has(FLAG_NEXT) {
                return Ok(());
            }
            at = usize::from(descriptor.next);
            if at >= entries {
                return Err(QueueError::Next { next: descriptor.next, size: entries });
            }
        }
        Err(QueueError::Loop(chain.head))
    }

    fn copy_table(&mut self, table: &Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        self.memory.locate(table.address, table.length, &mut chain.readable)?;
        self.table.resize(table.length as usize, 0);
        let mut rest = &mut self.table[..];
        for segment in chain.readable.drain(..) {
            let (part, behind) = rest.split_at_mut((segment.length as usize).min(rest.len()));
            self.memory.read(segment, 0, part);
            rest = behind;
        }
        Ok(())
    }

    /// Gives a chain back with `written` bytes in its writable part; the guest sees it after [`publish`](Self::publish).
    pub fn add_used(&mut self, head: u16, written: u32) {
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        debug_assert!(self.in_use[word] & bit != 0, "a head is used once");
        self.in_use[word] &= !bit;
        self.open -= 1;
        if let Some(record) = &mut self.record {
            record.batch(head);
        }
        let at = 4 + 8 * usize::from(self.used % self.size);
        self.rings.used.store_u32(at, u32::from(head), Ordering::Relaxed);
        self.rings.used.store_u32(at + 4, written, Ordering::Relaxed);
        self.log(at as u64, 8);
        self.used = self.used.wrapping_add(1);
    }

    /// A chain that nothing can answer is not waited for: its queue is broken.
    pub fn forget(&mut self, head: u16) {
        self.in_use[usize::from(head / 64)] &= !(1 << (head % 64));
        self.open -= 1;
    }

    /// Shows the guest what was used since the last time. Answers whether it wants to be notified.
    pub fn publish(&mut self) -> bool {
        if self.used == self.published {
            return false;
        }
        // Release: the entries, and the data that they tell of, are seen before the index.
        self.rings.used.store_u16(2, self.used, Ordering::Release);
        self.log(2, 2);
        if let Some(record) = &mut self.record {
            record.published(self.used);
        }
        let before = std::mem::replace(&mut self.published, self.used);
        // The guest writes its wish, then looks at the index; we wrote the index and now look at its wish.
        fence(Ordering::SeqCst);
        if !self.event_index {
            return self.rings.available.load_u16(0, Ordering::Relaxed) & NO_INTERRUPT == 0;
        }
        let wanted = self.rings.available.load_u16(4 + 2 * usize::from(self.size), Ordering::Relaxed);
        // Whether `wanted` lies in before..used (virtio 1.2, 2.7.7.2).
        self.used.wrapping_sub(wanted).wrapping_sub(1) < self.used.wrapping_sub(before)
    }

    /// Asks the guest for a notification of the next chain. Answers whether there is one already, of which none will come.
    pub fn listen(&mut self) -> bool {
        if self.event_index {
            let at = 4 + 8 * usize::from(self.size);
            self.rings.used.store_u16(at, self.next_available, Ordering::Relaxed);
            self.log(at as u64, 2);
        } else if !self.listening {
            self.rings.used.store_u16(0, 0, Ordering::Relaxed);
            self.log(0, 2);
        }
        self.listening = true;
        // The guest writes the index, then looks at our wish; we wrote the wish and now look at the index.
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Tells the guest that no notification is needed: we look at the queue anyhow.
    pub fn ignore(&mut self) {
        // With event indexes the last wish is behind the guest already.
        if self.listening && !self.event_index {
            self.rings.used.store_u16(0, NO_NOTIFY, Ordering::Relaxed);
            self.log(0, 2);
        }
        self.listening = false;
    }

    /// Marks bytes of the used ring as changed, for a migration.
    fn log(&self, at: u64, length: u64) {
        if let Some(address) = self.rings.used_log {
            self.memory.log_range(address.wrapping_add(at), length);
        }
    }
}

impl Chain {
    fn push(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), QueueError> {
        let writable = descriptor.has(FLAG_WRITE);
        if !writable && !self.writable.is_empty() {
            return Err(QueueError::Order(self.head));
        }
        if descriptor.length == 0 {
            return Ok(());
        }
        let (segments, bytes) = match writable {
            true => (&mut self.writable, &mut self.writable_bytes),
            false => (&mut self.readable, &mut self.readable_bytes),
        };
        memory.locate(descriptor.address, descriptor.length, segments)?;
        // At most 1024 descriptors of 4 GiB.
        *bytes += u64::from(descriptor.length);
        Ok(())
    }
}

/// The three parts of a queue, found in the front-end's address space.
///
/// # Errors
/// If one of them lies outside the shared memory or is misaligned (virtio 1.2, 2.7).
pub fn find_rings(
    memory: &Arc<GuestMemory>,
    size: u16,
    (descriptors, available, used): (u64, u64, u64),
    used_log: Option<u64>,
) -> Result<Rings, OutsideMemory> {
    let (descriptor_bytes, available_bytes, used_bytes) = ring_bytes(size);
    let find =
        |address, length, align| -> Result<Ring, OutsideMemory> { memory.ring(address, length, align) };
    Ok(Rings {
        descriptors: find(descriptors, descriptor_bytes, 16)?,
        available: find(available, available_bytes, 2)?,
        used: find(used, used_bytes, 4)?,
        used_log,
    })
}

#[cfg(test)]
mod tests;
