//! The ring of a link: requests and their completions in memory that nebd and the gateway share.
//!
//! Called by nebd's link ([`NebdEnd`]) and the gateway's ([`GatewayEnd`]), each by one thread or task. Pure: it reads and writes
//! cells; who rings a bell or waits for one is told by the answers of `publish` and `sleep`. [`shared`] puts it into a memfd.
//! The payload is not in it: a request names [`Piece`]s of regions that both sides have mapped.
//!
//! Layout, in cells of eight bytes, little-endian, 64-byte lines: cell 0 magic and version, cell 1 numbers of places; then, each in
//! a line of its own, `submitted` (nebd counts requests), `taken` (gateway), `answered` (gateway counts completions), `heard`
//! (nebd), `gateway_sleeps` and in the next cell `gateway_processor` (0, or one more than the number of the processor on which the
//! gateway stays), `nebd_sleeps`; from byte 4096 the requests, eight cells each (id | op u8, flags u8, zero u16,
//! pieces u32 | offset | length | two pieces, or where more of them begin among the pieces), then the completions, two cells each
//! (id | status u16, zero u16, payload u32), then the pieces, two cells each (region u32, length u32 | offset). Counters only
//! grow; a place is its number modulo the places there are.
//!
//! `guest_cannot_crash_us`: every cell of the other side is read once, then checked, then used; its counters are never more than
//! a claim. `bounded`: [`ENTRIES`] requests are unanswered at most, [`PIECES`] pieces not taken. Bells: a side that is about to wait
//! says so first and looks once more; whoever has published looks whether the other side waits, with a fence in between, so
//! that one of them sees the other.

mod entry;
pub mod shared;
#[cfg(test)]
mod tests;

pub use entry::{Piece, RingAnswer};
pub use shared::{GatewayRing, NebdRing, RingError, RingFds};

use crate::error::LinkError;
use entry::{ANSWER_CELLS, PIECE_CELLS, PIECES_INLINE, SUBMISSION_CELLS};
use spline_types::BlockRequest;
use std::sync::atomic::Ordering;

/// Requests that may be unanswered on one link: as many as a volume may have in flight by default.
pub const ENTRIES: u64 = 1024;
/// Pieces of requests that the gateway has not taken yet, those apart that fit their request.
pub const PIECES: u64 = 8192;
/// Most pieces of one request: a virtqueue has at most 1024 descriptors.
pub const PIECES_MAX: usize = 1024;

/// "SPLR", and above it the version of the layout.
pub(crate) const MAGIC: u64 = u32::from_le_bytes(*b"SPLR") as u64 | (RingVersion::V1 as u64) << 32;

/// Versions of the layout, newest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum RingVersion {
    /// As the module says.
    V1 = 1,
}

const CELL_MAGIC: usize = 0;
const CELL_PLACES: usize = 1;
const CELL_SUBMITTED: usize = 8;
const CELL_TAKEN: usize = 16;
const CELL_ANSWERED: usize = 24;
const CELL_HEARD: usize = 32;
const CELL_GATEWAY_SLEEPS: usize = 40;
const CELL_GATEWAY_PROCESSOR: usize = 41;
const CELL_NEBD_SLEEPS: usize = 48;
const CELL_REQUESTS: usize = 512;

/// Memory in cells of eight bytes that both sides read and write.
pub trait Cells {
    /// Reads a cell.
    fn load(&self, cell: usize, order: Ordering) -> u64;
    /// Writes a cell.
    fn store(&self, cell: usize, value: u64, order: Ordering);
    /// A sequentially consistent fence.
    fn fence(&self);
}

/// How many places there are; powers of two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Places {
    /// Of requests, and of completions.
    pub entries: u64,
    /// Of pieces.
    pub pieces: u64,
}

impl Places {
    /// Those of every real ring.
    pub const REAL: Self = Self { entries: ENTRIES, pieces: PIECES };

    /// Bytes of a ring.
    pub const fn bytes(self) -> usize {
        8 * self.piece_cell(self.pieces - 1) + 16
    }

    const fn request_cell(self, number: u64) -> usize {
        CELL_REQUESTS + (number % self.entries) as usize * SUBMISSION_CELLS
    }

