//! One mapping of a file that a front-end shared: the only place where its bytes are touched.
//!
//! Called by the rest of `memory` and by `inflight`. Everything is bounds-checked and either atomic or volatile, because the
//! guest writes at the same time; an access beyond the end reads zeros or does nothing. Must not know: addresses of the guest.

use super::guard::Guard;
use rustix::fs::FileType;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use thiserror::Error;

/// Why a file can not be mapped.
#[derive(Debug, Error)]
pub enum MapError {
    /// Nothing to map.
    #[error("length is zero")]
    Empty,
    /// Offset and length leave the 64 bits.
    #[error("range wraps: offset={offset:#x} length={length:#x}")]
    Wraps {
        /// Where it starts in the file.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The file ends before the range does.
    #[error("range ends behind the file: offset={offset:#x} length={length:#x} file_bytes={file:#x}")]
    PastFile {
        /// Where it starts in the file.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The file's bytes.
        file: u64,
    },
    /// A socket, pipe, directory or the like.
    #[error("descriptor is of nothing that can be mapped")]
    Kind,
    /// The table of the guard is full.
    #[error("too many mappings at a time")]
    TooMany,
    /// The kernel refused.
    #[error("mapping failed: {0}")]
    Io(#[from] io::Error),
}

/// Shared, writable memory of a file, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
    /// What was mapped: whole pages around it.
    whole: (*mut libc::c_void, usize),
    /// Taken out of the table before the mapping goes.
    guard: Option<Guard>,
}

// SAFETY: the memory belongs to no thread, and every access to it is atomic or volatile.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes from `offset` of a file, none of which need to be multiples of a page.
    ///
    /// # Errors
    /// If the range is not in the file (where it tells its size), or the kernel refuses.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Self, MapError> {
        if length == 0 {
            return Err(MapError::Empty);
        }
        let wraps = MapError::Wraps { offset, length };
        let Some(end) = offset.checked_add(length) else { return Err(wraps) };
        let stat = rustix::fs::fstat(fd).map_err(io::Error::from)?;
        let file = u64::try_from(stat.st_size).unwrap_or(0);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile if end > file => return Err(MapError::PastFile { offset, length, file }),
            FileType::RegularFile | FileType::CharacterDevice => {}
            _ => return Err(MapError::Kind),
        }
        let page = page_bytes(fd)?;
        let from = offset - offset % page;
        let lead = (offset - from) as usize;
        let Some(to) = end.checked_next_multiple_of(page) else { return Err(wraps) };
        let (Ok(bytes), Ok(length)) = (usize::try_from(to - from), usize::try_from(length)) else {
            return Err(wraps);
        };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags, fd, from)
        }
        .map_err(io::Error::from)?;
        let start = NonNull::new(base.cast::<u8>().wrapping_add(lead)).ok_or(MapError::Kind)?;
        let mut mapping = Self { start, length, whole: (base, bytes), guard: None };
        mapping.guard = Some(Guard::new(base as usize, bytes, page as usize).ok_or(MapError::TooMany)?);
        // SAFETY: this only keeps the guest's memory out of core dumps. It may fail.
        let _ = unsafe { rustix::mm::madvise(base, bytes, Advice::LinuxDontDump) };
        Ok(mapping)
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length as u64
    }

    /// Whether the file lost a page of it: whoever shared it truncated the file.
    pub fn is_damaged(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_damaged)
    }

    /// Where `length` bytes at `at` lie, if they are in it. For the kernel to read or write, and for alignments.
    pub(super) fn pointer(&self, at: u64, length: usize) -> Option<*mut u8> {
        let at = usize::try_from(at).ok()?;
        let end = at.checked_add(length)?;
        (end <= self.length).then(|| self.start.as_ptr().wrapping_add(at))
    }

    fn place<T>(&self, at: u64) -> Option<*mut T> {
        let place = self.pointer(at, size_of::<T>())?.cast::<T>();
        debug_assert!(place.is_aligned(), "unaligned access at={at}");
        place.is_aligned().then_some(place)
    }

    /// Copies the bytes at `at` out. Beyond the end: zeros.
    pub fn read(&self, at: u64, into: &mut [u8]) {
        let Some(from) = self.pointer(at, into.len()) else {
            debug_assert!(false, "read beyond the end: at={at} length={}", into.len());
            return into.fill(0);
        };
        let lead = from.align_offset(size_of::<u64>()).min(into.len());
        let words = (into.len() - lead) / size_of::<u64>();
        // SAFETY: all places lie in the range that `pointer` has checked; words are aligned, because `lead` makes them so.
        // Volatile: the guest may write at any time, and each byte must be read once.
        unsafe {
            for (index, byte) in into[..lead].iter_mut().enumerate() {
                *byte = from.add(index).read_volatile();
            }
            for index in 0..words {
                let place = lead + index * size_of::<u64>();
                let word = from.add(place).cast::<u64>().read_volatile();
                into[place..place + size_of::<u64>()].copy_from_slice(&word.to_ne_bytes());
            }
            for (index, byte) in into.iter_mut().enumerate().skip(lead + words * size_of::<u64>()) {
                *byte = from.add(index).read_volatile();
            }
        }
    }

    /// Copies `bytes` in at `at`. Beyond the end: nothing.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let Some(to) = self.pointer(at, bytes.len()) else {
            return debug_assert!(false, "write beyond the end: at={at} length={}", bytes.len());
        };
        let lead = to.align_offset(size_of::<u64>()).min(bytes.len());
        let words = (bytes.len() - lead) / size_of::<u64>();
        // SAFETY: as in `read`.
        unsafe {
            for (index, byte) in bytes[..lead].iter().enumerate() {
                to.add(index).write_volatile(*byte);
            }
            let (chunks, _) = bytes[lead..].as_chunks::<{ size_of::<u64>() }>();
            for (index, chunk) in chunks.iter().enumerate() {
                let place = lead + index * size_of::<u64>();
                to.add(place).cast::<u64>().write_volatile(u64::from_ne_bytes(*chunk));
            }
            for (index, byte) in bytes.iter().enumerate().skip(lead + words * size_of::<u64>()) {
                to.add(index).write_volatile(*byte);
            }
        }
    }

    /// Touches every page of a range, so that those which have vanished are replaced: after a system call that failed with
    /// EFAULT, because the kernel raises no signal for its own accesses.
    pub(super) fn touch(&self, at: u64, length: u64) {
        let page = rustix::param::page_size() as u64;
        let mut next = at;
        while next < at.saturating_add(length) {
            self.read(next, &mut [0]);
            next = (next - next % page).saturating_add(page);
        }
        if length > 0 {
            self.read(at.saturating_add(length - 1), &mut [0]);
        }
    }

    /// Sets bits of one byte.
    pub(super) fn set_bits(&self, at: u64, bits: u8) {
        if let Some(place) = self.place::<u8>(at) {
            // SAFETY: in bounds; all accesses to shared bytes that may race are atomic or volatile.
            unsafe { AtomicU8::from_ptr(place) }.fetch_or(bits, Ordering::AcqRel);
        }
    }
}

