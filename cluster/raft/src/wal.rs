//! The write-ahead log of a data directory, shared by all its raft groups: records of every group in one sequence of
//! batches, made durable by one sync each.
//!
//! Called by the log store of each group. Must not know: raft terms, votes' meaning, commands' meaning.
//!
//! A record's way: the handle below → [`state`](self) (readable from here on) → `queue` → `committer` → [`format`] →
//! [`disk`]; `preparer` keeps segments ready; `reader` fetches what left the cache; `recovery` does it all backwards.
//!
//! Invariants: `acked_is_durable` (state, committer, recovery), `bounded` (every field of [`WalConfig`]).

pub mod aligned;
mod cache;
mod committer;
pub mod config;
pub mod disk;
pub mod format;
mod group;
mod metrics;
mod preparer;
mod queue;
mod reader;
mod recovery;
mod segments;
mod state;

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use prometheus_client::registry::Registry;

use crate::command::GroupId;
pub use config::{GroupLog, WalConfig, WalDone, WalEntry, WalError};

use aligned::AlignedBuffer;
use committer::Committer;
use disk::{Directory, Disk};
use format::Record;
use metrics::Metrics;
use preparer::Preparer;
use state::{Found, Shared, State};

/// What recovery found, per group.
pub type Recovered = HashMap<GroupId, GroupLog>;

/// Handle of an open log; cheap to clone. The log closes (everything queued is written first) with the last handle.
#[derive(Clone)]
pub struct Wal {
    open: Arc<Open>,
}

struct Open {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Wal {
    /// Opens or creates the log in `dir` (created if absent) and recovers its groups. Blocks on the disk.
    pub fn open(dir: &Path, config: WalConfig, metrics: &mut Registry) -> Result<(Wal, Recovered), WalError> {
        Wal::open_on(Arc::new(Directory::open(dir)?), config, metrics)
    }

    /// Like [`Wal::open`], on any disk.
    pub fn open_on(
        disk: Arc<dyn Disk>,
        config: WalConfig,
        metrics: &mut Registry,
    ) -> Result<(Wal, Recovered), WalError> {
        config.check()?;
        let found = recovery::recover(disk.as_ref(), &config)?;
        // Unpredictable to guests, whose payload must not pass for a batch; std's hasher keys come from the system.
        let log = found.log.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        let recovered = found.groups.iter().map(|(id, group)| (*id, group.view.log())).collect();
        let metrics = Metrics::new(metrics);
        metrics.segments(&found.segments);
        let state = State::new(found.groups, found.segments, config.cache_bytes);
        let shared = Arc::new(Shared::new(config, metrics, state));
        let committer = Committer {
            shared: shared.clone(),
            log,
            sequence: found.sequence,
            announced: found.announced,
            cursor: found.cursor,
            buffer: AlignedBuffer::default(),
            last: None,
        };
        let preparer = Preparer { shared: shared.clone(), disk, log };
        let threads = vec![
            spawn("wal-commit", move || committer.run())?,
            spawn("wal-prepare", move || preparer.run())?,
        ];
        Ok((Wal { open: Arc::new(Open { shared, threads: Mutex::new(threads) }) }, recovered))
    }

    /// Queues entries and returns at once; they are readable on return. `done` is told after the sync that covers them.
    /// Entries must continue the group's log without a gap, else `done` gets `InvalidInput` and nothing is queued.
    pub fn append(&self, group: GroupId, entries: Vec<WalEntry>, done: WalDone) {
        let shared = &self.open.shared;
        let mut state = shared.lock();
        let queued = match state.refusal() {
            Some(refusal) => Err((done, refusal)),
            None => state.append(group, entries, done, &shared.config),
        };
        match queued {
            Ok(()) => shared.queued(state),
            Err((done, error)) => {
                drop(state);
                done.tell(Err(error));
            }
        }
    }

    /// Queues a vote (at most 64 KiB); the latest one is kept for ever, or until the group is removed.
    pub fn save_vote(&self, group: GroupId, vote: Bytes, done: WalDone) {
        self.control(group, Record::Vote(vote), done);
    }

    /// Removes every entry after `index` (`None`: every entry). Reads see it at once.
    pub fn truncate_after(&self, group: GroupId, index: Option<u64>, done: WalDone) {
        self.control(group, Record::Truncate(index.map_or(0, |index| index + 1)), done);
    }

