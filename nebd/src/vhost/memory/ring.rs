//! One part of a virtqueue in guest memory: descriptor table, available ring or used ring.
//!
//! Made by [`GuestMemory::ring`](super::GuestMemory::ring), used by `queue`. Integers are little-endian (virtio 1.2, 2.7). Must
//! not know: what they mean.

use super::Region;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A ring's bytes, which stay mapped as long as it lives. An access beyond its end reads zeros or does nothing.
#[derive(Clone, Debug)]
pub struct Ring {
    region: Arc<Region>,
    /// Where it starts in the region.
    start: u64,
    length: u64,
}

impl Ring {
    pub(super) fn new(region: Arc<Region>, start: u64, length: u64) -> Self {
        Self { region, start, length }
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Guest address of its first byte.
    pub fn guest_address(&self) -> u64 {
        self.region.guest_address() + self.start
    }

    fn place(&self, at: usize, bytes: usize) -> Option<u64> {
        let end = (at as u64).checked_add(bytes as u64)?;
        debug_assert!(end <= self.length, "access beyond the ring: at={at} bytes={bytes}");
        (end <= self.length).then(|| self.start + at as u64)
    }

    /// Copies the bytes at `at` out, each read once.
    pub fn read(&self, at: usize, into: &mut [u8]) {
        match self.place(at, into.len()) {
            Some(place) => self.region.mapping.read(place, into),
            None => into.fill(0),
        }
    }

    /// Copies `bytes` in at `at`.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.place(at, bytes.len()) {
            self.region.mapping.write(place, bytes);
        }
    }
}

macro_rules! ring_access {
    ($load:ident, $store:ident, $int:ty) => {
        impl Ring {
            /// Loads an aligned integer.
            pub fn $load(&self, at: usize, order: Ordering) -> $int {
                self.place(at, size_of::<$int>())
                    .map_or(0, |place| <$int>::from_le(self.region.mapping.$load(place, order)))
            }

            /// Stores an aligned integer.
            pub fn $store(&self, at: usize, value: $int, order: Ordering) {
                if let Some(place) = self.place(at, size_of::<$int>()) {
                    self.region.mapping.$store(place, value.to_le(), order);
                }
            }
        }
    };
}

ring_access!(load_u16, store_u16, u16);
ring_access!(load_u32, store_u32, u32);
ring_access!(load_u64, store_u64, u64);
