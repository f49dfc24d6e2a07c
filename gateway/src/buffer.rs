//! Payload buffers: page-aligned, so that a disk can be read and written without a copy, and reused, so that the IO
//! path does not fault fresh pages in.
//!
//! Called by the link's intake and the file engine. Invariant: `bounded` (what lies idle in the pool is limited; what
//! is in use is limited by admission).
#![allow(unsafe_code)]

use bytes::Bytes;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Alignment of every buffer, bytes: a page, which satisfies every disk's rule for direct IO.
pub(crate) const ALIGNMENT: usize = 4096;
/// Capacities that are kept for reuse: 4 KiB, 8 KiB, … 4 MiB. Larger buffers are rare and go back to the system.
const CLASSES: usize = 11;
/// Idle bytes kept per capacity: two full volumes' worth of small requests, few enough to forget about.
const IDLE_BYTES_PER_CLASS: usize = 8 << 20;

/// Where buffers come from and return to. Clones share one pool.
#[derive(Clone)]
pub(crate) struct BufferPool(Arc<[Mutex<Vec<Block>>; CLASSES]>);

/// A buffer of `len` bytes. Its bytes are initialised but arbitrary until they are written.
pub(crate) struct Buffer {
    /// Present until drop.
    block: Option<Block>,
    len: usize,
    pool: BufferPool,
}

/// One allocation, initialised when it was made.
struct Block {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a block owns its allocation alone, like a Box<[u8]>.
unsafe impl Send for Block {}
// SAFETY: shared access only reads bytes.
unsafe impl Sync for Block {}

impl Block {
    fn new(capacity: usize) -> Self {
        let layout =
            Layout::from_size_align(capacity, ALIGNMENT).expect("capacities are far below isize::MAX");
        // SAFETY: the capacity is never 0: `BufferPool::take` rounds up to a page at least.
        let start = unsafe { alloc_zeroed(layout) };
        Self { start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)), layout }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed only here.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl BufferPool {
    pub(crate) fn new() -> Self {
        Self(Arc::new(std::array::from_fn(|_| Mutex::default())))
    }

    /// A buffer of `len` bytes.
    pub(crate) fn take(&self, len: usize) -> Buffer {
        let (class, capacity) = class_of(len);
        let idle = self.0.get(class).and_then(|c| c.lock().unwrap_or_else(PoisonError::into_inner).pop());
        Buffer { block: Some(idle.unwrap_or_else(|| Block::new(capacity))), len, pool: self.clone() }
    }

    fn put_back(&self, block: Block) {
        let (class, capacity) = class_of(block.layout.size());
        let Some(idle) = self.0.get(class) else { return };
        let mut idle = idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_BYTES_PER_CLASS / capacity {
            idle.push(block);
        }
    }
}

/// Class and capacity for `len` bytes; a class of [`CLASSES`] or more is not kept.
fn class_of(len: usize) -> (usize, usize) {
    let capacity = len.max(ALIGNMENT).next_power_of_two();
    let class = (capacity / ALIGNMENT).trailing_zeros() as usize;
    if class < CLASSES { (class, capacity) } else { (class, len.next_multiple_of(ALIGNMENT)) }
}

impl Buffer {
    fn start(&self) -> *mut u8 {
        self.block.as_ref().expect("a buffer has its block until it is dropped").start.as_ptr()
    }

    /// Its bytes.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the block holds at least `len` initialised bytes, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }

    /// Its bytes, from now on shared and unchanging; they return to the pool when the last reader is gone.
    pub(crate) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the block holds at least `len` initialised bytes, and `&self` keeps writers away.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.put_back(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let pool = BufferPool::new();
        let mut first = pool.take(5000);
        first.as_mut_slice().fill(7);
        let bytes = first.freeze();
        let address = bytes.as_ptr();
        assert!(address.addr().is_multiple_of(ALIGNMENT));
        assert_eq!((bytes.len(), bytes[4999]), (5000, 7));
        drop(bytes);
        assert_eq!(pool.take(8192).as_ref().as_ptr(), address, "same class, same memory");
    }

    #[test]
    fn sizes_at_the_edges() {
        let pool = BufferPool::new();
        for len in [0, 1, 4096, 4097, 4 << 20, (4 << 20) + 1, 32 << 20] {
            assert_eq!(pool.take(len).as_mut_slice().len(), len);
        }
        let kept: usize = pool.0.iter().map(|class| class.lock().expect("unpoisoned").len()).sum();
        assert_eq!(kept, 3, "one of 4 KiB, one of 8 KiB, one of 4 MiB");
    }
}
