//! Everything the log knows, behind one lock: groups, queue, cache, segments.
//!
//! Called by the handle (queueing, reading), the committer (publishing what is durable) and the preparer. Touches no file,
//! so the lock is never held over a disk operation.
//!
//! `acked_is_durable`: a segment is freed only after a batch that names a younger `oldest` is durable, and `oldest` passes
//! a segment only after everything needed from it is purged, removed or written again, durably.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::cache::{Line, TailCache};
use super::config::{WalConfig, WalDone, WalEntry};
use super::format::{Record, entry_length};
use super::group::{Group, Location, Slot, cost};
use super::metrics::Metrics;
use super::queue::{Op, Queue};
use super::segments::{Segment, Segments};
use crate::command::GroupId;

/// What the handles and the two threads share.
pub(super) struct Shared {
    pub(super) config: WalConfig,
    pub(super) metrics: Metrics,
    state: Mutex<State>,
    /// Told when there may be something to write.
    pub(super) work: Condvar,
    /// Told when there may be a segment to prepare.
    pub(super) chores: Condvar,
    pub(super) spare: AtomicBool,
    pub(super) poisoned: AtomicBool,
    /// Why it was poisoned, for those who wait for it.
    pub(super) failed: tokio::sync::watch::Sender<Option<String>>,
}

impl Shared {
    pub(super) fn new(config: WalConfig, metrics: Metrics, state: State) -> Shared {
        Shared {
            config,
            metrics,
            state: Mutex::new(state),
            work: Condvar::new(),
            chores: Condvar::new(),
            spare: AtomicBool::new(true),
            poisoned: AtomicBool::new(false),
            failed: tokio::sync::watch::Sender::new(None),
        }
    }

    /// A panic under the lock leaves no half-made change that others could not read; the log goes on.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of the lock, waking the committer if it sleeps and has something to do.
    pub(super) fn queued(&self, mut state: MutexGuard<'_, State>) {
        let wake = std::mem::take(&mut state.committer_sleeps);
        self.note_spare(&state);
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    /// Publishes the answer to `spare()` after a change.
    pub(super) fn note_spare(&self, state: &State) {
        let room = !(state.segments.blocked && state.segments.ready.is_empty());
        let spare = room && state.failure.is_none();
        // Written only on a change: every proposal on every core reads it.
        if self.spare.load(Ordering::Relaxed) != spare {
            self.spare.store(spare, Ordering::Relaxed);
        }
    }
}

/// The state behind the lock.
pub(super) struct State {
    pub(super) groups: HashMap<GroupId, Group>,
    pub(super) queue: Queue,
    pub(super) segments: Segments,
    cache: TailCache,
    next_stamp: u64,
    /// Generation of the oldest segment anything durable is needed from.
    pub(super) oldest: u64,
    /// Set while the committer waits, cleared by whoever wakes it.
    pub(super) committer_sleeps: bool,
    /// No more records are taken; the threads end when the queue is written.
    pub(super) closing: bool,
    /// The committer will write nothing more.
    pub(super) committer_ended: bool,
    /// Why nothing is written any more.
    pub(super) failure: Option<String>,
}

/// A record found by a reader.
pub(super) enum Found {
    Cached(WalEntry),
    OnDisk { index: u64, location: Location, segment: Arc<Segment> },
}

impl State {
    pub(super) fn new(groups: HashMap<GroupId, Group>, segments: Segments, cache_bytes: u64) -> State {
        let mut state = State {
            groups,
            queue: Queue::default(),
            segments,
            cache: TailCache::new(cache_bytes),
            next_stamp: 1,
            oldest: 0,
            committer_sleeps: false,
            closing: false,
            committer_ended: false,
            failure: None,
        };
        state.reckon();
        state
    }

    /// Why records are refused, if they are.
    pub(super) fn refusal(&self) -> Option<io::Error> {
        match &self.failure {
            Some(failure) => Some(failed(failure)),
            None if self.closing => Some(io::Error::other("write-ahead log is closed")),
            None => None,
        }
    }

