//! A split virtqueue (virtio 1.2, 2.7) from the driver's side, every word of it within reach.

use super::PATIENCE;
use super::memory::{GUEST, Memory};
use anyhow::{Context, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// The chain goes on at `next`.
pub const NEXT: u16 = 1;
/// The device writes this buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// From one queue to the next.
const EACH: u64 = 128 << 10;

/// A descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Desc {
    /// Guest address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Where the chain goes on.
    pub next: u16,
}

impl Desc {
    /// As it lies in memory.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.address.to_le_bytes().to_vec();
        bytes.extend(self.length.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.next.to_le_bytes());
        bytes
    }
}

/// An eventfd that guest and device share.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// A new one.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// As the `vhost` crate takes it.
    ///
    /// # Errors
    /// Those of the system.
    pub fn shared(&self) -> anyhow::Result<EventFd> {
        let own = self.0.try_clone()?.into_raw_fd();
        // SAFETY: a descriptor that was just made and that nobody else closes.
        Ok(unsafe { EventFd::from_raw_fd(own) })
    }

    /// Its descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Rings it.
    ///
    /// # Errors
    /// Those of the system.
    pub fn ring(&self) -> anyhow::Result<()> {
        rustix::io::write(&self.0, &1u64.to_ne_bytes())?;
        Ok(())
    }

    /// Whether it was rung and not heard yet.
    ///
    /// # Errors
    /// Those of the system.
    pub fn is_rung(&self) -> anyhow::Result<bool> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        Ok(poll(&mut fds, Some(&Timespec::default()))? == 1)
    }

    /// Waits until it is rung, and hears it.
    ///
    /// # Errors
    /// If it is not.
    pub fn wait(&self, limit: Duration) -> anyhow::Result<()> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        ensure!(poll(&mut fds, Some(&limit.try_into()?))? == 1, "waited in vain: limit={limit:?}");
        rustix::io::read(&self.0, &mut [0; 8])?;
        Ok(())
    }
}

/// The queue.
#[derive(Debug)]
pub struct Ring {
    /// Its number.
    pub queue: u16,
    /// Descriptors.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Chains offered.
    pub offered: u16,
    /// Used entries that were seen.
    pub seen: u16,
    next_descriptor: u16,
    /// Tells the device.
    pub kick: Bell,
    /// Tells the guest.
    pub call: Bell,
    /// Tells the front-end of a broken queue.
    pub error: Bell,
}

impl Ring {
    /// One that nothing was done with.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new(queue: u16, size: u16) -> anyhow::Result<Self> {
        let base = GUEST + u64::from(queue) * EACH;
        Ok(Self {
            queue,
            size,
            descriptors: base,
            available: base + (32 << 10),
            used: base + (64 << 10),
            offered: 0,
            seen: 0,
            next_descriptor: 0,
            kick: Bell::new()?,
            call: Bell::new()?,
            error: Bell::new()?,
        })
    }

    /// Zeroes its memory.
    ///
    /// # Errors
    /// Those of the system.
    pub fn clear(&self, memory: &Memory) -> anyhow::Result<()> {
        memory.write(self.descriptors, &vec![0; EACH as usize])
    }

    /// Writes a descriptor of the table.
    ///
    /// # Errors
    /// Those of the system.
    pub fn set(&self, memory: &Memory, at: u16, desc: Desc) -> anyhow::Result<()> {
        memory.write(self.descriptors + 16 * u64::from(at), &desc.bytes())
    }

    /// Writes descriptors as one chain, in entries that were not used for the longest; answers the first.
    ///
    /// # Errors
    /// If there are more than the table has.
    pub fn chain(&mut self, memory: &Memory, parts: &[Desc]) -> anyhow::Result<u16> {
        ensure!(parts.len() <= usize::from(self.size), "longer than the queue: descriptors={}", parts.len());
        let head = self.next_descriptor;
        for (at, part) in parts.iter().enumerate() {
            let next = (self.next_descriptor + 1) % self.size;
            let last = at + 1 == parts.len();
            let flags = part.flags | if last { 0 } else { NEXT };
            self.set(memory, self.next_descriptor, Desc { flags, next, ..*part })?;
            self.next_descriptor = next;
        }
        Ok(head)
    }

    /// Offers a chain; tells nobody.
    ///
    /// # Errors
    /// Those of the system.
    pub fn offer(&mut self, memory: &Memory, head: u16) -> anyhow::Result<()> {
        memory.write(self.available + 4 + 2 * u64::from(self.offered % self.size), &head.to_le_bytes())?;
        self.offered = self.offered.wrapping_add(1);
        memory.write(self.available + 2, &self.offered.to_le_bytes())
    }

    /// Used entries that the device has shown and nobody has seen.
    ///
    /// # Errors
    /// Those of the system.
    pub fn unseen(&self, memory: &Memory) -> anyhow::Result<u16> {
        Ok(memory.u16(self.used + 2)?.wrapping_sub(self.seen))
    }

    /// The next used entry: head, bytes written.
    ///
    /// # Errors
    /// If none comes.
    pub fn used(&mut self, memory: &Memory) -> anyhow::Result<(u32, u32)> {
        let deadline = Instant::now() + PATIENCE;
        while self.unseen(memory)? == 0 {
            let left = deadline.checked_duration_since(Instant::now()).context("no answer came")?;
            let _ = self.call.wait(left);
        }
        let entry = memory.read(self.used + 4 + 8 * u64::from(self.seen % self.size), 8)?;
        self.seen = self.seen.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        Ok((word(0), word(4)))
    }
}
