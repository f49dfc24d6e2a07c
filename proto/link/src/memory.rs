//! Memory that both sides of a link hold: a file's, mapped.
//!
//! Used by [`ring`](crate::ring), by nebd for its buffer area and by the gateway for the regions that nebd passes on. The
//! `unsafe` of this crate is in this file. Must not know: what lies in it.
//!
//! `guest_cannot_crash_us`: a page of a file that someone truncates is a page whose touch ends the process. So bytes are touched
//! only where the file is sealed against that ([`SharedMemory::is_sealed`]); elsewhere they are copied by system calls on the
//! file, which fail instead. Accesses are atomic or volatile, because the other side writes at the same time.

use rustix::fs::{FileType, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;
use thiserror::Error;

/// Why a file can not be mapped.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The range is empty, leaves the 64 bits or ends behind the file.
    #[error("range is not in the file: offset={offset:#x} length={length:#x} file_bytes={file:#x}")]
    Range {
        /// Where it starts in the file, bytes.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The file's bytes.
        file: u64,
    },
    /// A socket, pipe, directory or the like.
    #[error("descriptor is of nothing that can be mapped")]
    Kind,
    /// The kernel refused.
    #[error("mapping failed: error={0}")]
    Io(#[from] io::Error),
}

/// The memory is not there any more: whoever shared it has truncated its file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("shared memory has vanished")]
pub struct Vanished;

/// A range of a file, mapped for reading and writing.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    /// Where it starts in the file.
    offset: u64,
    start: NonNull<u8>,
    length: usize,
    /// What was mapped: whole pages around it.
    whole: (*mut libc::c_void, usize),
    sealed: bool,
}