    const fn answer_cell(self, number: u64) -> usize {
        CELL_REQUESTS
            + self.entries as usize * SUBMISSION_CELLS
            + (number % self.entries) as usize * ANSWER_CELLS
    }

    const fn piece_cell(self, number: u64) -> usize {
        self.answer_cell(self.entries - 1) + ANSWER_CELLS + (number % self.pieces) as usize * PIECE_CELLS
    }

    const fn packed(self) -> u64 {
        self.entries | self.pieces << 32
    }
}

/// How far a gateway has come with a ring; another one goes on from there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Position {
    /// Requests taken.
    pub taken: u64,
    /// Completions answered.
    pub answered: u64,
}

/// nebd's end: submits requests, hears completions.
#[derive(Debug)]
pub struct NebdEnd<C> {
    cells: C,
    places: Places,
    /// Requests written, of which `shown` are published.
    submitted: u64,
    shown: u64,
    heard: u64,
    /// As last seen.
    answered: u64,
    /// Pieces written, and how many of them were taken when that was last looked at.
    pieces: u64,
    pieces_taken: u64,
    /// Up to where each unanswered request's pieces reach, by its place.
    pieces_until: Vec<u64>,
}

impl<C: Cells> NebdEnd<C> {
    /// A new ring in memory that is all zeros.
    pub fn new(cells: C, places: Places) -> Self {
        cells.store(CELL_PLACES, places.packed(), Ordering::Relaxed);
        cells.store(CELL_MAGIC, MAGIC, Ordering::Release);
        let pieces_until = vec![0; places.entries as usize];
        Self {
            cells,
            places,
            submitted: 0,
            shown: 0,
            heard: 0,
            answered: 0,
            pieces: 0,
            pieces_taken: 0,
            pieces_until,
        }
    }

    /// Whether a request of `pieces` pieces finds a place now.
    ///
    /// # Errors
    /// If the gateway's counter makes no sense.
    pub fn has_room(&mut self, pieces: usize) -> Result<bool, LinkError> {
        if self.submitted - self.heard >= self.places.entries {
            return Ok(false);
        }
        if pieces <= PIECES_INLINE || self.pieces_fit(pieces) {
            return Ok(true);
        }
        let taken = self.cells.load(CELL_TAKEN, Ordering::Acquire);
        if taken < self.heard || taken > self.shown {
            return Err(LinkError::Mismatch { field: "taken", value: taken });
        }
        if let Some(last) = taken.checked_sub(1) {
            // Its place is not used anew: then as many requests would be unanswered as there are places.
            self.pieces_taken = self.pieces_until[(last % self.places.entries) as usize];
        }
        Ok(self.pieces_fit(pieces))
    }

    fn pieces_fit(&self, more: usize) -> bool {
        self.pieces + more as u64 - self.pieces_taken <= self.places.pieces
    }

    /// Writes a request; the caller has asked [`has_room`](Self::has_room) for its pieces, of which there are at most
    /// [`PIECES_MAX`]. The gateway sees it when it is published.
    pub fn push(&mut self, request: &BlockRequest, pieces: &[Piece]) {
        let at = self.places.request_cell(self.submitted);
        let extra = pieces.len() > PIECES_INLINE;
        if extra {
            for (number, piece) in (self.pieces..).zip(pieces) {
                self.write(self.places.piece_cell(number), &piece.encode());
            }
        }
        self.write(at, &entry::encode(request, pieces, self.pieces));
        if extra {
            self.pieces += pieces.len() as u64;
        }
        self.pieces_until[(self.submitted % self.places.entries) as usize] = self.pieces;
        self.submitted += 1;
    }

    fn write(&self, at: usize, cells: &[u64]) {
        for (index, cell) in cells.iter().enumerate() {
            self.cells.store(at + index, cell.to_le(), Ordering::Relaxed);
        }
    }

    /// Whether anything was pushed that is not shown.
    pub fn has_to_publish(&self) -> bool {
        self.shown != self.submitted
    }

