//! How recently a majority has heard from this replica as leader: the clock under lease reads and read rounds.
//!
//! Told by `stream` and `beats` of every message that a peer has accepted, with the moment before it was sent; asked by
//! `member` and `group`.
//! openraft keeps such a clock too, but counts a message as accepted when a later-sent one is covered by the answer to
//! an earlier one; a leader would then read under a lease that nobody has granted.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::clock::Moment;
use crate::command::NodeId;
use crate::types::LeaderId;

/// One group's clock.
#[derive(Default)]
pub(crate) struct Acks {
    heard: Mutex<HashMap<NodeId, Heard>>,
    change: Notify,
    /// The newest term in which this replica, as leader, has begun to hand its leadership over; terms begin at 1.
    handed_over: AtomicU64,
}

/// A peer accepted a message of `leader` that was sent at `sent` or later.
#[derive(Clone, Copy)]
struct Heard {
    leader: LeaderId,
    sent: Moment,
}

impl Acks {
    fn heard(&self) -> MutexGuard<'_, HashMap<NodeId, Heard>> {
        // Entries are replaced whole.
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `peer` accepted a message of `leader` that was not sent before `sent`.
    pub(crate) fn note(&self, peer: NodeId, leader: LeaderId, sent: Moment) {
        let mut heard = self.heard();
        let newest = heard.entry(peer).or_insert(Heard { leader, sent });
        let rank = |leader: LeaderId| (leader.term, leader.node_id);
        if (rank(newest.leader), newest.sent) < (rank(leader), sent) {
            *newest = Heard { leader, sent };
        }
        drop(heard);
        self.change.notify_waiters();
    }

    /// From here on nothing is read under the lease of this replica's leadership of `term`: peers are about to be told
    /// that they may vote for another one.
    pub(crate) fn hand_over(&self, term: u64) {
        self.handed_over.fetch_max(term, Ordering::AcqRel);
    }

    /// Whether leadership of `term` is being handed over.
    pub(crate) fn is_handing_over(&self, term: u64) -> bool {
        self.handed_over.load(Ordering::Acquire) == term
    }

    /// Whether `peer` accepted a message of `leader` that was sent after `since`.
    pub(crate) fn is_fresh(&self, peer: NodeId, leader: LeaderId, since: Moment) -> bool {
        self.heard().get(&peer).is_some_and(|heard| heard.leader == leader && heard.sent > since)
    }

    /// The latest moment at which every one of `configs` (two while membership changes) had a majority that accepts
    /// `leader`, who is `me`; `None` if there was none yet, or if `me` is no longer in any: such a leader hands over
    /// without a word to this clock. `now` is when a node hears itself.
    pub(crate) fn quorum(
        &self,
        leader: LeaderId,
        me: NodeId,
        configs: &[BTreeSet<u64>],
        now: Moment,
    ) -> Option<Moment> {
        if !configs.iter().any(|voters| voters.contains(&me.0)) {
            return None;
        }
        let heard = self.heard();
        let sent = |node: &u64| match NodeId(*node) {
            node if node == me => Some(now),
            node => heard.get(&node).filter(|heard| heard.leader == leader).map(|heard| heard.sent),
        };
        let of_config = |voters: &BTreeSet<u64>| {
            let mut times: Vec<Moment> = voters.iter().filter_map(sent).collect();
            times.sort_unstable_by(|a, b| b.cmp(a));
            times.get(voters.len() / 2).copied()
        };
        configs.iter().map(of_config).min().flatten()
    }

    /// Ready when `is_so` holds; asked after every change.
    pub(crate) async fn until(&self, is_so: impl Fn() -> bool) {
        loop {
            // Made before the look, so that no change is missed.
            let mut change = std::pin::pin!(self.change.notified());
            change.as_mut().enable();
            if is_so() {
                return;
            }
            change.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn leader(term: u64) -> LeaderId {
        LeaderId { term, node_id: 1 }
    }

    #[test]
    fn a_majority_of_every_config_counts_and_only_for_this_leadership() {
        let acks = Acks::default();
        let start = Moment::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let three: BTreeSet<u64> = [1, 2, 3].into();
        let quorum = |configs: &[BTreeSet<u64>], term| acks.quorum(leader(term), NodeId(1), configs, at(100));
        let one = [three.clone()];
        assert_eq!(quorum(&one, 5), None, "nobody has answered");
        acks.note(NodeId(2), leader(5), at(10));
        assert_eq!(quorum(&one, 5), Some(at(10)));
        acks.note(NodeId(3), leader(5), at(20));
        acks.note(NodeId(2), leader(5), at(7));
        assert_eq!(
            quorum(&one, 5),
            Some(at(20)),
            "the better of two; an old answer that comes late changes nothing"
        );
        assert_eq!(quorum(&one, 6), None, "another term");
        let joint = [three, [1, 4, 5].into()];
        assert_eq!(quorum(&joint, 5), None);
        acks.note(NodeId(5), leader(5), at(15));
        assert_eq!(quorum(&joint, 5), Some(at(15)));
        assert_eq!(quorum(&[[1].into()], 9), Some(at(100)), "alone");
        assert_eq!(quorum(&[[2, 3].into()], 5), None, "no longer a voter");
        acks.note(NodeId(5), leader(4), at(90));
        assert_eq!(quorum(&joint, 5), Some(at(15)), "a late answer to an older leadership");
        assert!(acks.is_fresh(NodeId(5), leader(5), at(14)) && !acks.is_fresh(NodeId(5), leader(5), at(15)));
        assert!(!acks.is_fresh(NodeId(5), leader(4), at(1)) && !acks.is_fresh(NodeId(7), leader(5), at(1)));
    }
}
