//! Carries writes that meet out in the order in which they came, and keeps reads out of them. A client that has gone leaves
//! writes under way: whoever writes the same place next, and is answered, must not be overtaken by them
//! (`no_late_duplicate`). And the page cache reads and writes whole pages: a small buffered write that ran together with a
//! direct write of its page could put the page's old bytes back over the new ones.
//!
//! Called by the file engine ([`Overlaps::hold`], which waits) and its lanes ([`Overlaps::claim`], which does not). Order is
//! first come, first served where ranges meet; elsewhere nobody waits.

mod filter;
#[cfg(test)]
mod tests;

use crate::buffer::ALIGNMENT;
use filter::Filter;
use spline_types::ByteRange;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// The ranges of one file that are in use.
#[derive(Clone, Default)]
pub(super) struct Overlaps(Arc<Shared>);

#[derive(Default)]
struct Shared {
    table: Mutex<Table>,
    /// Notified when the last claim of a lane is given back, or will never be, after the close.
    lanes_ended: Condvar,
}

/// The right to use a range; given back when dropped.
pub(super) struct Hold {
    overlaps: Overlaps,
    slot: usize,
}

/// The right of a lane to use a range; to be given back by [`Overlaps::release`].
#[derive(PartialEq, Eq, Debug)]
#[must_use]
pub(super) struct LaneClaim(usize);

/// Whole pages, from first to last, and whether they are for one user alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Claim {
    first: u64,
    last: u64,
    alone: bool,
}

#[derive(Default)]
struct Table {
    held: Vec<Option<Claim>>,
    free: Vec<usize>,
    /// Tells most claims that nothing meets them without a look at `held`.
    filter: Filter,
    waiting: VecDeque<(Claim, oneshot::Sender<Hold>)>,
    /// How many of `held` are of lanes.
    lanes: usize,
    /// Lanes get no more claims.
    closed: bool,
    /// Claims of a lane will never be given back.
    stuck: bool,
}

/// Who may go on, with the slot.
type Granted = Vec<(oneshot::Sender<Hold>, usize)>;

impl Claim {
    /// Of no page: meets nothing.
    const NONE: Self = Self { first: u64::MAX, last: 0, alone: false };

    fn of(range: ByteRange, alone: bool) -> Self {
        if range.is_empty() {
            return Self::NONE;
        }
        let page = ALIGNMENT as u64;
        Self { first: range.offset() / page, last: (range.end() - 1) / page, alone }
    }

    const fn conflicts(&self, other: &Self) -> bool {
        (self.alone || other.alone) && self.first <= other.last && other.first <= self.last
    }
}

impl Table {
    fn is_free(&self, claim: &Claim) -> bool {
        self.filter.is_clear(claim) || !self.held.iter().flatten().any(|held| held.conflicts(claim))
    }

    /// Whether a claim that comes now may be taken at once.
    fn may_take(&self, claim: &Claim) -> bool {
        self.waiting.iter().all(|(earlier, _)| !earlier.conflicts(claim)) && self.is_free(claim)
    }

    fn take(&mut self, claim: Claim) -> usize {
        self.filter.add(&claim);
        match self.free.pop() {
            Some(slot) => {
                self.held[slot] = Some(claim);
                slot
            }
            None => {
                self.held.push(Some(claim));
                self.held.len() - 1
            }
        }
    }

    fn give_back(&mut self, slot: usize) {
        if let Some(claim) = self.held[slot].take() {
            self.filter.remove(&claim);
            self.free.push(slot);
        }
    }

    /// Who may go on now that something was given back.
    fn grant(&mut self) -> Granted {
        let mut granted = Vec::new();
        if self.waiting.is_empty() {
            return granted;
        }
        let mut still: VecDeque<(Claim, oneshot::Sender<Hold>)> = VecDeque::new();
        for (claim, ready) in std::mem::take(&mut self.waiting) {
            if self.is_free(&claim) && !still.iter().any(|(earlier, _)| earlier.conflicts(&claim)) {
                granted.push((ready, self.take(claim)));
            } else {
                still.push_back((claim, ready));
            }
        }
        self.waiting = still;
        granted
    }
}

impl Overlaps {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody who must be kept apart uses the range's pages.
    pub(super) async fn hold(&self, range: ByteRange, alone: bool) -> Hold {
        let claim = Claim::of(range, alone);
        let waiting = {
            let mut table = self.table();
            if table.may_take(&claim) {
                let slot = table.take(claim);
                return Hold { overlaps: self.clone(), slot };
            }
            let (ready, waiting) = oneshot::channel();
            table.waiting.push_back((claim, ready));
            waiting
        };
        waiting.await.expect("whoever waits is granted when the last conflicting hold is dropped")
    }

    /// The range's pages, if they can be had at once and the file is not closed; an empty range meets nobody.
    pub(super) fn claim(&self, range: ByteRange, alone: bool) -> Option<LaneClaim> {
        let claim = Claim::of(range, alone);
        let mut table = self.table();
        if table.closed || !table.may_take(&claim) {
            return None;
        }
        table.lanes += 1;
        Some(LaneClaim(table.take(claim)))
    }

    /// Gives claims back, with one look at the table.
    pub(super) fn release(&self, claims: impl Iterator<Item = LaneClaim>) {
        let mut table = self.table();
        for LaneClaim(slot) in claims {
            table.give_back(slot);
            table.lanes -= 1;
        }
        if table.closed && table.lanes == 0 {
            self.0.lanes_ended.notify_all();
        }
        let granted = table.grant();
        drop(table);
        self.tell(granted);
    }

    /// Lanes get no more claims; blocks until what they have is given back. False if some never will be.
    pub(super) fn close(&self) -> bool {
        let mut table = self.table();
        table.closed = true;
        while table.lanes > 0 && !table.stuck {
            table = self.0.lanes_ended.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
        !table.stuck
    }

    /// Claims will never be given back: nobody can tell when the kernel has ended what they are for.
    pub(super) fn abandon(&self) {
        self.table().stuck = true;
        self.0.lanes_ended.notify_all();
    }

    fn tell(&self, granted: Granted) {
        for (ready, slot) in granted {
            // Whoever does not wait any more drops the hold at once, which is why the table is not locked here.
            drop(ready.send(Hold { overlaps: self.clone(), slot }));
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut table = self.overlaps.table();
        table.give_back(self.slot);
        let granted = table.grant();
        drop(table);
        self.overlaps.tell(granted);
    }
}
