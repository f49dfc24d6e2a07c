//! The user's state machine in openraft's trait: apply's stream becomes batches, answers go to the proposers, a
//! checkpoint is openraft's snapshot build.
//!
//! Called by openraft's state machine task only, so nothing here needs a lock but the last checkpoint's meta.
//! `log_before_chunk`: a batch is applied only after this replica's own log has it on disk.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::{Stream, TryStreamExt};
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder, Snapshot};
use tokio::sync::oneshot;

use crate::command::{GroupId, LogCommand, LogPosition};
use crate::log_store::LogStore;
use crate::metrics::Metrics;
use crate::places::Placed;
use crate::state_machine::{Checkpoint, CheckpointJob, SnapshotSink, SnapshotSource, StateMachine};
use crate::types::{LogId, SnapshotMeta, StoredMembership, TypeConfig, log_id, position};
use crate::{bundle, codec};

/// A batch given to `apply` ends at this many bytes (one larger command goes alone) …
const BATCH_BYTES_MAX: usize = 4 << 20;
/// … or at this many commands.
const BATCH_COMMANDS_MAX: usize = 512;

type OpenraftSnapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotData>;

/// What openraft carries as a snapshot: a handle, never the bytes.
pub(crate) enum SnapshotData {
    /// Nothing to move (a checkpoint just built, or asked for at start).
    Local,
    /// This replica's checkpoint, to be sent.
    Source(Box<dyn SnapshotSource>),
    /// What a leader has sent, to be installed.
    Sink(Box<dyn SnapshotSink>),
}

pub(crate) struct Adapter<S> {
    group: GroupId,
    machine: S,
    log: LogStore,
    applied: Option<LogId>,
    membership: StoredMembership,
    /// The last entry in the log at the start: what is applied up to there may have been applied before.
    replay_until: Option<u64>,
    /// The durable checkpoint at the start.
    recovered: Option<SnapshotMeta>,
    /// False while openraft starts and only wants to know where the checkpoint is.
    started: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
    /// Dropped with this: tells that nothing will be applied any more, a panic in `apply` included.
    _alive: oneshot::Sender<Infallible>,
}

impl<S: StateMachine> Adapter<S> {
    pub(crate) fn new(
        group: GroupId,
        machine: S,
        log: LogStore,
        started: Arc<AtomicBool>,
        metrics: Arc<Metrics>,
        alive: oneshot::Sender<Infallible>,
    ) -> io::Result<Adapter<S>> {
        let last = machine.checkpoint();
        let membership = codec::decode_membership(&last.membership)?;
        let applied = last.position.as_ref().map(log_id);
        let recovered = to_meta(&last)?;
        if let Some(position) = &last.position {
            log.checkpointed(position.index);
        }
        let replay_until = log.last().map(|last| last.index);
        let _alive = alive;
        Ok(Adapter {
            group,
            machine,
            log,
            applied,
            membership,
            replay_until,
            recovered,
            started,
            metrics,
            _alive,
        })
    }

    /// A sink for a snapshot that a leader wants to send.
    pub(crate) fn sink(&mut self) -> io::Result<Box<dyn SnapshotSink>> {
        self.machine.snapshot_sink()
    }

    async fn flush(&mut self, batch: &mut Batch) -> io::Result<()> {
        let Some((last, _)) = batch.commands.last() else { return Ok(()) };
        self.log.wait_durable(last.index).await?;
        let count = batch.commands.len();
        let replayed = batch.commands.partition_point(|(at, _)| Some(at.index) <= self.replay_until);
        self.metrics.replayed.inc_by(replayed as u64);
        let answers = self.machine.apply(std::mem::take(&mut batch.commands)).await?;
        if answers.len() != count {
            return Err(io::Error::other("apply did not return one answer per command"));
        }
        self.metrics.applied.inc_by(count as u64);
        let mut answers = answers.into_iter();
        for (commands, responder) in batch.responders.drain(..) {
            let answers = answers.by_ref().take(commands);
            match responder {
                Some(responder) => responder.send(answers.collect()),
                None => answers.for_each(drop),
            }
        }
        batch.bytes = 0;
        Ok(())
    }

    async fn apply_all<T>(&mut self, mut entries: T) -> io::Result<()>
    where
        T: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batch = Batch::default();
        let mut last = self.applied;
        while let Some((entry, responder)) = entries.try_next().await? {
            last = Some(entry.log_id);
            match entry.payload {
                EntryPayload::Normal(placed) => {
                    if batch.is_full(&placed) {
                        self.flush(&mut batch).await?;
                    }
                    batch.push(position(&entry.log_id), placed, responder)?;
                }
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    answer_empty(responder);
                }
                EntryPayload::Blank => answer_empty(responder),
            }
        }
        self.flush(&mut batch).await?;
        self.applied = last;
        Ok(())
    }
}