/// Loads and stores of one width, in the machine's byte order.
macro_rules! atomic_access {
    ($load:ident, $store:ident, $int:ty, $atomic:ty) => {
        impl Mapping {
            /// Loads an aligned integer at `at`; 0 if it is not in it.
            pub fn $load(&self, at: u64, order: Ordering) -> $int {
                match self.place::<$int>(at) {
                    // SAFETY: in bounds and aligned; all accesses to shared bytes that may race are atomic or volatile.
                    Some(place) => unsafe { <$atomic>::from_ptr(place) }.load(order),
                    None => 0,
                }
            }

            /// Stores an aligned integer at `at`; does nothing if it is not in it.
            pub fn $store(&self, at: u64, value: $int, order: Ordering) {
                if let Some(place) = self.place::<$int>(at) {
                    // SAFETY: as in the load.
                    unsafe { <$atomic>::from_ptr(place) }.store(value, order);
                }
            }
        }
    };
}

atomic_access!(load_u8, store_u8, u8, AtomicU8);
atomic_access!(load_u16, store_u16, u16, AtomicU16);
atomic_access!(load_u32, store_u32, u32, AtomicU32);
atomic_access!(load_u64, store_u64, u64, AtomicU64);

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard = None;
        // SAFETY: we mapped it, and nobody refers to it once its owner goes.
        if let Err(error) = unsafe { rustix::mm::munmap(self.whole.0, self.whole.1) } {
            tracing::error!(%error, "memory can not be unmapped");
        }
    }
}

/// A huge page's bytes if the file is made of them: offsets and lengths of its mappings are multiples of it.
fn page_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let page = rustix::param::page_size() as u64;
    let system = rustix::fs::fstatfs(fd)?;
    if system.f_type as i64 != HUGETLBFS_MAGIC {
        return Ok(page);
    }
    Ok(u64::try_from(system.f_bsize).unwrap_or(page).max(page))
}

/// statfs(2).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
