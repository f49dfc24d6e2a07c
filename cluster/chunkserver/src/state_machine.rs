//! The replicated state of one copyset: chunks and fence, changed by the log alone.
//!
//! Called by raft. Must not know: who proposes, the network, the metadata server.
//! Invariants: `replicas_identical` (every decision depends on the log alone; what depends on the disk, such as a full
//! one, makes apply wait, never answer differently), `log_before_chunk` (bytes reach a chunk file only here, and where a
//! damaged block is mended to what was applied before).

pub mod adoption;
pub mod meta;
pub mod relied;
pub mod snapshot;

use crate::command::{Command, encode_answer};
use crate::fence::FenceTable;
use crate::metrics::Metrics;
use crate::store::{ChunkStore, Merge, Patience, StoreError, Unsynced};
use adoption::Adoption;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use meta::Meta;
use relied::Relied;
use snapshot::{Sink, Source, Staged};
use spline_raft::{
    Answer, Checkpoint, CheckpointJob, LogCommand, LogPosition, SnapshotSink, SnapshotSource, StateMachine,
};
use spline_types::{ChunkCommand, ChunkOp, CopysetId, Fault, Invalid, VolumeId};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Writes of more than this leave the runtime's thread: copying them into the page cache takes too long there.
const INLINE_BYTES: usize = 128 << 10;
/// How often a command that finds the disk full is tried again.
const FULL_RETRY: Duration = Duration::from_millis(500);

/// Where a copyset's living chunks lie, in its directory.
pub const CHUNKS: &str = "chunks";

/// What the state machine shares with its copyset.
pub struct Shared {
    /// Which copyset.
    pub copyset: CopysetId,
    /// Its directory.
    pub dir: PathBuf,
    /// Its chunks.
    pub store: ChunkStore,
    /// Its fence as of the last applied entry. Written by `apply` alone.
    pub fence: RwLock<FenceTable>,
    /// Up to this index the log is being applied again after a start; `u64::MAX` until it is known.
    pub replay_until: AtomicU64,
    /// An entry waits for space on a full disk: the replica should not lead.
    pub starved: AtomicBool,
    /// Cancelled when the copyset stops.
    pub stop: CancellationToken,
    /// Counters of the process.
    pub metrics: Arc<Metrics>,
    /// The chunks and the fence of the last durable checkpoint.
    durable: Mutex<Meta>,
    /// Held on a blocking thread while the checkpoint on disk is replaced, by a checkpoint or by a snapshot.
    recording: Mutex<()>,
    relied: Mutex<Relied>,
}

impl Shared {
    /// The state over `store`, as the checkpoint `durable` says.
    pub fn new(
        copyset: CopysetId,
        dir: PathBuf,
        store: ChunkStore,
        durable: Meta,
        metrics: Arc<Metrics>,
    ) -> Self {
        let fence = RwLock::new(durable.fence.clone());
        let (replay_until, stop) = (AtomicU64::new(u64::MAX), CancellationToken::new());
        let (durable, recording, relied) = (Mutex::new(durable), Mutex::default(), Mutex::default());
        let starved = AtomicBool::new(false);
        Self { copyset, dir, store, fence, replay_until, starved, stop, metrics, durable, recording, relied }
    }

    /// The chunks that a snapshot under way relies on.
    pub fn relied(&self) -> MutexGuard<'_, Relied> {
        self.relied.lock().expect("no panic under the lock")
    }

    fn durable(&self) -> Meta {
        self.durable.lock().expect("no panic under the lock").clone()
    }

    fn set_durable(&self, meta: Meta) {
        *self.durable.lock().expect("no panic under the lock") = meta;
    }

    /// Makes a checkpoint durable, unless a snapshot has brought a newer one since it was begun. Blocks.
    fn record(&self, meta: &Meta) -> io::Result<()> {
        let _recording = self.recording.lock().expect("no panic under the lock");
        if self.durable().position > meta.position {
            return Ok(());
        }
        meta.save(&self.dir, self.copyset)?;
        self.set_durable(meta.clone());
        Ok(())
    }

    /// Puts a snapshot in place of the chunks and the checkpoint; may be tried again. Blocks.
    fn adopt(&self, adoption: &Adoption) -> io::Result<()> {
        let _recording = self.recording.lock().expect("no panic under the lock");
        adoption.save(&self.dir, self.copyset)?;
        adoption.carry_out(self.copyset, &self.dir, &self.store)?;
        self.set_durable(adoption.meta.clone());
        Ok(())
    }

    /// One try of a command that passed the fence.
    fn carry_out(
        &self,
        command: &ChunkCommand,
        payload: &[u8],
        merge: Merge,
        patience: Patience,
    ) -> Result<(), StoreError> {
        let ChunkCommand { chunk, range, .. } = *command;
        let mut relied = self.relied();
        relied.before_change(self, chunk, patience)?;
        match command.op {
            ChunkOp::Write => self.store.write(chunk, range, payload, merge, patience),
            ChunkOp::WriteZeroes => self.store.write_zeroes(chunk, range, merge, patience),
            // The last block's discard moves the file, which may wait for the filesystem.
            ChunkOp::Discard if patience == Patience::Inline && self.store.has(chunk) => {
                Err(StoreError::WouldBlock)
            }
            ChunkOp::Discard => self.store.discard(chunk, range, merge, patience),
            ChunkOp::Read | ChunkOp::Status | ChunkOp::Peek => Ok(()),
        }
    }
}

