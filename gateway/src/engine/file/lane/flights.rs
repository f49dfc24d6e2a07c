//! The requests of a lane that are under way: what of each is done, and what the kernel is to do next.
//!
//! Called by the lane and its reaper. Must not know: rings, tasks.

use super::super::overlap::LaneClaim;
use super::super::uring::{BUFFERED, DIRECT};
use crate::shared::{RawPiece, SharedData};
use io_uring::{opcode, squeue, types};
use rustix::io::{Errno, ReadWriteFlags};

/// Most pieces of one operation (IOV_MAX); what is left is the next one's.
const PIECES_MAX: usize = 1024;
/// Zeros for what lies behind the end of a file, in pieces of this many bytes.
static ZEROS: [u8; 65_536] = [0; 65_536];

/// What a flight does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Read,
    Write {
        /// Before it is answered.
        durable: bool,
    },
    Sync,
}

/// One request under way.
pub(super) struct Flight {
    pub(super) ticket: u32,
    pub(super) kind: Kind,
    /// Past the page cache: offset, length and memory are aligned.
    pub(super) direct: bool,
    /// Where, bytes of the file.
    pub(super) offset: u64,
    pub(super) claim: LaneClaim,
    /// As long as the range; nothing of a sync.
    pub(super) data: SharedData,
    /// Bytes done.
    moved: usize,
    /// The pieces that are left, when some are done.
    rest: Vec<RawPiece>,
}

/// A flight that has ended; its memory is not the kernel's any more.
pub(super) struct Landed {
    pub(super) ticket: u32,
    pub(super) kind: Kind,
    pub(super) claim: LaneClaim,
    pub(super) result: Result<(), Errno>,
}

/// What becomes of a flight that the kernel has answered.
#[derive(PartialEq, Eq, Debug)]
enum Next {
    /// The rest is to be done.
    Again,
    Ended(Result<(), Errno>),
}

/// What [`Flights::land`] made of an answer.
pub(super) enum Outcome {
    Landed(Landed),
    /// The rest of the flight is to be submitted.
    Again,
    /// There is no such flight.
    Unknown,
}

/// All flights of one lane, by slot.
#[derive(Default)]
pub(super) struct Flights {
    /// Never grows beyond what was allocated at first: a flight does not move, because the kernel reads its vector.
    slots: Vec<Option<Flight>>,
    free: Vec<u32>,
}

impl Flight {
    pub(super) fn new(ticket: u32, kind: Kind, offset: u64, claim: LaneClaim, data: SharedData) -> Self {
        Self { ticket, kind, direct: false, offset, claim, data, moved: 0, rest: Vec::new() }
    }

    /// The operation for what is left. Its memory, and its vector, are the flight's: neither must move before it is submitted,
    /// nor the memory be freed before it is answered.
    fn entry(&mut self) -> squeue::Entry {
        // The rest of a short direct transfer may be unaligned.
        let fd = types::Fixed(if self.direct && self.moved == 0 { DIRECT } else { BUFFERED });
        let at = self.offset + self.moved as u64;
        let pieces = match self.moved {
            0 => self.data.pieces(),
            moved => {
                self.rest.clear();
                self.rest.extend(behind(self.data.pieces(), moved));
                &self.rest
            }
        };
        let count = pieces.len().min(PIECES_MAX) as u32;
        match (self.kind, pieces) {
            (Kind::Sync, _) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            (Kind::Read, [piece]) => opcode::Read::new(fd, piece.start, piece.len as u32).offset(at).build(),
            (Kind::Read, pieces) => opcode::Readv::new(fd, pieces.as_ptr().cast(), count).offset(at).build(),
            (Kind::Write { durable }, [piece]) => {
                let flags = write_flags(durable);
                opcode::Write::new(fd, piece.start, piece.len as u32).offset(at).rw_flags(flags).build()
            }
            (Kind::Write { durable }, pieces) => {
                let flags = write_flags(durable);
                opcode::Writev::new(fd, pieces.as_ptr().cast(), count).offset(at).rw_flags(flags).build()
            }
        }
    }

    /// What the kernel's answer means: a count of bytes, or an error below zero.
    fn next(&mut self, answer: i32) -> Next {
        let Ok(step) = usize::try_from(answer) else {
            return match Errno::from_raw_os_error(-answer) {
                Errno::INTR | Errno::AGAIN => Next::Again,
                error => Next::Ended(Err(error)),
            };
        };
        self.moved += step;
        if self.kind == Kind::Sync || self.moved >= self.data.len() {
            return Next::Ended(Ok(()));
        }
        match (step, self.kind) {
            (0, Kind::Read) => Next::Ended(self.zero_rest()),
            (0, _) => Next::Ended(Err(Errno::IO)),
            _ => Next::Again,
        }
    }

    /// A read has met the end of the file: what is left is zeros.
    fn zero_rest(&self) -> Result<(), Errno> {
        let mut at = self.moved;
        while at < self.data.len() {
            let zeros = &ZEROS[..ZEROS.len().min(self.data.len() - at)];
            self.data.copy_in(at, zeros).map_err(|_| Errno::FAULT)?;
            at += zeros.len();
        }
        Ok(())
    }
}

fn write_flags(durable: bool) -> i32 {
    if durable { ReadWriteFlags::DSYNC.bits() as i32 } else { 0 }
}

/// The pieces behind the first `skip` bytes.
fn behind(pieces: &[RawPiece], skip: usize) -> impl Iterator<Item = RawPiece> + '_ {
    let mut skip = skip;
    pieces.iter().filter_map(move |piece| {
        let gone = skip.min(piece.len);
        skip -= gone;
        (gone < piece.len).then(|| RawPiece { start: piece.start.wrapping_add(gone), len: piece.len - gone })
    })
}

impl Flights {
    /// Room for `most`.
    pub(super) fn new(most: usize) -> Self {
        Self { slots: Vec::with_capacity(most), free: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty() && self.slots.len() == self.slots.capacity()
    }

    /// Adds a flight where there is room; answers its slot.
    pub(super) fn add(&mut self, flight: Flight) -> u32 {
        match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = Some(flight);
                slot
            }
            None => {
                assert!(!self.is_full(), "a lane that is full takes no more");
                self.slots.push(Some(flight));
                self.slots.len() as u32 - 1
            }
        }
    }

    /// The operation for what is left of a flight that is there.
    pub(super) fn entry(&mut self, slot: u32) -> squeue::Entry {
        let flight = self.slots[slot as usize].as_mut().expect("what is to be done is under way");
        flight.entry().user_data(u64::from(slot))
    }

    /// Takes an answer of the kernel.
    pub(super) fn land(&mut self, slot: u32, answer: i32) -> Outcome {
        let Some(flight) = self.slots.get_mut(slot as usize).and_then(Option::as_mut) else {
            return Outcome::Unknown;
        };
        match flight.next(answer) {
            Next::Again => Outcome::Again,
            Next::Ended(result) => self.remove(slot, result).map_or(Outcome::Unknown, Outcome::Landed),
        }
    }

    /// Takes a flight out that the kernel does not have, or will not go on with.
    pub(super) fn remove(&mut self, slot: u32, result: Result<(), Errno>) -> Option<Landed> {
        let Flight { ticket, kind, claim, .. } = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        Some(Landed { ticket, kind, claim, result })
    }

    /// Tickets of all.
    pub(super) fn tickets(&self) -> impl Iterator<Item = u32> + '_ {
        self.slots.iter().flatten().map(|flight| flight.ticket)
    }
}
