//! Makes segments ready ahead of need, on a thread of its own: zero-fills new files, writes headers to recycled ones,
//! deletes what is left over.
//!
//! Started by the handle's `open`. When the disk is full it tries again every `retry`, so room that comes back is found
//! without a restart.

use std::io;
use std::sync::{Arc, PoisonError};

use super::disk::Disk;
use super::format::SegmentHeader;
use super::segments::{Chore, Segment};
use super::state::{Shared, State};

/// The preparing thread's own state.
pub(super) struct Preparer {
    pub(super) shared: Arc<Shared>,
    pub(super) disk: Arc<dyn Disk>,
    /// Random number of the log.
    pub(super) log: u64,
}

impl Preparer {
    /// Runs until the committer has ended.
    pub(super) fn run(self) {
        let mut state = self.shared.lock();
        loop {
            if state.committer_ended {
                return;
            }
            let chore = state.segments.next_chore(&self.shared.config);
            self.shared.note_spare(&state);
            let made = match chore {
                Chore::Wait(None) => {
                    state = self.shared.chores.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                Chore::Wait(Some(time)) => {
                    self.wake_committer(&mut state);
                    let waited = self.shared.chores.wait_timeout(state, time);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                    continue;
                }
                Chore::Delete(segment) => {
                    drop(state);
                    self.delete(&segment);
                    state = self.shared.lock();
                    continue;
                }
                Chore::Recycle(segment, generation) => {
                    drop(state);
                    self.recycle(&segment, generation)
                }
                Chore::Create(name, generation) => {
                    drop(state);
                    self.create(name, generation)
                }
            };
            state = self.shared.lock();
            if !self.enter(&mut state, made) {
                let waited = self.shared.chores.wait_timeout(state, self.shared.config.retry);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Enters a ready segment, or that none could be made (then false).
    fn enter(&self, state: &mut State, made: io::Result<Segment>) -> bool {
        let made_one = made.is_ok();
        match made {
            Ok(segment) => {
                state.segments.blocked = false;
                state.segments.ready.push_back(Arc::new(segment));
            }
            Err(error) if !state.segments.blocked => {
                state.segments.blocked = true;
                let left = state.segments.ready.len();
                tracing::error!(%error, left, "no write-ahead log segment could be prepared; make room on the disk");
            }
            Err(_) => {}
        }
        self.shared.note_spare(state);
        self.shared.metrics.segments(&state.segments);
        self.wake_committer(state);
        made_one
    }

    fn wake_committer(&self, state: &mut State) {
        if std::mem::take(&mut state.committer_sleeps) {
            self.shared.work.notify_one();
        }
    }

    fn create(&self, name: String, generation: u64) -> io::Result<Segment> {
        let file = self.disk.create(&name, self.shared.config.segment_bytes)?;
        let segment = Segment { generation, name, file };
        match self.write_header(&segment) {
            Ok(()) => Ok(segment),
            Err(error) => {
                self.delete(&segment);
                Err(error)
            }
        }
    }

    /// A file whose header could not be written is given up rather than tried again.
    fn recycle(&self, old: &Segment, generation: u64) -> io::Result<Segment> {
        let segment = Segment { generation, name: old.name.clone(), file: old.file.clone() };
        match self.write_header(&segment) {
            Ok(()) => Ok(segment),
            Err(error) => {
                self.delete(&segment);
                Err(error)
            }
        }
    }

    fn write_header(&self, segment: &Segment) -> io::Result<()> {
        let header =
            SegmentHeader { log: self.log, generation: segment.generation, bytes: segment.file.bytes() };
        segment.file.write_durable(header.encode().as_ref(), 0)
    }

    fn delete(&self, segment: &Segment) {
        if let Err(error) = self.disk.remove(&segment.name) {
            tracing::warn!(segment = segment.name, %error, "write-ahead log segment could not be deleted");
        }
    }
}
