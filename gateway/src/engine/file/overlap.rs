//! Carries writes that meet out in the order in which they came, and keeps reads out of them. A client that has gone leaves
//! writes under way: whoever writes the same place next, and is answered, must not be overtaken by them
//! (`no_late_duplicate`). And the page cache reads and writes whole pages: a small buffered write that ran together with a
//! direct write of its page could put the page's old bytes back over the new ones.
//!
//! Called by the file engine. Order is first come, first served where ranges meet; elsewhere nobody waits.

use crate::buffer::ALIGNMENT;
use spline_types::ByteRange;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// The ranges of one file that are in use.
#[derive(Clone, Default)]
pub(super) struct Overlaps(Arc<Mutex<Table>>);

/// The right to use a range; given back when dropped.
pub(super) struct Hold {
    overlaps: Overlaps,
    slot: usize,
}

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
    /// How many of `held` are alone: with none, shared claims need not be compared.
    alone: usize,
    waiting: VecDeque<(Claim, oneshot::Sender<Hold>)>,
}

impl Claim {
    fn of(range: ByteRange, alone: bool) -> Self {
        let page = ALIGNMENT as u64;
        Self { first: range.offset() / page, last: range.end().saturating_sub(1) / page, alone }
    }

    const fn conflicts(&self, other: &Self) -> bool {
        (self.alone || other.alone) && self.first <= other.last && other.first <= self.last
    }
}

impl Table {
    fn is_free(&self, claim: &Claim) -> bool {
        let unheld = !claim.alone && self.alone == 0;
        unheld || !self.held.iter().flatten().any(|held| held.conflicts(claim))
    }

    fn take(&mut self, claim: Claim) -> usize {
        self.alone += usize::from(claim.alone);
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

    /// Gives a slot back; answers who may go on now, with their slots.
    fn release(&mut self, slot: usize) -> Vec<(oneshot::Sender<Hold>, usize)> {
        if let Some(claim) = self.held[slot].take() {
            self.alone -= usize::from(claim.alone);
            self.free.push(slot);
        }
        let mut granted = Vec::new();
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody who must be kept apart uses the range's pages.
    pub(super) async fn hold(&self, range: ByteRange, alone: bool) -> Hold {
        let claim = Claim::of(range, alone);
        let waiting = {
            let mut table = self.table();
            let first_come = table.waiting.iter().all(|(earlier, _)| !earlier.conflicts(&claim));
            if first_come && table.is_free(&claim) {
                let slot = table.take(claim);
                return Hold { overlaps: self.clone(), slot };
            }
            let (ready, waiting) = oneshot::channel();
            table.waiting.push_back((claim, ready));
            waiting
        };
        waiting.await.expect("whoever waits is granted when the last conflicting hold is dropped")
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let granted = self.overlaps.table().release(self.slot);
        for (ready, slot) in granted {
            // Whoever does not wait any more drops the hold at once, which is why the table is not locked here.
            drop(ready.send(Self { overlaps: self.overlaps.clone(), slot }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use proptest::prelude::*;

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange::new(offset, length).expect("fits")
    }

    #[test]
    fn neighbours_in_a_page_wait_and_others_do_not() {
        let overlaps = Overlaps::default();
        let direct = overlaps.hold(range(4096, 4096), false).now_or_never().expect("free");
        let also = overlaps.hold(range(4096, 4096), false).now_or_never().expect("shared");
        overlaps.hold(range(0, 512), true).now_or_never().expect("another page");
        let mut small = Box::pin(overlaps.hold(range(8191, 1), true));
        assert!((&mut small).now_or_never().is_none());
        let mut later = Box::pin(overlaps.hold(range(4096, 4096), false));
        assert!((&mut later).now_or_never().is_none(), "no overtaking");
        drop(direct);
        assert!((&mut small).now_or_never().is_none());
        drop(also);
        let small = small.now_or_never().expect("its turn");
        assert!((&mut later).now_or_never().is_none());
        drop(small);
        later.now_or_never().expect("its turn");
    }

    #[test]
    fn one_that_gives_up_waiting_blocks_nobody() {
        let overlaps = Overlaps::default();
        let first = overlaps.hold(range(0, 512), true).now_or_never().expect("free");
        let mut second = Box::pin(overlaps.hold(range(512, 512), true));
        let mut third = Box::pin(overlaps.hold(range(1024, 512), true));
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
        drop(second);
        drop(first);
        third.now_or_never().expect("its turn");
    }

    proptest! {
        #[test]
        fn holds_never_conflict_and_all_are_served(
            claims in prop::collection::vec((0u64..6, 1u64..3, any::<bool>()), 1..40),
            order in prop::collection::vec(any::<prop::sample::Index>(), 80),
        ) {
            let overlaps = Overlaps::default();
            let mut waiting: Vec<_> = claims
                .iter()
                .map(|(page, pages, alone)| overlaps.hold(range(page * 4096, pages * 4096), *alone).boxed())
                .collect();
            let mut held = Vec::new();
            let mut picks = order.iter();
            for _ in 0..=claims.len() {
                waiting.retain_mut(|hold| match hold.now_or_never() {
                    Some(hold) => { held.push(hold); false }
                    None => true,
                });
                let table = overlaps.table();
                let now: Vec<Claim> = table.held.iter().flatten().copied().collect();
                drop(table);
                for (at, claim) in now.iter().enumerate() {
                    prop_assert!(now[at + 1..].iter().all(|other| !other.conflicts(claim)));
                }
                if let (false, Some(pick)) = (held.is_empty(), picks.next()) {
                    let at = pick.index(held.len());
                    drop(held.swap_remove(at));
                }
            }
            held.clear();
            while !waiting.is_empty() {
                let before = waiting.len();
                waiting.retain_mut(|hold| hold.now_or_never().is_none());
                prop_assert!(waiting.len() < before, "somebody waits for ever");
            }
        }
    }
}
