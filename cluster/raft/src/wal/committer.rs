//! The group commit: one thread that writes what is queued as one batch, makes it durable with one sync, tells whoever
//! waits, and takes what queued up meanwhile as the next batch.
//!
//! Started by the handle's `open`. Knows the format and the disk; decides nothing about groups.
//!
//! `acked_is_durable`: `WalDone` is told only after `write_durable` returned. The next batch is written only then, so at
//! most the last batch of a log can be torn. A failed write poisons the log for good: the kernel may have dropped the
//! bytes and marked them clean, so a second try proves nothing.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::aligned::AlignedBuffer;
use super::format::{self, BatchHeader, SECTOR, SEGMENT_HEADER};
use super::group::Location;
use super::queue::{Op, Pick, Room};
use super::segments::Segment;
use super::state::{self, Shared, State};

/// A buffer that grew beyond this for one large entry is given back.
const BUFFER_KEEP: usize = 8 << 20;

/// How long after a batch of several records the next one gathers more: those who write much at once save the CPU time
/// of syncs by it. Who writes one at a time never waits.
const GATHER: Duration = Duration::from_micros(200);

/// Where the next batch goes.
pub(super) struct Cursor {
    pub(super) segment: Arc<Segment>,
    pub(super) offset: u64,
}

/// The committing thread's own state.
pub(super) struct Committer {
    pub(super) shared: Arc<Shared>,
    /// Random number of the log.
    pub(super) log: u64,
    /// Sequence of the next batch.
    pub(super) sequence: u64,
    /// `oldest` of the last durable batch: segments below it are free.
    pub(super) announced: u64,
    /// `None` before a new log's first batch.
    pub(super) cursor: Option<Cursor>,
    pub(super) buffer: AlignedBuffer,
    /// When the last batch was durable, and how many records it held.
    pub(super) last: Option<(Instant, usize)>,
}

/// One batch to write; no records if it only announces that segments are free.
struct Work {
    ops: Vec<Op>,
    oldest: u64,
}

impl Committer {
    /// Runs until the log is closed or has failed.
    pub(super) fn run(mut self) {
        while let Some(work) = self.next_work() {
            if !self.commit(work) {
                break;
            }
        }
        self.shared.lock().committer_ended = true;
        self.shared.chores.notify_one();
    }

