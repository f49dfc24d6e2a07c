//! The metadata as a replicated state machine: the state in memory, the tables under it, and snapshots of it.
//!
//! Called by raft. A batch is applied in memory, written in one transaction with its position, then answered.
//! Batches that raft applies again after a restart are recognised by position and skipped, so applying is idempotent
//! and the tables may be newer than the last checkpoint.
//! Must never know: what commands mean, who proposed them.

mod snapshot;

use crate::command::Command;
use crate::metrics::ApplyMetrics;
use crate::refusal::Refusal;
use crate::state::MetaState;
use crate::store::Store;
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use spline_raft::{
    Answer, Checkpoint, CheckpointJob, LogCommand, LogPosition, SnapshotSink, SnapshotSource, StateMachine,
};
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

/// The state that this process's services read; changed only by [`Machine::apply`].
#[derive(Clone, Debug, Default)]
pub struct SharedState(Arc<RwLock<MetaState>>);

impl SharedState {
    /// Looks at the state. Short: applying waits meanwhile.
    pub fn read<T>(&self, look: impl FnOnce(&MetaState) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, change: impl FnOnce(&mut MetaState) -> T) -> T {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The state machine of the metadata's raft group.
pub struct Machine {
    state: SharedState,
    store: Arc<Store>,
    /// The last position that the tables hold.
    applied: Option<LogPosition>,
    checkpoint: Checkpoint,
    metrics: ApplyMetrics,
}

impl Machine {
    /// Loads the state from the tables.
    ///
    /// # Errors
    /// If they can not be read.
    pub fn load(store: Arc<Store>, metrics: ApplyMetrics) -> io::Result<Self> {
        let loaded = store.load()?;
        let state = SharedState(Arc::new(RwLock::new(loaded.state)));
        Ok(Self { state, store, applied: loaded.applied, checkpoint: loaded.checkpoint, metrics })
    }

    /// The state, for reading.
    pub fn state(&self) -> SharedState {
        self.state.clone()
    }

    /// The last position that the tables hold; `None` for a new directory.
    pub fn applied(&self) -> Option<LogPosition> {
        self.applied
    }

    /// Applies one command in memory; one that is already part of the state is skipped.
    fn apply_one(&self, position: LogPosition, command: &LogCommand) -> io::Result<Answer> {
        if self.applied.is_some_and(|applied| position.index <= applied.index) {
            let replayed = Refusal::unavailable("the command was applied before a restart");
            return encode(&Err(replayed));
        }
        let decoded = Command::decode(&command.meta).map_err(io::Error::other)?;
        let outcome = self.state.write(|state| state.apply(&decoded));
        self.metrics.applied(decoded.name(), &outcome);
        encode(&outcome)
    }
}

fn encode(outcome: &crate::command::Outcome) -> io::Result<Answer> {
    Ok(Bytes::from(serde_json::to_vec(outcome)?))
}

impl StateMachine for Machine {
    fn checkpoint(&self) -> Checkpoint {
        self.checkpoint.clone()
    }

    async fn apply(&mut self, batch: Vec<(LogPosition, LogCommand)>) -> io::Result<Vec<Answer>> {
        let start = Instant::now();
        let mut answers = Vec::with_capacity(batch.len());
        for (position, command) in &batch {
            answers.push(self.apply_one(*position, command)?);
        }
        let last = batch.last().map(|(position, _)| *position);
        let newer = last.filter(|last| self.applied.is_none_or(|applied| applied.index < last.index));
        if let Some(last) = newer {
            let rows: Vec<_> = self
                .state
                .write(|state| state.take_changed().into_iter().map(|key| (key, state.row(key))).collect());
            let store = Arc::clone(&self.store);
            blocking(move || store.record(&rows, Some(last))).await?;
            self.applied = Some(last);
            self.metrics.batch(start.elapsed());
        }
        Ok(answers)
    }

    fn begin_checkpoint(&mut self) -> Box<dyn CheckpointJob> {
        Box::new(Job { store: Arc::clone(&self.store) })
    }

    fn snapshot_source(&self) -> io::Result<(Checkpoint, Box<dyn SnapshotSource>)> {
        let dump = self.state.read(|state| snapshot::dump(state, self.applied));
        Ok((self.store.checkpoint()?, Box::new(snapshot::Source::new(dump))))
    }

    fn snapshot_sink(&mut self) -> io::Result<Box<dyn SnapshotSink>> {
        Ok(Box::new(snapshot::Sink::new(Arc::clone(&self.store))))
    }

    async fn installed(&mut self, checkpoint: Checkpoint) -> io::Result<()> {
        let store = Arc::clone(&self.store);
        let recorded = checkpoint.clone();
        let loaded = blocking(move || {
            store.record_checkpoint(&recorded)?;
            store.load()
        })
        .await?;
        self.state.write(|state| *state = loaded.state);
        self.applied = loaded.applied;
        self.checkpoint = checkpoint;
        Ok(())
    }
}

/// Every batch is durable when it is answered, so a checkpoint only has to be recorded.
struct Job {
    store: Arc<Store>,
}

impl CheckpointJob for Job {
    fn run(self: Box<Self>, checkpoint: Checkpoint) -> BoxFuture<'static, io::Result<()>> {
        blocking(move || self.store.record_checkpoint(&checkpoint)).boxed()
    }
}

/// Runs disk work off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests;
