//! A guest's memory: a file without a name, which the device maps and the tests read and write.

use anyhow::{Context, ensure};
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vhost::VhostUserMemoryRegionInfo;

/// Bytes of it.
pub const BYTES: u64 = 16 << 20;
/// Where the guest sees it. Far from where the front-end does, so that neither address passes for the other.
pub const GUEST: u64 = 0x4000_0000;
/// Where the front-end sees it.
pub const USER: u64 = 0x7f12_0000_0000;
/// Below this lie the rings.
const BUFFERS: u64 = 4 << 20;

/// The memory.
#[derive(Debug)]
pub struct Memory {
    /// The file.
    pub file: File,
    next: u64,
}

impl Memory {
    /// An empty one.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new() -> anyhow::Result<Self> {
        let file: File = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC)?.into();
        file.set_len(BYTES)?;
        Ok(Self { file, next: BUFFERS })
    }

    /// What the front-end says of it.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: BYTES,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// A guest address as the front-end sees it.
    pub fn user(&self, address: u64) -> u64 {
        address - GUEST + USER
    }

    /// A place for a buffer; places are used again after all others.
    ///
    /// # Errors
    /// If it is larger than all of them.
    pub fn take(&mut self, bytes: u64) -> anyhow::Result<u64> {
        ensure!(bytes <= BYTES - BUFFERS, "no guest has that much memory: bytes={bytes}");
        if self.next + bytes > BYTES {
            self.next = BUFFERS;
        }
        let at = self.next;
        // An odd distance: nothing is aligned by chance.
        self.next += bytes + 17;
        Ok(GUEST + at)
    }

    /// Writes.
    ///
    /// # Errors
    /// If it is outside.
    pub fn write(&self, address: u64, bytes: &[u8]) -> anyhow::Result<()> {
        let at = address.checked_sub(GUEST).context("not an address of the guest")?;
        ensure!(at + bytes.len() as u64 <= BYTES, "outside the guest's memory: address={address:#x}");
        Ok(self.file.write_all_at(bytes, at)?)
    }

    /// Reads.
    ///
    /// # Errors
    /// If it is outside.
    pub fn read(&self, address: u64, bytes: usize) -> anyhow::Result<Vec<u8>> {
        let at = address.checked_sub(GUEST).context("not an address of the guest")?;
        let mut out = vec![0; bytes];
        self.file.read_exact_at(&mut out, at)?;
        Ok(out)
    }

    /// Reads a number.
    ///
    /// # Errors
    /// If it is outside.
    pub fn u16(&self, address: u64) -> anyhow::Result<u16> {
        let bytes = self.read(address, 2)?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }
}
