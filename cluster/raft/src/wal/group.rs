//! One group's part of the log, twice: what readers see ([`View`], changed when a record is queued) and what must stay on
//! the disk ([`Footprint`], changed when a record is durable).
//!
//! Called by the log's state and by recovery. Pure: knows no file, no lock, no queue.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;

use super::config::{GroupLog, WalEntry};

/// Memory of a cached entry beside its bytes.
const SLOT_COST: u64 = 128;

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    /// Generation of the segment.
    pub(super) generation: u64,
    /// Byte offset in the segment file.
    pub(super) offset: u32,
    /// Bytes of the record.
    pub(super) length: u32,
}

/// One entry as readers find it: in memory, on disk, or both; never neither.
#[derive(Debug)]
pub(super) struct Slot {
    /// Unique per append: tells an entry from a later one of the same index.
    pub(super) stamp: u64,
    pub(super) location: Option<Location>,
    pub(super) cached: Option<WalEntry>,
}

impl Slot {
    fn cost(&self) -> u64 {
        self.cached.as_ref().map_or(0, cost)
    }
}

/// Bytes of memory a cached entry counts for.
pub(super) fn cost(entry: &WalEntry) -> u64 {
    (entry.header.len() + entry.command.bytes()) as u64 + SLOT_COST
}

/// What readers see of a group. Entries are contiguous from `first`.
#[derive(Debug, Default)]
pub(super) struct View {
    first: u64,
    slots: VecDeque<Slot>,
    purged: Option<(u64, Bytes)>,
    vote: Option<Bytes>,
}

