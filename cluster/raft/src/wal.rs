//! The write-ahead log of a data directory, shared by all its raft groups.

pub mod config;

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;
use prometheus_client::registry::Registry;

use crate::command::GroupId;
pub use config::{GroupLog, WalConfig, WalDone, WalEntry, WalError};

/// What recovery found, per group.
pub type Recovered = HashMap<GroupId, GroupLog>;

/// Handle of an open log; cheap to clone. The log closes (everything queued is written first) with the last handle.
#[derive(Clone)]
pub struct Wal {}

impl Wal {
    /// Opens or creates the log in `dir` (created if absent) and recovers its groups. Blocks on the disk.
    pub fn open(dir: &Path, config: WalConfig, metrics: &mut Registry) -> Result<(Wal, Recovered), WalError> {
        panic!("under construction {dir:?} {config:?} {metrics:?}")
    }

    /// Queues entries and returns at once; they are readable on return. `done` is told after the sync that covers them.
    /// Entries must continue the group's log without a gap, else `done` gets `InvalidInput` and nothing is queued.
    pub fn append(&self, group: GroupId, entries: Vec<WalEntry>, done: WalDone) {
        let _ = (group, entries, done);
    }

    /// Queues a vote (at most 64 KiB); the latest one is kept for ever, or until the group is removed.
    pub fn save_vote(&self, group: GroupId, vote: Bytes, done: WalDone) {
        let _ = (group, vote, done);
    }

    /// Removes every entry after `index` (`None`: every entry). Reads see it at once.
    pub fn truncate_after(&self, group: GroupId, index: Option<u64>, done: WalDone) {
        let _ = (group, index, done);
    }

    /// Removes entries up to and including `upto`, which may lie past the last one (a snapshot was installed), and keeps
    /// `state` (at most 64 KiB) with it. Durable with the next sync, hence never later than anything queued after it.
    pub fn purge(&self, group: GroupId, upto: u64, state: Bytes) {
        let _ = (group, upto, state);
    }

    /// Forgets the group: entries, vote, purge state.
    pub fn remove_group(&self, group: GroupId, done: WalDone) {
        let _ = (group, done);
    }

    /// Entries of `range` that are present, in order, up to `max_bytes` but at least one. From memory, else from the
    /// disk (blocking), checked by crc; a bad record is `InvalidData`.
    pub fn read(&self, group: GroupId, range: Range<u64>, max_bytes: u64) -> io::Result<Vec<WalEntry>> {
        let _ = (group, range, max_bytes);
        Ok(Vec::new())
    }

    /// Like [`Wal::read`], but `None` instead of touching the disk: for callers that must not block.
    pub fn read_cached(&self, group: GroupId, range: Range<u64>, max_bytes: u64) -> Option<Vec<WalEntry>> {
        let _ = (group, range, max_bytes);
        None
    }

    /// What the log holds of the group now (queued records included); `None` if it never heard of it.
    pub fn group(&self, group: GroupId) -> Option<GroupLog> {
        let _ = group;
        None
    }

    /// Groups whose unpurged entries keep the oldest segments in use while the log is longer than its limit: the caller
    /// checkpoints and purges them. Empty below the limit.
    pub fn pinning(&self) -> Vec<GroupId> {
        Vec::new()
    }

    /// False when no segment is left behind the current one and none can be made, or too much waits to be written:
    /// proposals must be refused before they are logged. Turns true again by itself.
    pub fn spare(&self) -> bool {
        false
    }

    /// True once a write or sync has failed: every append fails from then on, and the process must step down.
    pub fn poisoned(&self) -> bool {
        false
    }

    /// Writes everything queued, then stops the threads. Idempotent; later appends fail.
    pub fn close(&self) {}
}