// SAFETY: the memory belongs to no thread, and every access to it is atomic, volatile or the kernel's.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// New memory of `length` bytes, all zero, sealed. `name` is what /proc shows.
    ///
    /// # Errors
    /// If the kernel has no memory or descriptor left.
    pub fn create(name: &str, length: usize) -> Result<Self, MemoryError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(name, flags).map_err(io::Error::from)?;
        rustix::fs::ftruncate(&fd, length as u64).map_err(io::Error::from)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(io::Error::from)?;
        Self::map(fd, 0, length as u64)
    }

    /// Maps `length` bytes from `offset` of a file that the other side has sent. Neither need be a multiple of a page.
    ///
    /// # Errors
    /// If the range is not in the file, or the kernel refuses.
    pub fn map(fd: OwnedFd, offset: u64, length: u64) -> Result<Self, MemoryError> {
        let stat = rustix::fs::fstat(&fd).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MemoryError::Kind);
        }
        let file = u64::try_from(stat.st_size).unwrap_or(0);
        let outside = MemoryError::Range { offset, length, file };
        let Some(end) = offset.checked_add(length).filter(|end| length > 0 && *end <= file) else {
            return Err(outside);
        };
        let page = page_bytes(fd.as_fd())?;
        let from = offset - offset % page.bytes;
        let lead = (offset - from) as usize;
        let (Some(to), Ok(length)) = (end.checked_next_multiple_of(page.bytes), usize::try_from(length))
        else {
            return Err(outside);
        };
        let bytes = (to - from) as usize;
        let (protection, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), bytes, protection, flags, &fd, from) }
            .map_err(io::Error::from)?;
        let start = NonNull::new(base.cast::<u8>().wrapping_add(lead)).ok_or(MemoryError::Kind)?;
        // A hole in huge pages may find none when it is touched.
        let sealed = !page.huge && is_sealed(fd.as_fd());
        let memory = Self { fd, offset, start, length, whole: (base, bytes), sealed };
        // SAFETY: this only keeps guests' memory out of core dumps. It may fail.
        let _ = unsafe { rustix::mm::madvise(base, bytes, Advice::LinuxDontDump) };
        Ok(memory)
    }

    /// Bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The file, to be passed on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where it starts in its file, bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Nobody can take a page of it away.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Where `length` bytes at `at` lie, if they are in it. For system calls only: they answer `EFAULT` for a page that has
    /// vanished.
    pub fn pointer(&self, at: u64, length: usize) -> Option<*mut u8> {
        let at = usize::try_from(at).ok()?;
        let end = at.checked_add(length)?;
        (end <= self.length).then(|| self.start.as_ptr().wrapping_add(at))
    }

    /// Copies the bytes at `at` out.
    ///
    /// # Errors
    /// If they are not in it, or not any more.
    pub fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Vanished> {
        let from = self.pointer(at, into.len()).ok_or(Vanished)?;
        if self.sealed {
            // SAFETY: the range was checked, and a sealed file keeps its pages.
            unsafe { copy_out(from, into) };
            return Ok(());
        }
        let mut have = 0;
        while have < into.len() {
            match rustix::io::pread(&self.fd, &mut into[have..], self.offset + at + have as u64) {
                Ok(count) if count > 0 => have += count,
                Err(rustix::io::Errno::INTR) => {}
                _ => return Err(Vanished),
            }
        }
        Ok(())
    }

    /// Copies `bytes` in at `at`.
    ///
    /// # Errors
    /// If there is no such place, or not any more.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Vanished> {
        let to = self.pointer(at, bytes.len()).ok_or(Vanished)?;
        if self.sealed {
            // SAFETY: as in `read`.
            unsafe { copy_in(bytes, to) };
            return Ok(());
        }
        // A write beyond its end would make the file larger again.
        let stat = rustix::fs::fstat(&self.fd).map_err(|_| Vanished)?;
        let end = self.offset + at + bytes.len() as u64;
        if u64::try_from(stat.st_size).unwrap_or(0) < end {
            return Err(Vanished);
        }
        let mut have = 0;
        while have < bytes.len() {
            match rustix::io::pwrite(&self.fd, &bytes[have..], self.offset + at + have as u64) {
                Ok(count) if count > 0 => have += count,
                Err(rustix::io::Errno::INTR) => {}
                _ => return Err(Vanished),
            }
        }
        Ok(())
    }

    /// The eight bytes at `8 * index`, which lie in it and are sealed: whoever calls has looked.
    pub(crate) fn cell(&self, index: usize) -> &AtomicU64 {
        let place = self.pointer(8 * index as u64, 8).filter(|place| place.cast::<u64>().is_aligned());
        let place = place.filter(|_| self.sealed).expect("a ring's cells lie in its memory, which is sealed");
        // SAFETY: in bounds, aligned and kept; all accesses to them, by either side, are atomic.
        unsafe { AtomicU64::from_ptr(place.cast()) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: we mapped it, and nobody refers to it once its owner goes.
        let unmapped = unsafe { rustix::mm::munmap(self.whole.0, self.whole.1) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// Copies out of memory that others write to.
///
/// # Safety
/// As many bytes as `into` has must be mapped at `from`.
unsafe fn copy_out(from: *const u8, into: &mut [u8]) {
    let lead = from.align_offset(size_of::<u64>()).min(into.len());
    let (head, rest) = into.split_at_mut(lead);
    let (words, tail) = rest.as_chunks_mut::<{ size_of::<u64>() }>();
    let behind = lead + words.len() * size_of::<u64>();
    // SAFETY: all places lie in the range; words are aligned, because `lead` makes them so. Volatile: each byte is read once.
    unsafe {
        for (index, byte) in head.iter_mut().enumerate() {
            *byte = from.add(index).read_volatile();
        }
        let first = from.add(lead).cast::<u64>();
        for (index, word) in words.iter_mut().enumerate() {
            *word = first.add(index).read_volatile().to_ne_bytes();
        }
        for (index, byte) in tail.iter_mut().enumerate() {
            *byte = from.add(behind + index).read_volatile();
        }
    }
}

/// Copies into memory that others read.
///
/// # Safety
/// As many bytes as `bytes` has must be mapped at `to`.
unsafe fn copy_in(bytes: &[u8], to: *mut u8) {
    let lead = to.align_offset(size_of::<u64>()).min(bytes.len());
    let (head, rest) = bytes.split_at(lead);
    let (words, tail) = rest.as_chunks::<{ size_of::<u64>() }>();
    let behind = lead + words.len() * size_of::<u64>();
    // SAFETY: as in `copy_out`.
    unsafe {
        for (index, byte) in head.iter().enumerate() {
            to.add(index).write_volatile(*byte);
        }
        let first = to.add(lead).cast::<u64>();
        for (index, word) in words.iter().enumerate() {
            first.add(index).write_volatile(u64::from_ne_bytes(*word));
        }
        for (index, byte) in tail.iter().enumerate() {
            to.add(behind + index).write_volatile(*byte);
        }
    }
}

fn is_sealed(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

struct Page {
    bytes: u64,
    huge: bool,
}

/// The file's pages: offsets and lengths of its mappings are multiples of them.
fn page_bytes(fd: BorrowedFd<'_>) -> io::Result<Page> {
    let bytes = rustix::param::page_size() as u64;
    let system = rustix::fs::fstatfs(fd)?;
    if system.f_type as i64 != HUGETLBFS_MAGIC {
        return Ok(Page { bytes, huge: false });
    }
    Ok(Page { bytes: u64::try_from(system.f_bsize).unwrap_or(bytes).max(bytes), huge: true })
}

/// statfs(2).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(length: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("plain", MemfdFlags::CLOEXEC).expect("creates");
        rustix::fs::ftruncate(&fd, length).expect("sizes");
        fd
    }

    #[test]
    fn bytes_come_back_sealed_or_not_wherever_they_lie() {
        let sealed = SharedMemory::create("sealed", 10_000).expect("creates");
        assert!(sealed.is_sealed());
        let loose = SharedMemory::map(plain(20_000), 3, 10_000).expect("maps");
        assert!(!loose.is_sealed());
        for memory in [&sealed, &loose] {
            for (at, length) in [(0, 0), (0, 1), (1, 7), (5, 8), (3, 4097), (9_999, 1), (0, 10_000)] {
                let bytes: Vec<u8> = (0..length).map(|i| (i * 7 + at) as u8).collect();
                memory.write(at as u64, &bytes).expect("fits");
                let mut back = vec![0; length];
                memory.read(at as u64, &mut back).expect("fits");
                assert_eq!(back, bytes, "{at} {length}");
            }
            assert_eq!(memory.read(9_999, &mut [0, 0]), Err(Vanished));
            assert_eq!(memory.write(u64::MAX, &[0]), Err(Vanished));
            assert!(memory.pointer(10_001, 0).is_none());
        }
    }

    #[test]
    fn what_was_truncated_is_an_error_and_the_file_stays_short() {
        let fd = plain(8192);
        let memory = SharedMemory::map(fd.try_clone().expect("clones"), 0, 8192).expect("maps");
        rustix::fs::ftruncate(&fd, 4096).expect("truncates");
        memory.write(0, &[1; 4096]).expect("still there");
        assert_eq!(memory.write(4000, &[1; 200]), Err(Vanished));
        assert_eq!(memory.read(4090, &mut [0; 10]), Err(Vanished));
        assert_eq!(rustix::fs::fstat(&fd).expect("stats").st_size, 4096);
    }

    #[test]
    fn what_is_no_range_of_a_file_is_refused() {
        for (offset, length) in [(0, 0), (0, 8193), (8192, 1), (u64::MAX, 2)] {
            let refused = SharedMemory::map(plain(8192), offset, length).expect_err("no such range");
            assert!(refused.to_string().contains(&format!("offset={offset:#x}")), "{refused}");
        }
        let (socket, _) = std::os::unix::net::UnixStream::pair().expect("opens");
        assert!(matches!(SharedMemory::map(socket.into(), 0, 1), Err(MemoryError::Kind)));
    }
}
