//! Guest memory as the front-end shared it: what is where, and safe access to it.
//!
//! Made by `device`, used by `queue`, `request` and the worker's stream. Modules: [`mapping`] holds the bytes under [`guard`],
//! [`ring`] and [`dirty_log`] are views of it. The `unsafe` of the vhost-user export is in this directory. Must not know:
//! messages, descriptors.
//!
//! `guest_cannot_crash_us`: an address is checked before it becomes a [`Segment`], a segment again when it is used, and a
//! page that vanishes becomes zeros. `bounded`: at most [`REGIONS_MAX`] regions.

pub mod dirty_log;
mod guard;
pub mod mapping;
pub mod ring;

pub use dirty_log::DirtyLog;
pub use mapping::{MapError, Mapping};
pub use ring::Ring;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use thiserror::Error;

/// Regions of one guest: what Linux's vhost allows too (VHOST_USER_GET_MAX_MEM_SLOTS).
pub const REGIONS_MAX: usize = 509;

/// Where a region lies (vhost-user specification, "Memory regions description"). All in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionPlace {
    /// First address as the guest's drivers know it.
    pub guest_address: u64,
    /// Bytes.
    pub length: u64,
    /// First address in the front-end's own memory; rings are named by it.
    pub user_address: u64,
    /// Where it starts in the file.
    pub offset: u64,
}

/// Why memory is not taken.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A file can not be mapped.
    #[error("region at guest address {guest_address:#x}: {why}")]
    Map {
        /// Which region.
        guest_address: u64,
        /// Why not.
        why: MapError,
    },
    /// Addresses leave the 64 bits.
    #[error("region wraps: guest_address={:#x} user_address={:#x} length={:#x}", .0.guest_address, .0.user_address, .0.length)]
    Wraps(RegionPlace),
    /// Two regions share guest or user addresses.
    #[error("regions overlap: guest_addresses={0:#x},{1:#x}")]
    Overlap(u64, u64),
    /// More than [`REGIONS_MAX`].
    #[error("too many regions: limit={REGIONS_MAX}")]
    TooMany,
    /// No such region to be removed.
    #[error("no such region: guest_address={:#x} user_address={:#x} length={:#x}", .0.guest_address, .0.user_address, .0.length)]
    Unknown(RegionPlace),
}

/// An address or range that is not the guest's memory, or not as aligned as it must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("not in guest memory: address={address:#x} length={length:#x}")]
pub struct OutsideMemory {
    /// Where it would start.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// One region, mapped.
#[derive(Debug)]
pub struct Region {
    place: RegionPlace,
    mapping: Mapping,
    /// To be passed on.
    file: OwnedFd,
}

impl Region {
    fn map(place: RegionPlace, file: OwnedFd) -> Result<Self, MemoryError> {
        let ends =
            (place.guest_address.checked_add(place.length), place.user_address.checked_add(place.length));
        let (Some(_), Some(_)) = ends else { return Err(MemoryError::Wraps(place)) };
        match Mapping::shared(file.as_fd(), place.offset, place.length) {
            Ok(mapping) => Ok(Self { place, mapping, file }),
            Err(why) => Err(MemoryError::Map { guest_address: place.guest_address, why }),
        }
    }

    /// Where it lies.
    pub fn place(&self) -> RegionPlace {
        self.place
    }

    /// Its file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its first guest address.
    pub fn guest_address(&self) -> u64 {
        self.place.guest_address
    }

    fn guest_end(&self) -> u64 {
        self.place.guest_address + self.place.length
    }

    fn overlaps(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.place, &other.place);
        let apart = |a: u64, a_length: u64, b: u64, b_length: u64| a + a_length <= b || b + b_length <= a;
        !apart(ours.guest_address, ours.length, theirs.guest_address, theirs.length)
            || !apart(ours.user_address, ours.length, theirs.user_address, theirs.length)
    }
}

/// A piece of guest memory within one region. Belongs to the [`GuestMemory`] that located it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Which region.
    pub region: u32,
    /// Where in it, bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Segment {
    /// What is left of it without its first `bytes`.
    #[must_use]
    pub fn skip(self, bytes: u32) -> Self {
        let bytes = bytes.min(self.length);
        Self { offset: self.offset + u64::from(bytes), length: self.length - bytes, ..self }
    }
}

