//! Memory that nebd shares over a link: its regions, and the data of a request in them.
//!
//! Made by the link, used by engines. Knows: what is mapped. Must not know: requests, sockets. `guest_cannot_crash_us`: a piece is
//! checked against its region before it becomes data; bytes of memory that could vanish are only touched by the kernel.
//! `bounded`: at most [`REGIONS_MAX`] regions for each link, [`REGIONS_IN_ALL_MAX`] for all.
#![allow(unsafe_code)]

use smallvec::SmallVec;
use spline_link::memory::SharedMemory;
pub(crate) use spline_link::memory::Vanished;
use spline_link::ring::Piece;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Regions of one link: a guest's 509, and room for those of before while requests still use them.
pub(crate) const REGIONS_MAX: usize = 1100;

/// Regions of all links of this process: half of the mappings that Linux allows a process by default (vm.max_map_count).
const REGIONS_IN_ALL_MAX: usize = 32_768;
/// How many there are.
static REGIONS: AtomicUsize = AtomicUsize::new(0);

/// A region, counted for as long as it is mapped.
struct Region(SharedMemory);

impl Region {
    fn new(memory: SharedMemory) -> Option<Self> {
        let more = |count: usize| (count < REGIONS_IN_ALL_MAX).then_some(count + 1);
        REGIONS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self(memory))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        REGIONS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The regions of a link at one time. Another set is another table, which shares what stays.
#[derive(Clone, Default)]
pub(crate) struct Regions {
    /// By number.
    list: Vec<(u32, Arc<Region>)>,
}

impl Regions {
    /// The same with one more; `None` if the number was used before or there are too many.
    pub(crate) fn with(&self, number: u32, memory: SharedMemory) -> Option<Self> {
        let is_new = self.list.last().is_none_or(|(last, _)| *last < number);
        if !is_new || self.list.len() >= REGIONS_MAX {
            return None;
        }
        let mut list = self.list.clone();
        list.push((number, Arc::new(Region::new(memory)?)));
        Some(Self { list })
    }

    /// The same without one; `None` if there is none of the number.
    pub(crate) fn without(&self, number: u32) -> Option<Self> {
        let at = self.list.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        let mut list = self.list.clone();
        list.remove(at);
        Some(Self { list })
    }

    /// All of them by number, to be passed on.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = (u32, &SharedMemory)> {
        self.list.iter().map(|(number, region)| (*number, &region.0))
    }

    fn find(&self, number: u32) -> Option<usize> {
        // Nearly every guest has one or two.
        match self.list.as_slice() {
            [(first, _), ..] if *first == number => Some(0),
            [_, (second, _), ..] if *second == number => Some(1),
            list => list.binary_search_by_key(&number, |(number, _)| *number).ok(),
        }
    }

    /// Whether there is a region of the number.
    pub(crate) fn has(&self, number: u32) -> bool {
        self.find(number).is_some()
    }
}

/// Bytes of a mapping, for system calls and io_uring only; laid out as `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RawPiece {
    /// First byte.
    pub(crate) start: *mut u8,
    /// Bytes.
    pub(crate) len: usize,
}

// SAFETY: what it points to belongs to no thread; whoever uses it holds the `SharedData` that keeps it mapped.
unsafe impl Send for RawPiece {}
// SAFETY: as above.
unsafe impl Sync for RawPiece {}

/// The data of one request, in memory that stays mapped for as long as this lives.
pub(crate) struct SharedData {
    regions: Arc<Regions>,
    pieces: SmallVec<[Piece; 2]>,
    raw: SmallVec<[RawPiece; 2]>,
    len: usize,
}

/// A piece names what is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("piece of a request is not in shared memory: region={} offset={} length={}", .0.region, .0.offset, .0.length)]
pub(crate) struct NotShared(pub(crate) Piece);

