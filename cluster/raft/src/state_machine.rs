//! What a user of the crate brings: the replicated state, its checkpoints and its snapshots.
//!
//! Called by `adapter` (openraft's apply stream turned into batches) and `snapshot`. Knows no openraft type.
//! Invariants: `replicas_identical` (apply is deterministic), `log_before_chunk` (apply runs only for entries that are
//! durable on a majority and in this replica's own log).

use std::future::Future;
use std::io;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::command::{Answer, LogCommand, LogPosition};

pub(crate) mod adapter;

/// What a durable checkpoint records: everything up to `position` is in the user's own files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// The last applied position it covers; `None` before the first entry.
    pub position: Option<LogPosition>,
    /// The group's membership at that position, in this crate's encoding: store it and give it back unread.
    pub membership: Bytes,
}

/// The replicated state of one group.
///
/// `apply` is called with committed entries in log order. After a restart everything past the last durable checkpoint
/// is applied again, so it must be idempotent. Commands of one entry share its position and come in one batch.
pub trait StateMachine: Send + Sync + 'static {
    /// What the last durable checkpoint recorded; read once when the group starts.
    fn checkpoint(&self) -> Checkpoint;

    /// Applies a batch in order and returns one answer per command. `Err` is fatal: this replica stops.
    fn apply(
        &mut self,
        batch: Vec<(LogPosition, LogCommand)>,
    ) -> impl Future<Output = io::Result<Vec<Answer>>> + Send;

    /// Captures what is dirty now; cheap. Applies go on while the job runs.
    fn begin_checkpoint(&mut self) -> Box<dyn CheckpointJob>;

    /// A reader over the last durable checkpoint, and that checkpoint: the two belong together. Contents may be newer
    /// than the checkpoint: the receiver replays the log from the checkpoint on, which is idempotent.
    fn snapshot_source(&self) -> io::Result<(Checkpoint, Box<dyn SnapshotSource>)>;

    /// A writer that replaces this replica's state.
    fn snapshot_sink(&mut self) -> io::Result<Box<dyn SnapshotSink>>;

    /// Called after the sink's `finish`: reload the state from what the sink wrote, record the checkpoint durably.
    fn installed(&mut self, checkpoint: Checkpoint) -> impl Future<Output = io::Result<()>> + Send;
}

/// A checkpoint under way.
pub trait CheckpointJob: Send {
    /// Syncs what was dirty, then durably records `checkpoint`. Blocking work belongs in `spawn_blocking`.
    fn run(self: Box<Self>, checkpoint: Checkpoint) -> BoxFuture<'static, io::Result<()>>;
}

/// The sending side of a snapshot.
pub trait SnapshotSource: Send {
    /// What there is to send, in the user's encoding (at most 32 MiB).
    fn manifest(&self) -> Bytes;
    /// One item of at most 1 MiB, numbered by the manifest.
    fn read(&mut self, item: u32) -> BoxFuture<'_, io::Result<Bytes>>;
}

/// The receiving side of a snapshot. Dropped without `finish` when the sender goes away; what it wrote may be kept, so
/// that the next `begin` asks for less.
pub trait SnapshotSink: Send {
    /// Reads the manifest and answers which items it still needs.
    fn begin(&mut self, manifest: Bytes) -> BoxFuture<'_, io::Result<Vec<u32>>>;
    /// Takes one item it asked for.
    fn write(&mut self, item: u32, data: Bytes) -> BoxFuture<'_, io::Result<()>>;
    /// Makes everything durable. The state is not in use before `StateMachine::installed`.
    fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>>;
}