    /// Shows what was pushed. True if the gateway sleeps: its bell must be rung.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        if !self.has_to_publish() {
            return false;
        }
        self.shown = self.submitted;
        self.cells.store(CELL_SUBMITTED, self.submitted, Ordering::Release);
        must_ring(&self.cells, CELL_GATEWAY_SLEEPS)
    }

    /// The processor on which the gateway stays, if it says so: a claim, which names any number.
    pub fn gateway_processor(&self) -> Option<u32> {
        let value = self.cells.load(CELL_GATEWAY_PROCESSOR, Ordering::Relaxed);
        value.checked_sub(1).and_then(|number| u32::try_from(number).ok())
    }

    /// Requests without a completion that was heard, those not published included.
    pub fn unanswered(&self) -> u64 {
        self.submitted - self.heard
    }

    /// The next completion, if there is one.
    ///
    /// # Errors
    /// If the gateway wrote what makes no sense: the link is to be cut.
    pub fn pop(&mut self) -> Result<Option<RingAnswer>, LinkError> {
        if self.heard == self.answered && !self.look()? {
            return Ok(None);
        }
        let at = self.places.answer_cell(self.heard);
        let cells = [0, 1].map(|index| u64::from_le(self.cells.load(at + index, Ordering::Relaxed)));
        self.heard += 1;
        self.cells.store(CELL_HEARD, self.heard, Ordering::Release);
        entry::decode_answer(cells).map(Some)
    }

    /// Whether a completion is there.
    ///
    /// # Errors
    /// If the gateway's counter makes no sense.
    pub fn look(&mut self) -> Result<bool, LinkError> {
        let answered = self.cells.load(CELL_ANSWERED, Ordering::Acquire);
        if answered < self.heard || answered - self.heard > self.shown - self.heard {
            return Err(LinkError::Mismatch { field: "answered", value: answered });
        }
        self.answered = answered;
        Ok(answered != self.heard)
    }

    /// Says that nebd is about to wait for its bell. False if there is a completion: it must not.
    ///
    /// # Errors
    /// If the gateway's counter makes no sense.
    pub fn sleep(&mut self) -> Result<bool, LinkError> {
        self.cells.store(CELL_NEBD_SLEEPS, 1, Ordering::Relaxed);
        self.cells.fence();
        let there = self.look()?;
        if there {
            self.wake();
        }
        Ok(!there)
    }

    /// Says that nebd looks by itself: bells are not needed.
    pub fn wake(&mut self) {
        self.cells.store(CELL_NEBD_SLEEPS, 0, Ordering::Relaxed);
    }
}

/// The gateway's end: takes requests, answers them.
#[derive(Debug)]
pub struct GatewayEnd<C> {
    cells: C,
    places: Places,
    position: Position,
    /// Completions that are published.
    shown: u64,
    /// As last seen.
    submitted: u64,
    heard: u64,
    /// Requests seen whose place was not given back yet.
    given_back: u64,
}

impl<C: Cells> GatewayEnd<C> {
    /// Goes on with a ring that nebd made, from `position`.
    ///
    /// # Errors
    /// If it is not a ring of ours.
    pub fn new(cells: C, places: Places, position: Position) -> Result<Self, LinkError> {
        let magic = cells.load(CELL_MAGIC, Ordering::Acquire);
        if magic != MAGIC {
            return Err(LinkError::Mismatch { field: "ring_magic", value: magic });
        }
        let packed = cells.load(CELL_PLACES, Ordering::Relaxed);
        if packed != places.packed() {
            return Err(LinkError::Mismatch { field: "ring_places", value: packed });
        }
        if position.answered > position.taken || position.taken - position.answered > places.entries {
            return Err(LinkError::Mismatch { field: "ring_position", value: position.answered });
        }
        let Position { taken, answered } = position;
        Ok(Self { cells, places, position, shown: answered, submitted: taken, heard: 0, given_back: taken })
    }

