//! One group's log over the shared WAL, in openraft's storage traits.
//!
//! Called by openraft (append, vote, truncate, purge, read) and by the state machine's adapter (`wait_durable`).
//! Knows the WAL and the entry encoding. Must never know what a command means.
//!
//! `log_before_chunk`: openraft hands a committed entry to `apply` as soon as it is *submitted* here; `wait_durable`
//! lets the adapter hold it until this replica's own log has it too. `bounded`: every read is capped by bytes.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard};

use futures_util::{Stream, TryStreamExt, stream};
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{EntryPayload, LogState, OptionalSend, RaftLogReader};
use tokio::sync::Notify;

use crate::codec;
use crate::command::GroupId;
use crate::places::Place;
use crate::types::{Entry, LogId, TypeConfig, Vote};
use crate::wal::{GroupLog, Wal, WalDone, WalEntry};

/// Most bytes of one append message and of one step of apply (a larger single entry goes alone).
pub(crate) const READ_BYTES_MAX: u64 = 1 << 20;
/// Distance between two marks of the log's length, bytes: how exactly a purge can keep a tail.
const MARK_BYTES: u64 = 256 << 10;

/// A group's log. Clones share it; readers are clones.
#[derive(Clone)]
pub(crate) struct LogStore {
    group: GroupId,
    wal: Wal,
    tail: Arc<Tail>,
}

/// What the WAL reports to. Holds no handle of it: the last one must not die on the WAL's own thread, whose end nobody
/// could wait for then.
struct Tail {
    state: Mutex<State>,
    durable: Notify,
}

#[derive(Default)]
struct State {
    vote: Option<Vote>,
    purged: Option<LogId>,
    last: Option<LogId>,
    /// Batches handed to the WAL whose sync has not been reported: first index and sequence number.
    unsynced: VecDeque<(u64, u64)>,
    next_batch: u64,
    failed: bool,
    /// Bytes found at the start and appended since, and what they were at some indexes.
    appended: u64,
    marks: VecDeque<(u64, u64)>,
    checkpointed: u64,
}

impl Tail {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held would be a defect; the state is plain data and stays readable.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn synced(&self, batch: u64, outcome: &io::Result<()>) {
        let mut state = self.state();
        state.failed |= outcome.is_err();
        while state.unsynced.front().is_some_and(|(_, sequence)| *sequence <= batch) {
            state.unsynced.pop_front();
        }
        drop(state);
        self.durable.notify_waiters();
    }
}

impl LogStore {
    /// The group's log as recovery found it.
    pub(crate) fn open(wal: Wal, group: GroupId) -> io::Result<LogStore> {
        let found = wal.group(group).unwrap_or_default();
        let state = recover(&wal, group, &found)?;
        Ok(LogStore { group, wal, tail: Arc::new(Tail { state: Mutex::new(state), durable: Notify::new() }) })
    }

    /// Waits until every entry up to `index` that was handed to the WAL is synced.
    pub(crate) async fn wait_durable(&self, index: u64) -> io::Result<()> {
        loop {
            let mut notified = std::pin::pin!(self.tail.durable.notified());
            notified.as_mut().enable();
            {
                let state = self.state();
                if state.failed {
                    return Err(io::Error::other("write-ahead log failed"));
                }
                if state.unsynced.front().is_none_or(|(first, _)| *first > index) {
                    return Ok(());
                }
            }
            notified.await;
        }
    }

    /// The vote last saved.
    pub(crate) fn vote(&self) -> Option<Vote> {
        self.state().vote
    }

    /// The last entry appended, or purged if none is left.
    pub(crate) fn last(&self) -> Option<LogId> {
        self.state().last
    }

    /// Bytes in the log past the last checkpoint, to the exactness of the marks: what a restart would replay.
    pub(crate) fn bytes_since_checkpoint(&self) -> u64 {
        let state = self.state();
        state.appended.saturating_sub(state.checkpointed)
    }

    /// Remembers that everything up to `index` is in a checkpoint.
    pub(crate) fn checkpointed(&self, index: u64) {
        let mut state = self.state();
        let at = state.marks.iter().rev().find(|(mark, _)| *mark <= index).map(|(_, bytes)| *bytes);
        state.checkpointed = state.checkpointed.max(at.unwrap_or(0));
    }

    /// The last index that may be purged so that about `keep` bytes of log remain.
    pub(crate) fn purge_to_keep(&self, keep: u64) -> Option<u64> {
        let state = self.state();
        let limit = state.appended.checked_sub(keep)?;
        state.marks.iter().rev().find(|(_, bytes)| *bytes <= limit).map(|(index, _)| *index)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.tail.state()
    }

    /// Entries of `range` up to `bytes` (at least one); the disk is read off the runtime's threads.
    async fn read(&self, range: Range<u64>, bytes: u64) -> io::Result<Vec<Entry>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let cached = self.wal.read_cached(self.group, range.clone(), bytes);
        let found = match cached {
            Some(found) => found,
            None => {
                let (wal, group) = (self.wal.clone(), self.group);
                tokio::task::spawn_blocking(move || wal.read(group, range, bytes))
                    .await
                    .map_err(io::Error::other)??
            }
        };
        found.into_iter().map(|e| Ok(codec::decode_entry(e.index, &e.header, e.command)?)).collect()
    }

    fn bounds(&self, range: &impl RangeBounds<u64>) -> Range<u64> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(end) => end.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        let next = self.state().last.map_or(0, |last| last.index + 1);
        start..end.min(next)
    }
}