    /// Queues entries. An error leaves everything as it was.
    pub(super) fn append(
        &mut self,
        group: GroupId,
        entries: Vec<WalEntry>,
        mut done: WalDone,
        config: &WalConfig,
    ) -> Result<(), (WalDone, io::Error)> {
        let checked = self.check(group, &entries, config);
        if let Err(error) = checked {
            return Err((done, error));
        }
        let owner = self.groups.entry(group).or_default();
        let last = entries.len().saturating_sub(1);
        owner.queued += entries.len() as u64;
        for (at, entry) in entries.into_iter().enumerate() {
            let (index, stamp) = (entry.index, self.next_stamp);
            self.next_stamp += 1;
            self.cache.add(Line { group, index, stamp }, cost(&entry));
            owner.view.push(index, Slot { stamp, location: None, cached: Some(entry.clone()) });
            let done = if at == last { std::mem::take(&mut done) } else { WalDone::Nobody };
            self.queue.push(Op::new(group, Record::Entry(entry), stamp, done));
        }
        let groups = &self.groups;
        self.cache.clean(|line| slot(groups, line).is_some_and(|slot| slot.cached.is_some()));
        Ok(())
    }

    fn check(&self, group: GroupId, entries: &[WalEntry], config: &WalConfig) -> io::Result<()> {
        let Some(first) = entries.first() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "append of no entries"));
        };
        if let Some(owner) = self.groups.get(&group) {
            owner.view.accepts(first.index)?;
        }
        for (expected, entry) in (first.index..).zip(entries) {
            let length = entry_length(entry) as u64;
            if entry.index != expected || length > config.max_entry_bytes() {
                let limit = config.max_entry_bytes();
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!(
                        "entry is out of order or too large, index={} bytes={length} limit={limit}",
                        entry.index
                    ),
                ));
            }
        }
        let bytes = self.queue.bytes();
        if bytes > config.queue_bytes {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!("write-ahead log queue is full, bytes={bytes} limit={}", config.queue_bytes),
            ));
        }
        Ok(())
    }

    /// Queues any record but an entry; readers see its effect at once.
    pub(super) fn control(&mut self, group: GroupId, record: Record, done: WalDone) {
        let owner = self.groups.entry(group).or_default();
        let freed = match &record {
            Record::Vote(vote) => {
                owner.view.set_vote(vote.clone());
                0
            }
            Record::Truncate(first_removed) => owner.view.truncate(*first_removed),
            Record::Purge(upto, state) => owner.view.purge(*upto, state.clone()),
            Record::Remove => owner.view.clear(),
            Record::Entry(_) => 0,
        };
        owner.queued += 1;
        self.cache.subtract(freed);
        self.queue.push(Op::new(group, record, 0, done));
    }

    /// Enters that a record is durable. True if segments may have become free by it.
    pub(super) fn publish(&mut self, op: &Op, location: Location) -> bool {
        let generation = location.generation;
        let owner = self.groups.entry(op.group).or_default();
        owner.queued = owner.queued.saturating_sub(1);
        match &op.record {
            Record::Entry(entry) => {
                owner.footprint.entry(entry.index, generation);
                // Purged or truncated meanwhile: then the slot is gone or another's.
                if let Some(slot) = owner.view.slot_mut(entry.index).filter(|slot| slot.stamp == op.stamp) {
                    slot.location = Some(location);
                }
                return false;
            }
            Record::Vote(_) => owner.footprint.vote(generation),
            Record::Truncate(first_removed) => owner.footprint.truncate(*first_removed),
            Record::Purge(upto, _) => owner.footprint.purge(*upto, generation),
            Record::Remove => owner.footprint.remove(),
        }
        if owner.is_empty() {
            self.groups.remove(&op.group);
        }
        true
    }

    /// Evicts what is over the cache's limit.
    pub(super) fn shrink_cache(&mut self) {
        let groups = &mut self.groups;
        self.cache.shrink(|line| {
            let slot = groups.get_mut(&line.group).and_then(|owner| owner.view.slot_mut(line.index));
            match slot.filter(|slot| slot.stamp == line.stamp) {
                None => Some(0),
                Some(slot) if slot.location.is_none() => None,
                Some(slot) => Some(slot.cached.take().as_ref().map_or(0, cost)),
            }
        });
    }

    /// Reckons anew which segment is the oldest one needed, and queues copies of votes and purge states that alone hold
    /// older ones.
    pub(super) fn reckon(&mut self) {
        let Some(active) = self.segments.live.back().map(|segment| segment.generation) else { return };
        let floors = self.groups.values().filter_map(|group| group.footprint.entries_floor());
        let entries_floor = floors.fold(active, u64::min);
        if self.segments.live.front().is_some_and(|segment| segment.generation < entries_floor) {
            self.carry(entries_floor);
        }
        let floors = self.groups.values().filter_map(|group| group.footprint.floor());
        self.oldest = floors.fold(active, u64::min);
    }

    fn carry(&mut self, floor: u64) {
        for (group, owner) in &mut self.groups {
            // No vote in view although one is on disk: a removal is queued and will settle it.
            if owner.footprint.vote_lags(floor)
                && let Some(vote) = owner.view.vote()
            {
                owner.footprint.carrying_vote = true;
                owner.queued += 1;
                self.queue.push(Op::new(*group, Record::Vote(vote.clone()), 0, WalDone::Nobody));
            }
            if owner.footprint.purge_lags(floor)
                && let Some((upto, state)) = owner.view.purged()
            {
                owner.footprint.carrying_purge = true;
                owner.queued += 1;
                self.queue.push(Op::new(*group, Record::Purge(*upto, state.clone()), 0, WalDone::Nobody));
            }
        }
    }

    /// Entries of `[from, to)` that are present, up to `max_bytes` but at least one.
    pub(super) fn find(&self, group: GroupId, from: u64, to: u64, max_bytes: u64) -> Vec<Found> {
        let Some(owner) = self.groups.get(&group) else { return Vec::new() };
        let mut bytes = 0;
        let mut found = Vec::new();
        for index in from.max(owner.view.first())..to.min(owner.view.next()) {
            let Some(slot) = owner.view.slot(index) else { break };
            let (next, length) = match (&slot.cached, slot.location) {
                (Some(entry), _) => (Found::Cached(entry.clone()), cost(entry)),
                (None, Some(location)) => {
                    let Some(segment) = self.segments.find(location.generation) else { break };
                    (Found::OnDisk { index, location, segment: segment.clone() }, u64::from(location.length))
                }
                (None, None) => break,
            };
            bytes += length;
            if bytes > max_bytes && !found.is_empty() {
                break;
            }
            found.push(next);
        }
        found
    }

    /// Groups that hold entries in segments older than the log's limit allows.
    pub(super) fn pinning(&self, limit: u64) -> Vec<GroupId> {
        if self.segments.live_bytes() <= limit {
            return Vec::new();
        }
        let bound = self.segments.limit_generation(limit);
        let pins = |group: &Group| group.footprint.entries_floor().is_some_and(|floor| floor < bound);
        let mut groups: Vec<_> =
            self.groups.iter().filter(|(_, group)| pins(group)).map(|(id, _)| *id).collect();
        groups.sort_unstable();
        groups
    }
}

/// The answer to everything after a failed write.
pub(super) fn failed(cause: &str) -> io::Error {
    io::Error::other(format!(
        "write-ahead log has failed and takes nothing more; restart the process, replace the disk if it recurs, cause={cause}"
    ))
}

fn slot(groups: &HashMap<GroupId, Group>, line: Line) -> Option<&Slot> {
    groups.get(&line.group)?.view.slot(line.index).filter(|slot| slot.stamp == line.stamp)
}
