//! The area: memory that the gateway maps too, in which the data of NBD clients' requests lies.
//!
//! One for each link of an export, made by [`volume`](crate::volume). A request that carries data takes a [`Buffer`] of it when it is
//! accepted; a write's data is received into it, the gateway's answer to a read is sent from it, and the link names its
//! [`pieces`](Buffer::pieces), so that neither nebd nor a replay copies anything. Modules: [`pages`] says what is free.
//!
//! The gateway may write to it at any time: nobody makes a reference to its bytes, they go to and come from sockets by
//! [`vectored`](crate::vectored) or are copied (`guest_cannot_crash_us`). `bounded`: it is as large as the budget of all clients, which
//! counts in the same pages; memory that was never used, or was given back by [`rest`](Area::rest), is not there.
//!
//! `no_late_duplicate`: a gateway that has lost its link may go on for a moment and put a read's data where it was told to. So
//! no pages of an area are handed out anew once a link that knew it is gone: it is [retired](Area::retire).

pub mod pages;

use pages::{PAGE_BYTES, Pages, RUNS_MAX, Run, Runs};
use rustix::fs::{FallocateFlags, fallocate};
use spline_link::memory::{MemoryError, SharedMemory};
use spline_link::ring::{PIECES_MAX, Piece};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

// A request can name every buffer.
const _: () = assert!(RUNS_MAX <= PIECES_MAX);

/// Bytes that data of `length` bytes takes: whole pages.
pub const fn page_bytes(length: u64) -> u64 {
    length.next_multiple_of(PAGE_BYTES as u64)
}

/// The area. Belongs to one thread.
#[derive(Debug)]
pub struct Area {
    memory: SharedMemory,
    pages: RefCell<Pages>,
    /// Somebody found no room.
    starved: Cell<bool>,
    /// Since then pages have become free.
    relieved: Cell<bool>,
    retired: Cell<bool>,
}

impl Area {
    /// An area of `bytes` bytes, all zero, none of them in memory yet.
    ///
    /// # Errors
    /// If there is no descriptor or address space left.
    pub fn create(bytes: u64) -> Result<Rc<Self>, MemoryError> {
        let count = bytes as usize / PAGE_BYTES;
        Ok(Rc::new(Self {
            memory: SharedMemory::create("spline-area", count * PAGE_BYTES)?,
            pages: RefCell::new(Pages::new(count)),
            starved: Cell::new(false),
            relieved: Cell::new(false),
            retired: Cell::new(false),
        }))
    }

    /// What the gateway is to map.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Room for `length` bytes, at least one; what is in it is anything. `None` if there is none now: the budget admits no more
    /// than there is, so only data of more than 4 MiB can find it cut into too many parts.
    pub fn take(self: &Rc<Self>, length: usize) -> Option<Buffer> {
        let runs = self.pages.borrow_mut().take(length.div_ceil(PAGE_BYTES));
        self.starved.set(self.starved.get() || runs.is_none());
        Some(Buffer { area: Rc::clone(self), runs: runs?, length })
    }

    /// Whether pages have become free since somebody found no room; once.
    pub fn is_relieved(&self) -> bool {
        self.relieved.take()
    }

    /// Gives the memory of free pages back to the system.
    pub fn rest(&self) {
        let runs = self.pages.borrow_mut().cool();
        runs.into_iter().for_each(|run| self.give_back(run));
    }

    /// Nothing is taken from it any more; pages go back to the system as they become free.
    pub fn retire(&self) {
        self.retired.set(true);
        self.rest();
    }

    fn give_back(&self, run: Run) {
        let (at, bytes) = ((run.first * PAGE_BYTES) as u64, (run.count * PAGE_BYTES) as u64);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(error) = fallocate(self.memory.fd(), flags, self.memory.offset() + at, bytes) {
            tracing::debug!(%error, "free memory of an area stays");
        }
    }

    fn free(&self, runs: &Runs) {
        for run in runs.as_slice() {
            self.pages.borrow_mut().give(*run);
            if self.retired.get() {
                self.give_back(*run);
            }
        }
        if self.starved.take() {
            self.relieved.set(true);
        }
    }
}

/// The data of one request. Its pages are free again when it goes.
#[derive(Debug)]
pub struct Buffer {
    area: Rc<Area>,
    runs: Runs,
    length: usize,
}

impl Buffer {
    /// Bytes of data.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Bytes of memory.
    pub fn held(&self) -> usize {
        page_bytes(self.length as u64) as usize
    }

    /// Where it lies.
    pub fn area(&self) -> &Rc<Area> {
        &self.area
    }

    /// Appends what names it in a request, its area being region number `region`.
    pub fn pieces(&self, region: u32, pieces: &mut Vec<Piece>) {
        let places = self.places(0..self.length);
        pieces.extend(places.map(|(offset, length)| Piece { region, length: length as u32, offset }));
    }

