//! Whom a leader hands leadership to: the one that was asked longest ago, or never.
//!
//! Called by the copyset, once per reason to hand on. Pure: knows neither raft nor the clock.
//! Invariants: `bounded` (one entry per candidate that was asked lately).

use spline_raft::NodeId;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A candidate is not asked again for this long if it must be a new one: if leadership comes back sooner, it could not
/// do better than the replica that asked it.
pub const LATELY: Duration = Duration::from_secs(30);

/// Who was asked to lead, and when.
#[derive(Default)]
pub struct Asked(HashMap<NodeId, Instant>);

impl Asked {
    /// The candidate that was never asked or longest ago; it counts as asked from `now` on.
    pub fn next(&mut self, candidates: impl IntoIterator<Item = NodeId>, now: Instant) -> Option<NodeId> {
        self.0.retain(|_, at| now.saturating_duration_since(*at) < LATELY);
        let next = candidates.into_iter().min_by_key(|node| self.0.get(node).copied())?;
        self.0.insert(next, now);
        Some(next)
    }

    /// As [`Asked::next`], but only a candidate that was not asked [`LATELY`].
    pub fn next_new(&mut self, candidates: impl IntoIterator<Item = NodeId>, now: Instant) -> Option<NodeId> {
        let is_new =
            |node: &NodeId| self.0.get(node).is_none_or(|at| now.saturating_duration_since(*at) >= LATELY);
        let new: Vec<_> = candidates.into_iter().filter(is_new).collect();
        self.next(new, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId(2);
    const B: NodeId = NodeId(3);

    #[test]
    fn each_is_asked_once_before_the_data_is_given_up() {
        let (mut asked, start) = (Asked::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(asked.next_new([A, B], at(0)), Some(A));
        assert_eq!(asked.next_new([A, B], at(1)), Some(B));
        assert_eq!(asked.next_new([A, B], at(2)), None);
        assert_eq!(asked.next_new([A, B], at(30)), Some(A), "it was long ago");
        assert_eq!(asked.next_new([A, B], at(30)), None);
        assert_eq!(asked.next_new([], at(99)), None);
    }

    #[test]
    fn the_one_asked_longest_ago_is_next() {
        let (mut asked, start) = (Asked::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(asked.next([B], at(0)), Some(B));
        assert_eq!(asked.next([B, A], at(1)), Some(A));
        assert_eq!(asked.next([A, B], at(2)), Some(B));
        assert_eq!(asked.next([B], at(3)), Some(B), "better than nobody");
    }
}