    /// How far it has come.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The next request, if there is one; its pieces replace what is in `pieces`.
    ///
    /// # Errors
    /// If nebd wrote what makes no sense: the link is to be cut.
    pub fn pop(&mut self, pieces: &mut Vec<Piece>) -> Result<Option<BlockRequest>, LinkError> {
        if self.position.taken == self.submitted && !self.look()? {
            return Ok(None);
        }
        let at = self.places.request_cell(self.position.taken);
        let cells: [u64; SUBMISSION_CELLS] =
            std::array::from_fn(|index| u64::from_le(self.cells.load(at + index, Ordering::Relaxed)));
        let (request, listed) = entry::decode(&cells)?;
        pieces.clear();
        match listed {
            entry::Listed::Inline(inline, count) => pieces.extend_from_slice(&inline[..count]),
            entry::Listed::From(first, count) => {
                for number in 0..count as u64 {
                    let at = self.places.piece_cell(first.wrapping_add(number));
                    let cells = [0, 1].map(|i| u64::from_le(self.cells.load(at + i, Ordering::Relaxed)));
                    pieces.push(Piece::decode(cells));
                }
            }
        }
        entry::check(&request, pieces)?;
        self.position.taken += 1;
        Ok(Some(request))
    }

    /// Whether a request is there.
    ///
    /// # Errors
    /// If nebd's counter makes no sense.
    pub fn look(&mut self) -> Result<bool, LinkError> {
        let submitted = self.cells.load(CELL_SUBMITTED, Ordering::Acquire);
        let (taken, answered) = (self.position.taken, self.position.answered);
        // No more than there are places may be unanswered.
        if submitted < taken || submitted - answered > self.places.entries {
            return Err(LinkError::Mismatch { field: "submitted", value: submitted });
        }
        self.submitted = submitted;
        Ok(submitted != taken)
    }

    /// Writes a completion; nebd sees it when it is published.
    ///
    /// # Errors
    /// If nebd has not heard so many that there is no place: a nebd that counts rightly never has.
    pub fn push(&mut self, answer: &RingAnswer) -> Result<(), LinkError> {
        let answered = self.position.answered;
        if answered - self.heard >= self.places.entries {
            let heard = self.cells.load(CELL_HEARD, Ordering::Acquire);
            if heard > self.shown || answered - heard >= self.places.entries {
                return Err(LinkError::Mismatch { field: "heard", value: heard });
            }
            self.heard = heard;
        }
        let at = self.places.answer_cell(answered);
        for (index, cell) in answer.encode().into_iter().enumerate() {
            self.cells.store(at + index, cell.to_le(), Ordering::Relaxed);
        }
        self.position.answered += 1;
        Ok(())
    }

    /// Gives places of taken requests back and shows completions. True if nebd sleeps: its bell must be rung.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        if self.given_back != self.position.taken {
            self.given_back = self.position.taken;
            self.cells.store(CELL_TAKEN, self.given_back, Ordering::Release);
        }
        if self.shown == self.position.answered {
            return false;
        }
        self.shown = self.position.answered;
        self.cells.store(CELL_ANSWERED, self.shown, Ordering::Release);
        must_ring(&self.cells, CELL_NEBD_SLEEPS)
    }

    /// Tells nebd on which processor the gateway stays, if it does.
    pub fn tell_processor(&mut self, processor: Option<u32>) {
        let value = processor.map_or(0, |number| u64::from(number) + 1);
        self.cells.store(CELL_GATEWAY_PROCESSOR, value, Ordering::Relaxed);
    }

    /// Says that the gateway is about to wait for its bell. False if there is a request: it must not.
    ///
    /// # Errors
    /// If nebd's counter makes no sense.
    pub fn sleep(&mut self) -> Result<bool, LinkError> {
        self.cells.store(CELL_GATEWAY_SLEEPS, 1, Ordering::Relaxed);
        self.cells.fence();
        let there = self.look()?;
        if there {
            self.wake();
        }
        Ok(!there)
    }

    /// Says that the gateway looks by itself: bells are not needed.
    pub fn wake(&mut self) {
        self.cells.store(CELL_GATEWAY_SLEEPS, 0, Ordering::Relaxed);
    }
}

/// After something was published: whether the other side waits for its bell, which is then about to be rung.
fn must_ring(cells: &impl Cells, flag: usize) -> bool {
    cells.fence();
    let sleeps = cells.load(flag, Ordering::Relaxed) != 0;
    if sleeps {
        // The next to be published needs no second bell. A side that waits anew meanwhile hears this one.
        cells.store(flag, 0, Ordering::Relaxed);
    }
    sleeps
}