    /// Where bytes of it lie in the area, in their order: offset and length, bytes. A range that leaves it is cut.
    fn places(&self, part: Range<usize>) -> impl Iterator<Item = (u64, usize)> {
        let mut skip = part.start;
        let mut left = part.end.min(self.length).saturating_sub(part.start);
        self.runs.as_slice().iter().filter_map(move |run| {
            let bytes = run.count * PAGE_BYTES;
            let at = skip.min(bytes);
            let length = left.min(bytes - at);
            (skip, left) = (skip - at, left - length);
            (length > 0).then(|| ((run.first * PAGE_BYTES + at) as u64, length))
        })
    }

    /// Bytes of it in memory, for system calls only.
    pub(crate) fn pointers(&self, part: Range<usize>) -> impl Iterator<Item = (*mut u8, usize)> {
        self.places(part).filter_map(|(at, length)| Some((self.area.memory.pointer(at, length)?, length)))
    }

    /// Copies `bytes` in at `at`; what does not fit is left out.
    pub fn write(&self, at: usize, mut bytes: &[u8]) {
        for (offset, length) in self.places(at..at.saturating_add(bytes.len())) {
            let (front, rest) = bytes.split_at(length);
            bytes = rest;
            // An area is sealed and the place lies in it: it can not vanish.
            let written = self.area.memory.write(offset, front);
            debug_assert_eq!(written, Ok(()));
        }
    }

    /// Copies the bytes at `at` out; behind the end `into` stays as it is.
    pub fn read(&self, at: usize, mut into: &mut [u8]) {
        for (offset, length) in self.places(at..at.saturating_add(into.len())) {
            let (front, rest) = into.split_at_mut(length);
            into = rest;
            let read = self.area.memory.read(offset, front);
            debug_assert_eq!(read, Ok(()));
        }
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        self.read(0, &mut bytes);
        bytes
    }
}

/// Buffers are equal if their bytes are, wherever they lie.
impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        self.to_vec() == other.to_vec()
    }
}

impl Eq for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.area.free(&self.runs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that the area takes of the system's memory.
    fn resident(area: &Area) -> u64 {
        rustix::fs::fstat(area.memory.fd()).expect("stats").st_blocks as u64 * 512
    }

    /// An area whose free pages are no two beside each other.
    fn holey(pages: usize) -> (Rc<Area>, Vec<Buffer>) {
        let area = Area::create((pages * PAGE_BYTES) as u64).expect("creates");
        let all: Vec<Buffer> = (0..pages).map(|_| area.take(1).expect("fits")).collect();
        let kept = all.into_iter().enumerate().filter(|(at, _)| at % 2 == 0).map(|(_, buffer)| buffer);
        (Rc::clone(&area), kept.collect())
    }

    #[test]
    fn bytes_come_back_wherever_a_buffer_s_pages_lie() {
        let (area, _kept) = holey(16);
        let buffer = area.take(5 * PAGE_BYTES - 100).expect("fits");
        let bytes: Vec<u8> = (0..buffer.length()).map(|at| (at * 7 % 251) as u8).collect();
        for (at, end) in [(0, 4095), (4095, 4097), (4097, 12_288), (12_288, bytes.len())] {
            buffer.write(at, &bytes[at..end]);
        }
        assert!(buffer.to_vec() == bytes);
        let mut part = vec![0; 9000];
        buffer.read(4000, &mut part);
        assert!(part == bytes[4000..13_000]);
        buffer.write(bytes.len() - 1, &[1, 2, 3]);
        assert_eq!(buffer.to_vec()[bytes.len() - 1], 1);
        let mut pieces = Vec::new();
        buffer.pieces(7, &mut pieces);
        assert_eq!((pieces.len(), pieces[0]), (5, Piece { region: 7, length: 4096, offset: 4096 }));
        assert_eq!(pieces.iter().map(|piece| piece.length as usize).sum::<usize>(), buffer.length());
    }

    #[test]
    fn whoever_found_no_room_is_told_when_there_is_some() {
        let area = Area::create(2 * PAGE_BYTES as u64).expect("creates");
        let (one, two) = (area.take(1).expect("fits"), area.take(PAGE_BYTES).expect("fits"));
        drop(one);
        assert!(!area.is_relieved(), "nobody waits");
        assert!(area.take(PAGE_BYTES + 1).is_none());
        assert!(!area.is_relieved());
        drop(two);
        assert!(area.is_relieved() && !area.is_relieved());
        assert_eq!(area.take(PAGE_BYTES + 1).map(|buffer| buffer.held()), Some(2 * PAGE_BYTES));
    }

    #[test]
    fn memory_is_there_while_it_is_used() {
        let area = Area::create(64 << 20).expect("creates");
        assert_eq!(resident(&area), 0);
        let (kept, used) = (area.take(1 << 20).expect("fits"), area.take(8 << 20).expect("fits"));
        kept.write(0, &vec![1; 1 << 20]);
        used.write(0, &vec![2; 8 << 20]);
        assert_eq!(resident(&area), 9 << 20);
        drop(used);
        area.rest();
        assert_eq!(resident(&area), 1 << 20);
        assert_eq!(kept.to_vec(), vec![1; 1 << 20]);
        area.retire();
        drop(kept);
        assert_eq!(resident(&area), 0);
    }
}