impl SharedData {
    /// The pieces of a request.
    ///
    /// # Errors
    /// The first that is not in its region.
    pub(crate) fn new(regions: &Arc<Regions>, pieces: &[Piece]) -> Result<Self, NotShared> {
        let mut raw = SmallVec::with_capacity(pieces.len());
        let mut len = 0;
        for piece in pieces {
            let outside = NotShared(*piece);
            let memory = regions.find(piece.region).map(|at| &regions.list[at].1.0).ok_or(outside)?;
            let start = memory.pointer(piece.offset, piece.length as usize).ok_or(outside)?;
            raw.push(RawPiece { start, len: piece.length as usize });
            len += piece.length as usize;
        }
        Ok(Self { regions: Arc::clone(regions), pieces: pieces.into(), raw, len })
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// For the kernel, in order. A page that has vanished makes its call fail with `EFAULT`.
    pub(crate) fn pieces(&self) -> &[RawPiece] {
        &self.raw
    }

    /// Copies all of it out; `into` is as long.
    ///
    /// # Errors
    /// If the memory has vanished.
    pub(crate) fn copy_out(&self, into: &mut [u8]) -> Result<(), Vanished> {
        let mut rest = into;
        for piece in &self.pieces {
            let (part, behind) = rest.split_at_mut_checked(piece.length as usize).ok_or(Vanished)?;
            self.memory(piece)?.read(piece.offset, part)?;
            rest = behind;
        }
        Ok(())
    }

    /// Copies `bytes` in, from byte `at` on; what does not fit is left out.
    ///
    /// # Errors
    /// If the memory has vanished.
    pub(crate) fn copy_in(&self, at: usize, bytes: &[u8]) -> Result<(), Vanished> {
        let (mut skip, mut rest) = (at, bytes);
        for piece in &self.pieces {
            let length = piece.length as usize;
            if skip >= length {
                skip -= length;
                continue;
            }
            let (part, behind) = rest.split_at(rest.len().min(length - skip));
            self.memory(piece)?.write(piece.offset + skip as u64, part)?;
            (skip, rest) = (0, behind);
            if rest.is_empty() {
                break;
            }
        }
        Ok(())
    }

    fn memory(&self, piece: &Piece) -> Result<&SharedMemory, Vanished> {
        self.regions.find(piece.region).map(|at| &self.regions.list[at].1.0).ok_or(Vanished)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions() -> Arc<Regions> {
        let memory = |length| SharedMemory::create("region", length).expect("creates");
        let regions = Regions::default().with(3, memory(8192)).expect("new");
        let regions = regions.with(7, memory(4096)).expect("new").with(9, memory(100)).expect("new");
        Arc::new(regions)
    }

    fn piece(region: u32, offset: u64, length: u32) -> Piece {
        Piece { region, length, offset }
    }

    #[test]
    fn data_is_copied_over_its_pieces() {
        let regions = regions();
        let pieces = [piece(7, 4000, 96), piece(3, 10, 50), piece(9, 0, 100)];
        let data = SharedData::new(&regions, &pieces).expect("there");
        assert_eq!((data.len(), data.pieces().len()), (246, 3));
        let bytes: Vec<u8> = (0..246).map(|i| i as u8).collect();
        data.copy_in(0, &bytes[..100]).expect("there");
        data.copy_in(100, &bytes[100..]).expect("there");
        let mut back = vec![0; 246];
        data.copy_out(&mut back).expect("there");
        assert_eq!(back, bytes);
        let mut middle = [0; 50];
        SharedData::new(&regions, &[piece(3, 10, 50)]).expect("there").copy_out(&mut middle).expect("there");
        assert_eq!(middle, bytes[96..146]);
    }

    #[test]
    fn pieces_outside_are_refused_and_numbers_are_used_once() {
        let regions = regions();
        for outside in [piece(4, 0, 1), piece(7, 4096, 1), piece(7, u64::MAX, 2), piece(9, 0, 101)] {
            assert_eq!(SharedData::new(&regions, &[outside]).err(), Some(NotShared(outside)));
        }
        let memory = || SharedMemory::create("region", 10).expect("creates");
        assert!(regions.with(9, memory()).is_none() && regions.with(8, memory()).is_none());
        let fewer = regions.without(7).expect("is there");
        assert!(
            !fewer.has(7) && fewer.has(9) && fewer.without(7).is_none() && fewer.with(7, memory()).is_none()
        );
        assert_eq!(fewer.iter().map(|(number, _)| number).collect::<Vec<_>>(), [3, 9]);
    }
}