fn recover(wal: &Wal, group: GroupId, found: &GroupLog) -> io::Result<State> {
    let vote = found.vote.as_ref().map(|bytes| codec::decode_vote(bytes)).transpose()?;
    let purged = found.purged.as_ref().map(|(_, state)| codec::decode_position(state)).transpose()?;
    let mut last = purged;
    if found.first < found.next {
        let entries = wal.read(group, found.next - 1..found.next, u64::MAX)?;
        let entry = entries.into_iter().next();
        let entry = entry.ok_or_else(|| io::Error::other("the last entry of a log is missing"))?;
        last = Some(codec::decode_entry(entry.index, &entry.header, entry.command)?.log_id);
    }
    let mut state = State { vote, purged, last, ..State::default() };
    for (index, bytes) in wal.lengths(group) {
        state.grow(index, bytes);
    }
    Ok(state)
}

async fn done(send: impl FnOnce(WalDone)) -> io::Result<()> {
    let (done, outcome) = WalDone::oneshot();
    send(done);
    outcome.await.map_err(|_| io::Error::other("write-ahead log is closed"))?
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> io::Result<Vec<Entry>> {
        self.read(self.bounds(&range), u64::MAX).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.read(start..end, READ_BYTES_MAX).await
    }

    /// For apply: in steps, so that a long log is never in memory at once.
    async fn entries_stream<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> impl Stream<Item = io::Result<Entry>> + OptionalSend {
        let range = self.bounds(&range);
        let steps = stream::try_unfold((self.clone(), range.start), move |(log, start)| {
            let end = range.end;
            async move {
                let entries = log.read(start..end, READ_BYTES_MAX).await?;
                let Some(last) = entries.last() else { return Ok::<_, io::Error>(None) };
                let next = last.log_id.index + 1;
                Ok(Some((stream::iter(entries.into_iter().map(Ok)), (log, next))))
            }
        });
        Box::pin(steps.try_flatten())
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.vote())
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let state = self.state();
        Ok(LogState { last_purged_log_id: state.purged, last_log_id: state.last })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        done(|done| self.wal.save_vote(self.group, codec::encode_vote(vote), done)).await?;
        self.state().vote = Some(*vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut last = None;
        let (mut bytes, mut places) = (0, None);
        let entries: Vec<WalEntry> = entries
            .into_iter()
            .map(|mut entry| {
                last = Some(entry.log_id);
                if let EntryPayload::Normal(placed) = &mut entry.payload {
                    Place::join(&mut places, placed.place.take());
                }
                let (index, header, command) = codec::encode_entry(entry);
                bytes += (header.len() + command.bytes()) as u64;
                WalEntry { index, header, command }
            })
            .collect();
        let (Some(first), Some(last)) = (entries.first().map(|entry| entry.index), last) else {
            callback.io_completed(Ok(()));
            return Ok(());
        };
        let batch = self.state().appended(first, last, bytes);
        let tail = Arc::clone(&self.tail);
        let done = WalDone::call(move |outcome| {
            drop(places);
            tail.synced(batch, &outcome);
            callback.io_completed(outcome);
        });
        self.wal.append(self.group, entries, done);
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let index = last.map(|id| id.index);
        {
            let mut state = self.state();
            let next = index.map_or(0, |index| index + 1);
            while state.unsynced.back().is_some_and(|(first, _)| *first >= next) {
                state.unsynced.pop_back();
            }
            while state.marks.back().is_some_and(|(mark, _)| *mark >= next) {
                state.marks.pop_back();
            }
            state.last = last;
        }
        // Not waited for: whatever is appended next is synced after it, and nothing depends on it before.
        self.wal.truncate_after(self.group, index, WalDone::Nobody);
        Ok(())
    }

    async fn purge(&mut self, id: LogId) -> io::Result<()> {
        {
            let mut state = self.state();
            state.purged = state.purged.max(Some(id));
            state.last = state.last.max(Some(id));
            while state.marks.front().is_some_and(|(mark, _)| *mark <= id.index) {
                state.marks.pop_front();
            }
        }
        self.wal.purge(self.group, id.index, codec::encode_position(&id));
        Ok(())
    }
}

impl State {
    fn appended(&mut self, first: u64, last: LogId, bytes: u64) -> u64 {
        self.last = Some(last);
        self.next_batch += 1;
        self.unsynced.push_back((first, self.next_batch));
        self.grow(last.index, bytes);
        self.next_batch
    }

    /// The log has grown by `bytes`, up to `last`.
    fn grow(&mut self, last: u64, bytes: u64) {
        self.appended += bytes;
        let near = self.marks.len() >= 2 && {
            let before = self.marks[self.marks.len() - 2];
            self.appended - before.1 < MARK_BYTES
        };
        if near {
            self.marks.pop_back();
        }
        self.marks.push_back((last, self.appended));
    }
}