fn answer_empty(responder: Option<ApplyResponder<TypeConfig>>) {
    if let Some(responder) = responder {
        responder.send(Vec::new());
    }
}

#[derive(Default)]
struct Batch {
    commands: Vec<(LogPosition, LogCommand)>,
    /// How many commands of the batch are of one entry, and who waits for their answers.
    responders: Vec<(usize, Option<ApplyResponder<TypeConfig>>)>,
    bytes: usize,
}

impl Batch {
    fn is_full(&self, next: &Placed) -> bool {
        self.commands.len() >= BATCH_COMMANDS_MAX
            || (!self.commands.is_empty() && self.bytes + next.bytes() > BATCH_BYTES_MAX)
    }

    /// Adds an entry: its commands stay in one batch, since they share a position.
    fn push(
        &mut self,
        at: LogPosition,
        placed: Placed,
        responder: Option<ApplyResponder<TypeConfig>>,
    ) -> io::Result<()> {
        self.bytes += placed.bytes();
        let before = self.commands.len();
        if placed.is_bundle {
            let commands = bundle::untie(&placed.command)?;
            self.commands.extend(commands.into_iter().map(|command| (at, command)));
        } else {
            self.commands.push((at, placed.command));
        }
        self.responders.push((self.commands.len() - before, responder));
        Ok(())
    }
}

impl<S: StateMachine> RaftStateMachine<TypeConfig> for Adapter<S> {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<T>(&mut self, entries: T) -> io::Result<()>
    where
        T: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let outcome = self.apply_all(entries).await;
        if let Err(error) = &outcome {
            tracing::error!(group = %self.group, %error, "apply failed, this replica stops; restart the process to recover it");
        }
        outcome
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let meta = SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() };
        let job = Mutex::new(Some(self.machine.begin_checkpoint()));
        Builder { group: self.group, job, meta, log: self.log.clone(), metrics: self.metrics.clone() }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotData) -> io::Result<()> {
        let SnapshotData::Sink(sink) = snapshot else {
            return Err(io::Error::other("a snapshot without contents can not be installed"));
        };
        sink.finish().await?;
        self.machine.installed(to_checkpoint(meta)).await?;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        tracing::info!(group = %self.group, meta = %meta, "snapshot installed");
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<OpenraftSnapshot>> {
        if !self.started.load(Ordering::Acquire) {
            let meta = self.recovered.clone();
            return Ok(meta.map(|meta| Snapshot { meta, snapshot: SnapshotData::Local }));
        }
        let (checkpoint, source) = self.machine.snapshot_source()?;
        let meta = to_meta(&checkpoint)?;
        Ok(meta.map(|meta| Snapshot { meta, snapshot: SnapshotData::Source(source) }))
    }
}

fn to_checkpoint(meta: &SnapshotMeta) -> Checkpoint {
    Checkpoint {
        position: meta.last_log_id.as_ref().map(position),
        membership: codec::encode_membership(&meta.last_membership),
    }
}

/// `None` before the first checkpoint.
fn to_meta(checkpoint: &Checkpoint) -> io::Result<Option<SnapshotMeta>> {
    let Some(position) = &checkpoint.position else { return Ok(None) };
    let last_membership = codec::decode_membership(&checkpoint.membership)?;
    Ok(Some(SnapshotMeta { last_log_id: Some(log_id(position)), last_membership }))
}

/// A checkpoint under way, as openraft's snapshot build.
pub(crate) struct Builder {
    group: GroupId,
    job: Mutex<Option<Box<dyn CheckpointJob>>>,
    meta: SnapshotMeta,
    log: LogStore,
    metrics: Arc<Metrics>,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> io::Result<OpenraftSnapshot> {
        let job = self.job.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let job = job.ok_or_else(|| io::Error::other("a checkpoint is built once"))?;
        if let Err(error) = job.run(to_checkpoint(&self.meta)).await {
            tracing::error!(group = %self.group, %error, "checkpoint failed, this replica stops");
            return Err(error);
        }
        if let Some(last) = &self.meta.last_log_id {
            self.log.checkpointed(last.index);
        }
        self.metrics.checkpoints.inc();
        Ok(Snapshot { meta: self.meta.clone(), snapshot: SnapshotData::Local })
    }
}