/// The state machine that raft drives.
pub struct CopysetMachine {
    shared: Arc<Shared>,
    staged: Arc<Mutex<Option<Staged>>>,
}

impl CopysetMachine {
    /// A machine over the copyset's state.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, staged: Arc::default() }
    }

    async fn apply_one(&self, position: LogPosition, logged: LogCommand) -> io::Result<Result<(), Fault>> {
        let command = Command::decode(&logged.meta).map_err(|why| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("log entry is not a command: {why} position={position}"),
            )
        })?;
        match command {
            Command::Chunk(command) => {
                let fit =
                    command.op != ChunkOp::Write || logged.payload.len() == command.range.length() as usize;
                if !fit || !command.op.modifies() {
                    return Ok(Err(Fault::Invalid(Invalid::Flags)));
                }
                if let Err(fault) = self.fence(|fence| fence.judge(command.chunk.volume, command.fence)) {
                    self.shared.metrics.fenced.inc();
                    return Ok(Err(fault));
                }
                self.apply_chunk(position, command, logged.payload).await.map(Ok)
            }
            Command::Fence { volume, epoch } => Ok(self.fence(|fence| fence.advance(volume, epoch))),
            Command::DeleteVolume(volume) => {
                self.fence(|fence| fence.delete(volume));
                self.delete_chunks(position, volume).await.map(Ok)
            }
        }
    }

    async fn apply_chunk(
        &self,
        position: LogPosition,
        command: ChunkCommand,
        payload: Bytes,
    ) -> io::Result<()> {
        let replaying = position.index <= self.shared.replay_until.load(Ordering::Acquire);
        let merge = if replaying { Merge::Replaying } else { Merge::Verified };
        let mut done = match payload.len() <= INLINE_BYTES {
            true => self.shared.carry_out(&command, &payload, merge, Patience::Inline),
            false => Err(StoreError::WouldBlock),
        };
        let mut told = false;
        while self.once_more(position, done, &mut told).await? {
            let (shared, payload) = (Arc::clone(&self.shared), payload.clone());
            done =
                blocking(move || Ok(shared.carry_out(&command, &payload, merge, Patience::Blocking))).await?;
        }
        Ok(())
    }

    async fn delete_chunks(&self, position: LogPosition, volume: VolumeId) -> io::Result<()> {
        let (mut done, mut told) = (Err(StoreError::WouldBlock), false);
        while self.once_more(position, done, &mut told).await? {
            let shared = Arc::clone(&self.shared);
            let work = move || -> Result<(), StoreError> {
                shared.relied().before_delete(&shared, volume)?;
                Ok(shared.store.delete_volume(volume)?)
            };
            done = blocking(move || Ok(work())).await?;
        }
        Ok(())
    }

    /// Whether what ended with `done` is to be tried once more. An entry in the log can not be refused any more: on a
    /// full disk it waits for space.
    async fn once_more(
        &self,
        position: LogPosition,
        done: Result<(), StoreError>,
        told: &mut bool,
    ) -> io::Result<bool> {
        match done {
            Ok(()) => return Ok(false),
            Err(StoreError::WouldBlock) => {}
            Err(StoreError::NoSpace) => {
                if !std::mem::replace(told, true) {
                    let copyset = self.shared.copyset;
                    tracing::error!(%copyset, %position, "disk is full, replica waits for space");
                }
                self.shared.starved.store(true, Ordering::Release);
                let waited = wait_for_space(&self.shared).await;
                self.shared.starved.store(false, Ordering::Release);
                waited?;
            }
            Err(StoreError::Io(error)) => return Err(error),
            Err(error @ StoreError::Corrupt { .. }) => return Err(io::Error::other(error)),
        }
        Ok(true)
    }

    fn fence<T>(&self, change: impl FnOnce(&mut FenceTable) -> T) -> T {
        change(&mut self.shared.fence.write().expect("no panic under the lock"))
    }
}

