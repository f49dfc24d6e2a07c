//! The log's limits and what it tells the world: configuration, errors, completion.
//!
//! Called by the owner of a data directory ([`crate::host`]) and by every other module of the log. Knows no file.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::format::{BATCH_HEADER, Record, SECTOR, SEGMENT_HEADER};
use crate::command::LogCommand;

/// Limits of one write-ahead log. Every field is a bound (`bounded`); the defaults suit one SSD with 100 copysets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalConfig {
    /// Size of a segment file in bytes, a multiple of 4096. An entry must fit into one segment.
    pub segment_bytes: u64,
    /// Segments kept ready ahead of the one that is written, so that an append never waits for a file to be zeroed.
    pub spare_segments: u32,
    /// Length in bytes of all segments in use beyond which [`super::Wal::pinning`] names the groups to checkpoint. Up to
    /// this size freed segments are kept for reuse; beyond it their files are deleted.
    pub limit_bytes: u64,
    /// Hard bound in bytes of all segment files together. Reached, no segment is added and [`super::Wal::spare`] is false.
    pub max_bytes: u64,
    /// Bytes of the newest entries kept in memory for reads (entries not yet on disk are kept beyond it).
    pub cache_bytes: u64,
    /// Bytes that may wait to be written; at most one append more does. Beyond it entries are refused, so whoever appends
    /// must bound what it has under way. At least four times the largest entry.
    pub queue_bytes: u64,
    /// Bytes after which a batch is closed: one write and one sync cover at most this much (or one larger entry).
    pub batch_bytes: u64,
    /// How long after a failed preparation of a segment (disk full) the next one is tried.
    pub retry: Duration,
}

impl Default for WalConfig {
    fn default() -> Self {
        WalConfig {
            segment_bytes: 64 << 20,
            spare_segments: 2,
            limit_bytes: 1 << 30,
            max_bytes: 4 << 30,
            cache_bytes: 64 << 20,
            queue_bytes: 256 << 20,
            batch_bytes: 4 << 20,
            retry: Duration::from_secs(1),
        }
    }
}

impl WalConfig {
    /// Bytes at the end of each segment that entries leave to purges, votes and removals: what makes room needs room.
    pub(super) fn reserve_bytes(&self) -> u64 {
        (self.segment_bytes / 8).min(256 << 10)
    }

    /// Most bytes an encoded entry may have.
    pub(super) fn max_entry_bytes(&self) -> u64 {
        let used = (SEGMENT_HEADER + BATCH_HEADER + SECTOR) as u64 + self.reserve_bytes();
        self.segment_bytes.saturating_sub(used)
    }

    /// Refuses what cannot work.
    pub(super) fn check(&self) -> Result<(), WalError> {
        let rules = [
            (self.segment_bytes.is_multiple_of(4096), "segment_bytes must be a multiple of 4096"),
            (self.segment_bytes >= 16 << 10, "segment_bytes must be at least 16384"),
            (self.segment_bytes <= 1 << 30, "segment_bytes must be at most 1 GiB"),
            (self.spare_segments >= 1, "spare_segments must be at least 1"),
            (self.limit_bytes >= 2 * self.segment_bytes, "limit_bytes must hold 2 segments"),
            (self.max_bytes >= self.limit_bytes, "max_bytes must not be below limit_bytes"),
            (!self.retry.is_zero(), "retry must not be zero"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(WalError::Config((*rule).to_owned())),
            None => Ok(()),
        }
    }
}

/// Most bytes of a vote or purge state: they are written again whenever their segment is recycled.
const MAX_STATE: usize = 64 << 10;

/// The refusal of a vote or purge state over its limit.
pub(super) fn too_large(record: &Record) -> Option<io::Error> {
    let (Record::Vote(state) | Record::Purge(_, state)) = record else { return None };
    (state.len() > MAX_STATE).then(|| {
        let length = state.len();
        let message = format!("vote or purge state is too large, bytes={length} limit={MAX_STATE}");
        io::Error::new(io::ErrorKind::InvalidInput, message)
    })
}

/// Why a log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// The disk refused.
    #[error("write-ahead log io failed, action={action} path={path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Bytes inside the log are bad although valid ones follow: acknowledged entries may be lost, so nothing is cut.
    /// This replica must be rebuilt from its peers.
    #[error(
        "write-ahead log is corrupt inside; nothing was cut; rebuild this replica from its peers, \
         segment={segment} offset={offset}"
    )]
    Corrupt {
        /// File name of the segment.
        segment: String,
        /// Byte offset of the first bad batch in it.
        offset: u64,
    },
    /// Written by another version of this program.
    #[error(
        "write-ahead log format is not known to this version; run the version that wrote it, segment={segment} version={version}"
    )]
    Version {
        /// File name of the segment.
        segment: String,
        /// The version number found.
        version: u32,
    },
    /// Another process has the directory open.
    #[error("write-ahead log is in use by another process; stop it first, path={0}")]
    InUse(PathBuf),
    /// The configuration contradicts itself.
    #[error("write-ahead log configuration is invalid, {0}")]
    Config(String),
}

/// One entry of a group's log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalEntry {
    /// Index in the group's log.
    pub index: u64,
    /// The log store's own encoding of the log id and the kind of entry (at most 64 KiB).
    pub header: Bytes,
    /// What was proposed; empty for entries that carry no command.
    pub command: LogCommand,
}

/// Whom to tell when a record is durable, or why it never will be.
///
/// It is told on the log's committing thread: a call must do no more than hand a result over (send, wake).
#[derive(Default)]
pub enum WalDone {
    /// Nobody waits.
    #[default]
    Nobody,
    /// A task waits.
    Oneshot(oneshot::Sender<io::Result<()>>),
    /// Called once with the outcome.
    Call(Box<dyn FnOnce(io::Result<()>) + Send>),
}

impl WalDone {
    /// A `WalDone` and the receiver that gets its outcome.
    pub fn oneshot() -> (WalDone, oneshot::Receiver<io::Result<()>>) {
        let (sender, receiver) = oneshot::channel();
        (WalDone::Oneshot(sender), receiver)
    }

    /// A `WalDone` that calls `tell` with the outcome.
    pub fn call(tell: impl FnOnce(io::Result<()>) + Send + 'static) -> WalDone {
        WalDone::Call(Box::new(tell))
    }

    pub(super) fn tell(self, outcome: io::Result<()>) {
        match self {
            WalDone::Nobody => {}
            // The receiver may have gone: its waiter was cancelled and needs no answer.
            WalDone::Oneshot(sender) => drop(sender.send(outcome)),
            WalDone::Call(tell) => tell(outcome),
        }
    }
}

/// What the log holds of one group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupLog {
    /// Latest saved vote.
    pub vote: Option<Bytes>,
    /// Latest purge: the last purged index and the state saved with it.
    pub purged: Option<(u64, Bytes)>,
    /// Index of the first entry present; equal to `next` when there is none.
    pub first: u64,
    /// Index the next appended entry must have (any index when nothing was ever appended or purged: then 0).
    pub next: u64,
}
