//! A guest's driver, for tests: memory, rings written by hand, and what comes back.

use super::memory::{GuestMemory, RegionPlace, Segment};
use super::order::{QueueStart, Rings};
use super::queue::{FEATURE_EVENT_INDEX, FEATURE_INDIRECT, Queue, find_rings};
use rustix::fs::MemfdFlags;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// First address as the guest knows it.
pub(crate) const BASE: u64 = 0x10_0000;
/// First address as the front-end knows it.
const USER: u64 = 0x7f00_0000_0000;
/// Bytes of memory.
pub(crate) const BYTES: u64 = 4 << 20;
/// Where the rings lie.
const RINGS: (u64, u64, u64) = (0, 0x8000, 0xa000);
/// Where buffers may lie, as the guest knows it.
pub(crate) const BUFFERS: u64 = BASE + 0x10000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// The driver.
pub(crate) struct Driver {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) size: u16,
    file: OwnedFd,
    offered: u16,
    seen: u16,
}

impl Driver {
    pub(crate) fn new(size: u16) -> Self {
        let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&fd, BYTES).expect("grows");
        let place = RegionPlace { guest_address: BASE, length: BYTES, user_address: USER, offset: 0 };
        let ours = fd.try_clone().expect("duplicates");
        let memory = Arc::new(GuestMemory::map(vec![(place, fd)]).expect("maps"));
        Self { memory, size, file: ours, offered: 0, seen: 0 }
    }

    /// The front-end takes memory away that it has shared: everything from guest address `end` on.
    pub(crate) fn truncate(&self, end: u64) {
        rustix::fs::ftruncate(&self.file, end - BASE).expect("shrinks");
    }

    pub(crate) fn rings(&self) -> Rings {
        let (descriptors, available, used) = RINGS;
        find_rings(&self.memory, self.size, (USER + descriptors, USER + available, USER + used), None)
            .expect("rings are in memory")
    }

    pub(crate) fn start(&self, features: u64) -> QueueStart {
        QueueStart {
            queue: 0,
            size: self.size,
            memory: Arc::clone(&self.memory),
            rings: self.rings(),
            next_available: 0,
            features,
            enabled: true,
            kick: None,
            call: None,
            error: None,
            record: None,
        }
    }

    pub(crate) fn queue(&self) -> Queue {
        Queue::start(&mut self.start(FEATURE_INDIRECT)).expect("starts")
    }

    pub(crate) fn queue_with_events(&self) -> Queue {
        Queue::start(&mut self.start(FEATURE_INDIRECT | FEATURE_EVENT_INDEX)).expect("starts")
    }

    fn segment(address: u64, length: usize) -> Segment {
        Segment { region: 0, offset: address - BASE, length: length as u32 }
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write(Self::segment(address, bytes.len()), 0, bytes);
    }

    pub(crate) fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read(Self::segment(address, length), 0, &mut bytes);
        bytes
    }

    pub(crate) fn descriptor_bytes(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }

    pub(crate) fn describe(&self, at: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.put(BASE + RINGS.0 + 16 * u64::from(at), &Self::descriptor_bytes(address, length, flags, next));
    }

    /// Writes a chain from descriptor `first` on: addresses, lengths, whether writable.
    pub(crate) fn chain(&self, first: u16, parts: &[(u64, u32, bool)]) {
        for (number, (address, length, writable)) in parts.iter().enumerate() {
            let at = first + number as u16;
            let more = number + 1 < parts.len();
            let flags = if *writable { WRITE } else { 0 } | if more { NEXT } else { 0 };
            self.describe(at, *address, *length, flags, at + 1);
        }
    }

    pub(crate) fn offer(&mut self, head: u16) {
        let at = BASE + RINGS.1 + 4 + 2 * u64::from(self.offered % self.size);
        self.put(at, &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.set_available(self.offered);
    }

    pub(crate) fn set_available(&self, index: u16) {
        self.put(BASE + RINGS.1 + 2, &index.to_le_bytes());
    }

    /// The used index at which it wants to be notified.
    pub(crate) fn want(&self, index: u16) {
        self.put(BASE + RINGS.1 + 4 + 2 * u64::from(self.size), &index.to_le_bytes());
    }

    pub(crate) fn set_no_interrupt(&self, on: bool) {
        self.put(BASE + RINGS.1, &u16::from(on).to_le_bytes());
    }

    /// The available index at which the device wants to be notified.
    pub(crate) fn wanted(&self) -> u16 {
        let bytes = self.get(BASE + RINGS.2 + 4 + 8 * u64::from(self.size), 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    pub(crate) fn used_flags(&self) -> u16 {
        let bytes = self.get(BASE + RINGS.2, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// What was used since the last call: heads and bytes written.
    pub(crate) fn used(&mut self) -> Vec<(u32, u32)> {
        let index = self.get(BASE + RINGS.2 + 2, 2);
        let index = u16::from_le_bytes([index[0], index[1]]);
        let mut new = Vec::new();
        while self.seen != index {
            let at = BASE + RINGS.2 + 4 + 8 * u64::from(self.seen % self.size);
            let word = |at| u32::from_le_bytes(self.get(at, 4).try_into().expect("four bytes"));
            new.push((word(at), word(at + 4)));
            self.seen = self.seen.wrapping_add(1);
        }
        new
    }
}