    /// Removes entries up to and including `upto`, which may lie past the last one (a snapshot was installed), and keeps
    /// `state` (at most 64 KiB) with it. Durable with the next sync, hence never later than anything queued after it.
    pub fn purge(&self, group: GroupId, upto: u64, state: Bytes) {
        self.control(group, Record::Purge(upto, state), WalDone::Nobody);
    }

    /// Forgets the group: entries, vote, purge state.
    pub fn remove_group(&self, group: GroupId, done: WalDone) {
        self.control(group, Record::Remove, done);
    }

    fn control(&self, group: GroupId, record: Record, done: WalDone) {
        let shared = &self.open.shared;
        let mut state = shared.lock();
        let refusal = state.refusal().or_else(|| config::too_large(&record));
        match refusal {
            None => {
                state.control(group, record, done);
                shared.queued(state);
            }
            Some(error) => {
                drop(state);
                done.tell(Err(error));
            }
        }
    }

    /// Entries of `range` that are present, in order, up to `max_bytes` but at least one. From memory, else from the
    /// disk (blocking), checked by crc; a bad record is `InvalidData`.
    pub fn read(&self, group: GroupId, range: Range<u64>, max_bytes: u64) -> io::Result<Vec<WalEntry>> {
        let found = self.open.shared.lock().find(group, range.start, range.end, max_bytes);
        let on_disk = found.iter().filter(|found| matches!(found, Found::OnDisk { .. })).count();
        self.open.shared.metrics.disk_reads.inc_by(on_disk as u64);
        reader::load(group, found)
    }

    /// Like [`Wal::read`], but `None` instead of touching the disk: for callers that must not block.
    pub fn read_cached(&self, group: GroupId, range: Range<u64>, max_bytes: u64) -> Option<Vec<WalEntry>> {
        let found = self.open.shared.lock().find(group, range.start, range.end, max_bytes);
        let cached = |found| match found {
            Found::Cached(entry) => Some(entry),
            Found::OnDisk { .. } => None,
        };
        found.into_iter().map(cached).collect()
    }

    /// What the log holds of the group now (queued records included); `None` if it never heard of it.
    pub fn group(&self, group: GroupId) -> Option<GroupLog> {
        self.open.shared.lock().groups.get(&group).map(|owner| owner.view.log())
    }

    /// Index and bytes of each entry that the log holds of the group, in order.
    pub fn lengths(&self, group: GroupId) -> Vec<(u64, u64)> {
        self.open.shared.lock().groups.get(&group).map(|owner| owner.view.lengths()).unwrap_or_default()
    }

    /// Groups whose unpurged entries keep the oldest segments in use while the log is longer than its limit: the caller
    /// checkpoints and purges them. Empty below the limit.
    pub fn pinning(&self) -> Vec<GroupId> {
        self.open.shared.lock().pinning(self.open.shared.config.limit_bytes)
    }

    /// False when no segment is left behind the current one and none can be made, or the log has failed: proposals must be
    /// refused before they are logged. Turns true again by itself.
    pub fn spare(&self) -> bool {
        self.open.shared.spare.load(Ordering::Relaxed)
    }

    /// True once a write or sync has failed: every append fails from then on, and the process must step down.
    pub fn poisoned(&self) -> bool {
        self.open.shared.poisoned.load(Ordering::Acquire)
    }

    /// Waits until the log is [poisoned](Wal::poisoned), and says why.
    pub async fn failed(&self) -> String {
        let mut failed = self.open.shared.failed.subscribe();
        let cause = failed.wait_for(Option::is_some).await;
        cause.ok().and_then(|cause| cause.clone()).unwrap_or_default()
    }

    /// Writes everything queued, then stops the threads. Idempotent; later appends fail.
    pub fn close(&self) {
        self.open.close();
    }
}

impl Open {
    fn close(&self) {
        let mut state = self.shared.lock();
        state.closing = true;
        self.shared.queued(state);
        self.shared.chores.notify_one();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        // The last handle may die with a `WalDone` on the committer itself: nobody can wait for the end then.
        if threads.iter().any(|thread| thread.thread().id() == std::thread::current().id()) {
            return;
        }
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a write-ahead log thread panicked");
            }
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.close();
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, WalError> {
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(body);
    spawned.map_err(|source| WalError::Io { action: "start thread", path: name.into(), source })
}