/// All regions of a guest at one time. Never changes: another table is another one, and shares what stays.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    /// By guest address.
    regions: Vec<Arc<Region>>,
    log: Option<Arc<DirtyLog>>,
}

impl GuestMemory {
    /// Maps a whole table (VHOST_USER_SET_MEM_TABLE), without a log.
    ///
    /// # Errors
    /// If a region can not be mapped, regions overlap, or there are too many.
    pub fn map(table: Vec<(RegionPlace, OwnedFd)>) -> Result<Self, MemoryError> {
        if table.len() > REGIONS_MAX {
            return Err(MemoryError::TooMany);
        }
        let mut memory = Self::default();
        for (place, fd) in table {
            memory.add(place, fd)?;
        }
        Ok(memory)
    }

    fn add(&mut self, place: RegionPlace, fd: OwnedFd) -> Result<(), MemoryError> {
        if self.regions.len() >= REGIONS_MAX {
            return Err(MemoryError::TooMany);
        }
        let region = Region::map(place, fd)?;
        if let Some(other) = self.regions.iter().find(|other| other.overlaps(&region)) {
            return Err(MemoryError::Overlap(other.guest_address(), place.guest_address));
        }
        let position = self.regions.partition_point(|other| other.guest_address() < place.guest_address);
        self.regions.insert(position, Arc::new(region));
        Ok(())
    }

    /// The same with one region more (VHOST_USER_ADD_MEM_REG).
    ///
    /// # Errors
    /// As [`map`](Self::map).
    pub fn with_region(&self, place: RegionPlace, fd: OwnedFd) -> Result<Self, MemoryError> {
        let mut memory = self.clone();
        memory.add(place, fd)?;
        Ok(memory)
    }

    /// The same without the region of this place, whose offset is not looked at (VHOST_USER_REM_MEM_REG).
    ///
    /// # Errors
    /// If there is none.
    pub fn without_region(&self, place: RegionPlace) -> Result<Self, MemoryError> {
        let is = |region: &Arc<Region>| RegionPlace { offset: place.offset, ..region.place } == place;
        let position = self.regions.iter().position(is).ok_or(MemoryError::Unknown(place))?;
        let mut memory = self.clone();
        memory.regions.remove(position);
        Ok(memory)
    }

    /// The same with another log, or none.
    #[must_use]
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Self {
        Self { regions: self.regions.clone(), log }
    }

