//! Which entries are kept in memory: the newest, up to a number of bytes.
//!
//! Called by the log's state. Knows the order of appends, not the entries: the slots hold them.

use std::collections::VecDeque;

use crate::command::GroupId;

/// The books are cleaned of entries that are gone when they hold this many lines more than twice the entries cached.
const SLACK: usize = 1024;

/// A line of the books: an entry that was cached, if its slot still has this stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) group: GroupId,
    pub(super) index: u64,
    pub(super) stamp: u64,
}

/// The books of the tail cache.
#[derive(Debug, Default)]
pub(super) struct TailCache {
    lines: VecDeque<Line>,
    bytes: u64,
    limit: u64,
    clean_at: usize,
}

impl TailCache {
    pub(super) fn new(limit: u64) -> TailCache {
        TailCache { limit, clean_at: SLACK, ..TailCache::default() }
    }

    pub(super) fn add(&mut self, line: Line, cost: u64) {
        self.lines.push_back(line);
        self.bytes += cost;
    }

    /// Entries left the cache.
    pub(super) fn subtract(&mut self, cost: u64) {
        self.bytes -= cost;
    }

    /// Evicts the oldest entries while over the limit. `evict` drops an entry and returns its cost, 0 if it is gone
    /// already, or `None` if it is not on disk yet and must stay.
    pub(super) fn shrink(&mut self, mut evict: impl FnMut(Line) -> Option<u64>) {
        while self.bytes > self.limit
            && let Some(line) = self.lines.front()
            && let Some(cost) = evict(*line)
        {
            self.bytes -= cost;
            self.lines.pop_front();
        }
    }

    /// Drops lines of entries that are gone, now and then.
    pub(super) fn clean(&mut self, mut is_cached: impl FnMut(Line) -> bool) {
        if self.lines.len() >= self.clean_at {
            self.lines.retain(|line| is_cached(*line));
            self.clean_at = self.lines.len() * 2 + SLACK;
        }
    }
}
