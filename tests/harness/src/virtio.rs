//! A guest's virtio-blk driver that nobody here wrote: the `blkio` crate on a vhost-user socket.
//!
//! Called by conformance tests and the bench. The one place that reads what `blkio` leaves behind pointers. Must never
//! know: who serves the socket.

use anyhow::{Context, ensure};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags, iovec};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// Answers that are taken at once.
const BATCH: usize = 64;

/// What the driver asks for.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// Virtqueues.
    pub queues: usize,
    /// Descriptors of each, a power of two.
    pub queue_size: u16,
    /// Take a device that refuses writes.
    pub read_only: bool,
    /// Bytes of memory for requests.
    pub memory: usize,
}

/// What the device says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Bytes of the disk.
    pub size: u64,
    /// Its block size, bytes.
    pub block_size: u64,
    /// Longest piece of a request, bytes; 0: any.
    pub piece_max: usize,
    /// Pieces of a request.
    pub pieces_max: usize,
    /// Longest discard, bytes; 0: none are served.
    pub discard_max: u64,
    /// Longest range of zeroes, bytes; 0: none are served.
    pub zeroes_max: u64,
    /// Virtqueues that it has.
    pub queues: usize,
    /// What is written may be lost unless it is flushed.
    pub volatile: bool,
}

/// A place in the memory for requests, in the pieces in which the device sees it. Must outlive the requests that use it.
#[derive(Debug)]
pub struct Slot {
    pieces: Vec<iovec>,
}

/// An answered request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answered {
    /// The tag of the request.
    pub tag: usize,
    /// 0, or minus an error number.
    pub result: i32,
}

/// A disk, its queues and the memory that it sees.
pub struct VirtioDisk {
    // Before the device: the queues go first.
    queues: Vec<Blkioq>,
    device: Blkio,
    region: MemoryRegion,
    memory: File,
    facts: Facts,
}

impl std::fmt::Debug for VirtioDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioDisk").field("facts", &self.facts).finish_non_exhaustive()
    }
}

impl VirtioDisk {
    /// Connects, starts the queues and shares memory.
    ///
    /// # Errors
    /// What the device or the driver refuses.
    pub fn open(socket: &Path, wish: Wish) -> anyhow::Result<Self> {
        let mut device = Blkio::new("virtio-blk-vhost-user")?;
        device.set_str("path", &socket.to_string_lossy())?;
        device.set_bool("read-only", wish.read_only)?;
        device.connect().with_context(|| format!("connecting to {}", socket.display()))?;
        let bytes = |name: &str| device.get_u64(name);
        let count = |name: &str| device.get_i32(name).map(|value| value.max(0) as usize);
        let facts = Facts {
            size: bytes("capacity")?,
            block_size: count("request-alignment")? as u64,
            piece_max: count("max-segment-len")?,
            pieces_max: count("max-segments")?,
            discard_max: bytes("max-discard-len")?,
            zeroes_max: bytes("max-write-zeroes-len")?,
            queues: count("max-queues")?,
            volatile: device.get_bool("flush-needed")?,
        };
        device.set_i32("num-queues", i32::try_from(wish.queues)?)?;
        device.set_i32("queue-size", i32::from(wish.queue_size))?;
        let queues = device.start()?.queues;
        let region = device.alloc_mem_region(wish.memory)?;
        device.map_mem_region(&region)?;
        // The same memory, as a file.
        let memory = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", region.fd))?;
        Ok(Self { queues, device, region, memory, facts })
    }

    /// What the device said of itself.
    pub fn facts(&self) -> Facts {
        self.facts
    }

    /// The size that the device says now.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn size_now(&self) -> anyhow::Result<u64> {
        Ok(self.device.get_u64("capacity")?)
    }

    /// Bytes of the memory for requests.
    pub fn memory_bytes(&self) -> usize {
        self.region.len
    }

    /// Writes into the memory for requests.
    ///
    /// # Errors
    /// If it ends before.
    pub fn fill(&self, at: usize, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.memory.write_all_at(bytes, at as u64)?)
    }

    /// Reads from the memory for requests.
    ///
    /// # Errors
    /// If it ends before.
    pub fn take(&self, at: usize, bytes: &mut [u8]) -> anyhow::Result<()> {
        Ok(self.memory.read_exact_at(bytes, at as u64)?)
    }

    /// The memory from `at` on, in pieces of these lengths; longer ones than the device takes are cut.
    ///
    /// # Errors
    /// If it is outside the memory.
    pub fn slot(&self, at: usize, lengths: &[usize]) -> anyhow::Result<Slot> {
        let end = at + lengths.iter().sum::<usize>();
        ensure!(end <= self.region.len, "outside the memory: end={end} memory={}", self.region.len);
        let piece_max = if self.facts.piece_max == 0 { usize::MAX } else { self.facts.piece_max };
        let mut pieces = Vec::new();
        let mut address = self.region.addr + at;
        for length in lengths {
            let mut left = *length;
            while left > 0 {
                let piece = left.min(piece_max);
                pieces.push(iovec { iov_base: address as *mut _, iov_len: piece });
                (address, left) = (address + piece, left - piece);
            }
        }
        Ok(Slot { pieces })
    }

    /// Reads from `offset` into a slot.
    pub fn read(&mut self, queue: usize, offset: u64, slot: &Slot, tag: usize) {
        let (pieces, count) = (slot.pieces.as_ptr(), slot.pieces.len() as u32);
        self.queues[queue].readv(offset, pieces, count, tag, ReqFlags::empty());
    }

    /// Writes a slot to `offset`.
    pub fn write(&mut self, queue: usize, offset: u64, slot: &Slot, tag: usize) {
        let (pieces, count) = (slot.pieces.as_ptr(), slot.pieces.len() as u32);
        self.queues[queue].writev(offset, pieces, count, tag, ReqFlags::empty());
    }

    /// Makes everything answered durable.
    pub fn flush(&mut self, queue: usize, tag: usize) {
        self.queues[queue].flush(tag, ReqFlags::empty());
    }

    /// Gives a range back.
    pub fn discard(&mut self, queue: usize, (offset, length): (u64, u64), tag: usize) {
        self.queues[queue].discard(offset, length, tag, ReqFlags::empty());
    }

    /// Makes a range zeros; `unmap`: its space may be given back.
    pub fn zero(&mut self, queue: usize, (offset, length): (u64, u64), unmap: bool, tag: usize) {
        let flags = if unmap { ReqFlags::empty() } else { ReqFlags::NO_UNMAP };
        self.queues[queue].write_zeroes(offset, length, tag, flags);
    }

    /// Tells the device of what was asked, waits for at least `least` answers, and adds them to `out`.
    ///
    /// # Errors
    /// If they do not come within `limit`.
    pub fn reap(
        &mut self,
        queue: usize,
        least: usize,
        mut limit: Duration,
        out: &mut Vec<Answered>,
    ) -> anyhow::Result<()> {
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; BATCH];
        let least = least.min(BATCH);
        let count = self.queues[queue]
            .do_io(&mut completions, least, Some(&mut limit), None)
            .with_context(|| format!("waiting for answers: queue={queue} least={least}"))?;
        for completion in &completions[..count] {
            // SAFETY: `do_io` answers how many completions it has written, from the first on.
            let completion = unsafe { completion.assume_init_ref() };
            out.push(Answered { tag: completion.user_data, result: completion.ret });
        }
        Ok(())
    }
}