    /// All regions by guest address; a [`Segment`] names one by its place here.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = &Arc<Region>> {
        self.regions.iter()
    }

    /// One past the highest guest address.
    pub fn guest_end(&self) -> u64 {
        self.regions.last().map_or(0, |region| region.guest_end())
    }

    /// Whether a page vanished, because the front-end truncated its file: reads of it give zeros from then on.
    pub fn is_damaged(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_damaged())
    }

    /// Finds a range, which may span regions that adjoin each other, and adds its segments to `out`. On an error `out` is as
    /// before.
    ///
    /// # Errors
    /// If a byte of it is not in the memory, or there is none.
    pub fn locate(
        &self,
        guest_address: u64,
        length: u32,
        out: &mut Vec<Segment>,
    ) -> Result<(), OutsideMemory> {
        let outside = OutsideMemory { address: guest_address, length: length.into() };
        if length == 0 || guest_address.checked_add(length.into()).is_none() {
            return Err(outside);
        }
        let before = out.len();
        let mut index = self.regions.partition_point(|region| region.guest_end() <= guest_address);
        let (mut address, mut left) = (guest_address, length);
        while left > 0 {
            let Some(region) = self.regions.get(index).filter(|region| region.guest_address() <= address)
            else {
                out.truncate(before);
                return Err(outside);
            };
            let here = left.min(u32::try_from(region.guest_end() - address).unwrap_or(u32::MAX));
            let offset = address - region.guest_address();
            out.push(Segment { region: index as u32, offset, length: here });
            (address, left, index) = (address + u64::from(here), left - here, index + 1);
        }
        Ok(())
    }

    fn region(&self, segment: Segment) -> Option<&Region> {
        let region = self.regions.get(segment.region as usize).map(|region| &**region);
        debug_assert!(region.is_some(), "segment of another memory: {segment:?}");
        region
    }

    /// Copies bytes out, from byte `at` of a segment, each read once. Beyond its end: zeros.
    pub fn read(&self, segment: Segment, at: u32, into: &mut [u8]) {
        match self.region(segment) {
            Some(region) if fits(segment, at, into.len()) => {
                region.mapping.read(segment.offset.saturating_add(at.into()), into);
            }
            _ => into.fill(0),
        }
    }

    /// Copies bytes in, from byte `at` of a segment. Beyond its end: nothing. Marks nothing in the log.
    pub fn write(&self, segment: Segment, at: u32, bytes: &[u8]) {
        if let Some(region) = self.region(segment)
            && fits(segment, at, bytes.len())
        {
            region.mapping.write(segment.offset.saturating_add(at.into()), bytes);
        }
    }

    /// A segment for the kernel to read or write. A segment that is not of this memory gives one without bytes, so compare
    /// lengths. A page that has vanished makes the call fail with EFAULT: [`mend`](Self::mend) it and repeat.
    pub fn iovec(&self, segment: Segment) -> libc::iovec {
        let length = segment.length as usize;
        match self.region(segment).and_then(|region| region.mapping.pointer(segment.offset, length)) {
            Some(base) => libc::iovec { iov_base: base.cast(), iov_len: length },
            None => libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 },
        }
    }

    /// Replaces what has vanished of a segment by zeros; the memory is damaged then.
    pub fn mend(&self, segment: Segment) {
        if let Some(region) = self.region(segment)
            && region.mapping.pointer(segment.offset, segment.length as usize).is_some()
        {
            region.mapping.touch(segment.offset, segment.length.into());
        }
    }

    /// A ring by the front-end's own address. It lies within one region, and its first byte is a multiple of `align` (a power
    /// of two), in the front-end's memory and in ours.
    ///
    /// # Errors
    /// If it does not.
    pub fn ring(&self, user_address: u64, length: u64, align: u64) -> Result<Ring, OutsideMemory> {
        let outside = OutsideMemory { address: user_address, length };
        let holds = |region: &&Arc<Region>| {
            let start = user_address.checked_sub(region.place.user_address)?;
            let end = start.checked_add(length)?;
            (length > 0 && end <= region.place.length).then_some(start)
        };
        let region = self.regions.iter().find(|region| holds(region).is_some()).ok_or(outside)?;
        let start = holds(&region).ok_or(outside)?;
        let ours = region.mapping.pointer(start, 1).ok_or(outside)? as u64;
        if !user_address.is_multiple_of(align) || !ours.is_multiple_of(align) {
            return Err(outside);
        }
        Ok(Ring::new(Arc::clone(region), start, length))
    }

    /// Marks what was written in this memory's log; `segments` are of `of`, which may be an older one.
    pub fn log(&self, segments: &[Segment], of: &Self) {
        if let Some(log) = &self.log {
            for segment in segments {
                if let Some(region) = of.region(*segment) {
                    log.mark(region.guest_address().saturating_add(segment.offset), segment.length.into());
                }
            }
        }
    }

    /// Marks a range in the log, whether or not it is in the memory: where a ring is logged is the front-end's choice.
    pub fn log_range(&self, guest_address: u64, length: u64) {
        if let Some(log) = &self.log {
            log.mark(guest_address, length);
        }
    }

    /// Whether what is written is to be logged.
    pub fn is_logged(&self) -> bool {
        self.log.is_some()
    }
}

fn fits(segment: Segment, at: u32, length: usize) -> bool {
    let fits = (at as usize).checked_add(length).is_some_and(|end| end <= segment.length as usize);
    debug_assert!(fits, "access beyond the segment: {segment:?} at={at} length={length}");
    fits
}

#[cfg(test)]
mod tests;