impl StateMachine for CopysetMachine {
    fn checkpoint(&self) -> Checkpoint {
        let Meta { position, membership, .. } = self.shared.durable();
        Checkpoint { position, membership }
    }

    async fn apply(&mut self, batch: Vec<(LogPosition, LogCommand)>) -> io::Result<Vec<Answer>> {
        let start = Instant::now();
        if let Some((last, _)) = batch.last() {
            self.shared.relied().overtaken_at(*last);
        }
        let mut answers = Vec::with_capacity(batch.len());
        for (position, command) in batch {
            answers.push(encode_answer(self.apply_one(position, command).await?));
        }
        self.shared.metrics.apply_seconds.observe(start.elapsed().as_secs_f64());
        Ok(answers)
    }

    fn begin_checkpoint(&mut self) -> Box<dyn CheckpointJob> {
        let fence = self.shared.fence.read().expect("no panic under the lock").clone();
        Box::new(Job { unsynced: self.shared.store.unsynced(), fence, shared: Arc::clone(&self.shared) })
    }

    fn snapshot_source(&self) -> io::Result<(Checkpoint, Box<dyn SnapshotSource>)> {
        let (checkpoint, source) = Source::new(Arc::clone(&self.shared))?;
        Ok((checkpoint, Box::new(source)))
    }

    fn snapshot_sink(&mut self) -> io::Result<Box<dyn SnapshotSink>> {
        Ok(Box::new(Sink::new(Arc::clone(&self.shared), Arc::clone(&self.staged))))
    }

    async fn installed(&mut self, checkpoint: Checkpoint) -> io::Result<()> {
        let staged = self.staged.lock().expect("no panic under the lock").take();
        let staged = staged.ok_or_else(|| io::Error::other("no snapshot was received to the end"))?;
        if staged.position != checkpoint.position {
            let (fence, log) = (staged.position, checkpoint.position);
            return Err(io::Error::other(format!(
                "snapshot's fence is not of its position: {fence:?} {log:?}"
            )));
        }
        let shared = Arc::clone(&self.shared);
        let adoption = blocking(move || staged.prepare(&shared, checkpoint)).await?;
        let fence = adoption.meta.fence.clone();
        when_there_is_room(&self.shared, move |shared| shared.adopt(&adoption)).await?;
        *self.shared.fence.write().expect("no panic under the lock") = fence;
        Ok(())
    }
}

/// A checkpoint under way: what was dirty, and the fence, as of its position.
struct Job {
    unsynced: Unsynced,
    fence: FenceTable,
    shared: Arc<Shared>,
}

impl CheckpointJob for Job {
    fn run(self: Box<Self>, checkpoint: Checkpoint) -> BoxFuture<'static, io::Result<()>> {
        Box::pin(async move {
            let start = Instant::now();
            let metrics = Arc::clone(&self.shared.metrics);
            let Job { unsynced, fence, shared } = *self;
            let unsynced = blocking(move || unsynced.sync().map(|()| unsynced)).await?;
            let Checkpoint { position, membership } = checkpoint;
            let meta = Meta { position, membership, fence, chunks: unsynced.present };
            when_there_is_room(&shared, move |shared| shared.record(&meta)).await?;
            metrics.checkpoint_seconds.observe(start.elapsed().as_secs_f64());
            Ok(())
        })
    }
}

/// Makes a checkpoint durable by `work`, and waits while the disk is full: the old one stays in force, and the log is
/// kept.
async fn when_there_is_room(
    shared: &Arc<Shared>,
    work: impl Fn(&Shared) -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<()> {
    let work = Arc::new(work);
    let mut told = false;
    loop {
        let (to, work) = (Arc::clone(shared), Arc::clone(&work));
        match blocking(move || work(&to)).await {
            Err(error) if is_full(&error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(copyset = %shared.copyset, %error, "disk is full, checkpoint waits for space");
                }
            }
            done => return done,
        }
        wait_for_space(shared).await?;
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Pauses before the next try on a full disk.
async fn wait_for_space(shared: &Shared) -> io::Result<()> {
    tokio::select! {
        () = tokio::time::sleep(FULL_RETRY) => Ok(()),
        () = shared.stop.cancelled() => Err(io::ErrorKind::StorageFull.into()),
    }
}

/// Runs disk work on a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests;