    fn next_work(&mut self) -> Option<Work> {
        let shared = self.shared.clone();
        let mut state = shared.lock();
        loop {
            if let Some(rest) = self.gather(&state) {
                // Nobody wakes this thread meanwhile: `committer_sleeps` stays false.
                let waited = shared.work.wait_timeout(state, rest);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let room = self.room(&state);
            match state.queue.pick(room) {
                Pick::Batch(ops) => return Some(Work { ops, oldest: state.oldest }),
                Pick::Roll => {
                    self.roll(&mut state);
                    continue;
                }
                Pick::Again => {
                    drop(state);
                    state = shared.lock();
                    continue;
                }
                Pick::Nothing => {}
            }
            if self.should_announce(&state) {
                return Some(Work { ops: Vec::new(), oldest: state.oldest });
            }
            if state.closing && (state.queue.bytes() == 0 || state.segments.blocked) {
                self.end(state);
                return None;
            }
            state.committer_sleeps = true;
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How much longer to wait for more records.
    fn gather(&self, state: &State) -> Option<Duration> {
        let (ended, records) = self.last?;
        let queued = state.queue.records();
        if state.closing || records < 2 || queued == 0 || queued >= 2 * records {
            return None;
        }
        GATHER.checked_sub(ended.elapsed()).filter(|rest| !rest.is_zero())
    }

    fn room(&self, state: &State) -> Room {
        Room {
            bytes: self.cursor.as_ref().map_or(0, |cursor| cursor.segment.file.bytes() - cursor.offset),
            reserve: self.shared.config.reserve_bytes(),
            batch: self.shared.config.batch_bytes,
            can_roll: !state.segments.ready.is_empty(),
            scarce: state.segments.blocked,
        }
    }

    /// Goes to the next ready segment.
    fn roll(&mut self, state: &mut State) {
        let Some(segment) = state.segments.ready.pop_front() else { return };
        state.segments.live.push_back(segment.clone());
        self.cursor = Some(Cursor { segment, offset: SEGMENT_HEADER as u64 });
        state.reckon();
        self.shared.note_spare(state);
        self.shared.metrics.segments(&state.segments);
        self.shared.chores.notify_one();
    }

    /// Whether segments wait for a batch to say that they are free.
    fn should_announce(&self, state: &State) -> bool {
        state.oldest > self.announced
            && state.segments.live.front().is_some_and(|segment| segment.generation < state.oldest)
            && self.room(state).bytes >= SECTOR as u64
    }

    /// Closed: what could not be written for want of room is refused, and an empty batch seals the log, so that damage
    /// to the last batch of records is told from a torn write.
    fn end(&mut self, mut state: MutexGuard<'_, State>) {
        let left = state.queue.drain();
        let oldest = state.oldest;
        let seal = self.room(&state).bytes >= SECTOR as u64;
        drop(state);
        for op in left {
            op.done
                .tell(Err(io::Error::new(io::ErrorKind::StorageFull, "write-ahead log closed while full")));
        }
        if seal {
            self.commit(Work { ops: Vec::new(), oldest });
        }
    }

    /// Writes one batch; false once the log has failed.
    fn commit(&mut self, work: Work) -> bool {
        let Some(cursor) = &self.cursor else { return true };
        let (segment, offset) = (cursor.segment.clone(), cursor.offset);
        let locations = self.encode(&work, segment.generation, offset);
        let length = self.buffer.as_ref().len();
        let started = Instant::now();
        let written = segment.file.write_durable(self.buffer.as_ref(), offset);
        self.shared.metrics.sync_seconds.observe(started.elapsed().as_secs_f64());
        if let Err(error) = written {
            tracing::error!(segment = segment.name, offset, %error, "write-ahead log failed and takes nothing more");
            self.fail(work.ops, &error);
            return false;
        }
        self.shared.metrics.batch_records.observe(work.ops.len() as f64);
        self.shared.metrics.batch_bytes.observe(length as f64);
        self.shared.metrics.written_bytes.inc_by(length as u64);
        if self.buffer.capacity() > BUFFER_KEEP {
            self.buffer = AlignedBuffer::default();
        }
        self.cursor = Some(Cursor { segment, offset: offset + length as u64 });
        self.sequence += 1;
        self.announced = work.oldest;
        self.publish(&work.ops, &locations);
        self.last = Some((Instant::now(), work.ops.len()));
        for op in work.ops {
            op.done.tell(Ok(()));
        }
        true
    }

    fn encode(&mut self, work: &Work, generation: u64, offset: u64) -> Vec<Location> {
        format::start_batch(&mut self.buffer);
        let mut locations = Vec::with_capacity(work.ops.len());
        for op in &work.ops {
            let at = offset + self.buffer.as_ref().len() as u64;
            op.record.encode(op.group, &mut self.buffer);
            // Offsets and lengths fit: the configuration bounds a segment to 1 GiB.
            locations.push(Location { generation, offset: at as u32, length: op.length as u32 });
        }
        let header = BatchHeader {
            length: 0,
            records: work.ops.len() as u32,
            log: self.log,
            generation,
            sequence: self.sequence,
            oldest: work.oldest,
        };
        format::finish_batch(&mut self.buffer, header);
        locations
    }

    fn publish(&self, ops: &[Op], locations: &[Location]) {
        let mut state = self.shared.lock();
        let mut reckon = false;
        for (op, location) in ops.iter().zip(locations) {
            reckon |= state.publish(op, *location);
        }
        state.shrink_cache();
        if reckon {
            state.reckon();
        }
        if state.segments.release(self.announced) {
            self.shared.metrics.segments(&state.segments);
            self.shared.chores.notify_one();
        }
        self.shared.note_spare(&state);
    }

    fn fail(&self, ops: Vec<Op>, error: &io::Error) {
        let mut state = self.shared.lock();
        let cause = error.to_string();
        state.failure = Some(cause.clone());
        self.shared.poisoned.store(true, Ordering::Release);
        self.shared.note_spare(&state);
        let queued = state.queue.drain();
        drop(state);
        self.shared.failed.send_replace(Some(cause.clone()));
        for op in ops.into_iter().chain(queued) {
            op.done.tell(Err(state::failed(&cause)));
        }
    }
}