impl View {
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    pub(super) fn next(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    pub(super) fn purged(&self) -> Option<&(u64, Bytes)> {
        self.purged.as_ref()
    }

    pub(super) fn vote(&self) -> Option<&Bytes> {
        self.vote.as_ref()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.purged.is_none() && self.vote.is_none()
    }

    pub(super) fn log(&self) -> GroupLog {
        GroupLog {
            vote: self.vote.clone(),
            purged: self.purged.clone(),
            first: self.first,
            next: self.next(),
        }
    }

    /// Index and bytes of every entry, in order.
    pub(super) fn lengths(&self) -> Vec<(u64, u64)> {
        let bytes = |slot: &Slot| slot.location.map_or(slot.cost(), |location| location.length.into());
        (self.first..).zip(self.slots.iter().map(bytes)).collect()
    }

    pub(super) fn slot(&self, index: u64) -> Option<&Slot> {
        self.slots.get(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    pub(super) fn slot_mut(&mut self, index: u64) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    /// Whether an entry of this index may follow. A log that holds nothing and purged nothing may start anywhere.
    pub(super) fn accepts(&self, index: u64) -> Result<(), io::Error> {
        let free = self.slots.is_empty() && self.purged.is_none();
        if index == self.next() || free {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("entry does not continue the log, index={index} expected={}", self.next()),
        ))
    }

    /// Adds an entry that [`View::accepts`].
    pub(super) fn push(&mut self, index: u64, slot: Slot) {
        if self.slots.is_empty() {
            self.first = index;
        }
        debug_assert_eq!(index, self.next());
        self.slots.push_back(slot);
    }

    /// Recovery's push: an entry that does not continue the log starts it anew. That happens when the entries between
    /// were truncated and their segment recycled; a later record then voids this one, else [`View::settle`] objects.
    pub(super) fn replay(&mut self, index: u64, slot: Slot) {
        if index != self.next() {
            self.slots.clear();
        }
        self.push(index, slot);
    }

    /// Ends recovery: false if entries are missing between the purge and the first one.
    pub(super) fn settle(&mut self) -> bool {
        let floor = self.purged.as_ref().map(|(upto, _)| upto + 1);
        if self.slots.is_empty() {
            self.first = floor.unwrap_or(0);
        }
        floor.is_none_or(|floor| floor == self.first)
    }

    pub(super) fn set_vote(&mut self, vote: Bytes) {
        self.vote = Some(vote);
    }

    /// Drops entries from `first_removed` on; returns the cache bytes set free.
    pub(super) fn truncate(&mut self, first_removed: u64) -> u64 {
        let keep = first_removed.saturating_sub(self.first).min(self.slots.len() as u64) as usize;
        if keep == 0 {
            let floor = self.purged.as_ref().map_or(0, |(upto, _)| upto + 1);
            self.first = self.first.min(first_removed).max(floor);
        }
        self.slots.drain(keep..).map(|slot| slot.cost()).sum()
    }

    /// Drops entries up to and including `upto`; returns the cache bytes set free. A purge older than the latest is void.
    pub(super) fn purge(&mut self, upto: u64, state: Bytes) -> u64 {
        if self.purged.as_ref().is_some_and(|(latest, _)| *latest > upto) {
            return 0;
        }
        let count = (upto + 1).saturating_sub(self.first).min(self.slots.len() as u64) as usize;
        let freed = self.slots.drain(..count).map(|slot| slot.cost()).sum();
        self.first = if self.slots.is_empty() { upto + 1 } else { self.first + count as u64 };
        self.purged = Some((upto, state));
        freed
    }

    /// Forgets everything; returns the cache bytes set free.
    pub(super) fn clear(&mut self) -> u64 {
        let freed = self.truncate(0);
        *self = View::default();
        freed
    }
}

/// Entries of a group in one segment.
#[derive(Clone, Copy, Debug)]
struct Held {
    generation: u64,
    highest: u64,
}

/// Which segments a group needs: an entry holds its segment until it is purged, the latest vote and purge state hold
/// theirs until they are written again.
#[derive(Debug, Default)]
pub(super) struct Footprint {
    held: VecDeque<Held>,
    vote_at: Option<u64>,
    purged_at: Option<u64>,
    /// Entries below this are purged, durably.
    needed_from: u64,
    /// A copy of the vote waits in the queue to be written to a newer segment.
    pub(super) carrying_vote: bool,
    /// The same for the purge state.
    pub(super) carrying_purge: bool,
}

impl Footprint {
    pub(super) fn entry(&mut self, index: u64, generation: u64) {
        match self.held.back_mut() {
            Some(last) if last.generation == generation => last.highest = index,
            _ => self.held.push_back(Held { generation, highest: index }),
        }
    }

    pub(super) fn vote(&mut self, generation: u64) {
        self.vote_at = Some(generation);
        self.carrying_vote = false;
    }

    /// A purge older than the latest is void here too: the segment of the latest stays needed.
    pub(super) fn purge(&mut self, upto: u64, generation: u64) {
        if upto + 1 < self.needed_from {
            return;
        }
        self.purged_at = Some(generation);
        self.carrying_purge = false;
        self.needed_from = upto + 1;
        self.let_go();
    }

    fn let_go(&mut self) {
        while self.held.front().is_some_and(|held| held.highest < self.needed_from) {
            self.held.pop_front();
        }
    }

    /// A segment whose entries were all truncated stays held until the purge passes what is left before them: recycling
    /// is by age, so the record of the truncation outlives the entries it voids.
    pub(super) fn truncate(&mut self, first_removed: u64) {
        match first_removed.checked_sub(1) {
            None => self.held.clear(),
            Some(last) => self.held.iter_mut().for_each(|held| held.highest = held.highest.min(last)),
        }
        self.let_go();
    }

    pub(super) fn remove(&mut self) {
        *self = Footprint::default();
    }

    /// Oldest segment held by entries.
    pub(super) fn entries_floor(&self) -> Option<u64> {
        self.held.front().map(|held| held.generation)
    }

    /// Oldest segment held by anything.
    pub(super) fn floor(&self) -> Option<u64> {
        [self.entries_floor(), self.vote_at, self.purged_at].into_iter().flatten().min()
    }

    /// Whether the latest vote lies in a segment older than `generation` and no copy is on its way.
    pub(super) fn vote_lags(&self, generation: u64) -> bool {
        !self.carrying_vote && self.vote_at.is_some_and(|at| at < generation)
    }

    /// The same for the purge state.
    pub(super) fn purge_lags(&self, generation: u64) -> bool {
        !self.carrying_purge && self.purged_at.is_some_and(|at| at < generation)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.floor().is_none()
    }
}

/// A group: both sides.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) view: View,
    pub(super) footprint: Footprint,
    /// Records in the queue: the group is not forgotten before they are written.
    pub(super) queued: u64,
}

impl Group {
    pub(super) fn is_empty(&self) -> bool {
        self.queued == 0 && self.view.is_empty() && self.footprint.is_empty()
    }
}
