//! The memory that the data of all clients may take together: what is open, what is coming in, what they do not read.
//!
//! Called by the event loop and the connections. Pure. Must not know: sockets, requests.
//!
//! `bounded`: every client may have [`SHARE_BYTES`] whatever the others do; more comes out of [`BUDGET_BYTES`], in the
//! order in which it was asked for. So nobody who holds much keeps small requests of others from going on, and large ones
//! wait at most until the event loop has cut whoever holds his share's surplus and takes nothing.

use crate::nbd::connection::ConnectionId;
use spline_types::limits::VOLUME_INFLIGHT_BYTES;
use std::collections::VecDeque;

/// Bytes for all clients together, shares included: as much as the volume may have in flight, so that one busy client
/// keeps the link full.
pub const BUDGET_BYTES: u64 = VOLUME_INFLIGHT_BYTES;
/// Bytes that a client may have even if the budget is used up: a deep queue of small requests.
pub const SHARE_BYTES: u64 = 1 << 20;

/// The budget.
#[derive(Debug)]
pub struct Budget {
    spare: u64,
    /// Clients with a request that did not fit, the longest waiting first.
    waiting: VecDeque<ConnectionId>,
}

impl Default for Budget {
    fn default() -> Self {
        Self { spare: BUDGET_BYTES, waiting: VecDeque::new() }
    }
}

impl Budget {
    /// Bytes that a client, which holds `held`, may take on top of them.
    pub fn room(&self, id: ConnectionId, held: u64) -> u64 {
        let share = SHARE_BYTES.saturating_sub(held);
        match self.waiting.front() {
            Some(first) if *first != id => share,
            _ => share.max(self.spare),
        }
    }

    /// A client took `bytes` more.
    pub fn took(&mut self, bytes: u64) {
        self.spare = self.spare.saturating_sub(bytes);
    }

    /// A client's request did not fit: nobody takes more than his share before it.
    pub fn wait(&mut self, id: ConnectionId) {
        if !self.waiting.contains(&id) {
            self.waiting.push_back(id);
        }
    }

    /// A client waits no more: its request fitted, or it is gone.
    pub fn leave(&mut self, id: ConnectionId) {
        if !self.waiting.is_empty() {
            self.waiting.retain(|waiting| *waiting != id);
        }
    }

    /// Whether a request waits for others to let go.
    pub fn is_short(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// All clients together hold `held` now. Answers whether there is more to take than before, and someone waits for it.
    pub fn settle(&mut self, held: u64) -> bool {
        let spare = BUDGET_BYTES.saturating_sub(held);
        let more = spare > self.spare;
        self.spare = spare;
        more && self.is_short()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ConnectionId = ConnectionId(1);
    const B: ConnectionId = ConnectionId(2);
    const C: ConnectionId = ConnectionId(3);

    #[test]
    fn everyone_has_a_share_and_the_rest_goes_to_whoever_waits_longest() {
        let mut budget = Budget::default();
        assert_eq!(budget.room(A, 0), BUDGET_BYTES);
        budget.took(BUDGET_BYTES - 100);
        assert_eq!((budget.room(A, BUDGET_BYTES - 100), budget.room(B, SHARE_BYTES)), (100, 100));
        assert_eq!((budget.room(C, 0), budget.room(C, SHARE_BYTES - 7)), (SHARE_BYTES, 100));
        budget.wait(B);
        budget.wait(C);
        budget.wait(B);
        assert_eq!(budget.room(C, SHARE_BYTES - 7), 7, "B comes first");
        assert!(budget.settle(0) && !budget.settle(0), "told once");
        assert_eq!((budget.room(B, 0), budget.room(C, 0)), (BUDGET_BYTES, SHARE_BYTES));
        budget.leave(B);
        assert_eq!(budget.room(C, 0), BUDGET_BYTES);
        budget.leave(C);
        assert!(!budget.is_short() && !budget.settle(BUDGET_BYTES + 1));
        assert_eq!(budget.room(A, SHARE_BYTES + 1), 0);
    }
}
