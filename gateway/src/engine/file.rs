//! The file engine: a volume that is a local raw file or block device.
//!
//! Called by sessions. Knows: the file, its page cache, how to go past it. Must not know: links, the cluster.
//!
//! Here a write is durable when a flush after it is answered, or when it asked for that itself (FUA); the engine's
//! traits say so. A sync that failed once poisons the file: the kernel forgets what it could not write, so that a
//! later sync would succeed with data missing (`acked_is_durable`).

mod adopt;
mod job;
mod lane;
mod open;
mod overlap;
mod ring;
mod sizes;
#[cfg(test)]
mod tests;
mod threads;
mod uring;

use super::{Engine, EngineAnswer, EngineTraits, Lane, OpenError, Passed, Standing};
use crate::buffer::{ALIGNMENT, BufferPool};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use job::{Action, Descriptors, Job};
use lane::FileLane;
use open::Alignment;
pub(crate) use open::Files;
use overlap::Overlaps;
use ring::Ring;
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, flock, seek};
use rustix::io::Errno;
pub(crate) use sizes::Sizes;
use spline_types::limits::VOLUME_BYTES_MAX;
use spline_types::{BlockOp, BlockRequest, BlockSize, ByteRange, Extent, Fault, Geometry};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use threads::Threads;
use tokio::sync::{oneshot, watch};

/// Zeros are written in pieces of this many bytes where the file system can not zero a range itself.
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];
/// Most extents that one status request looks for; each costs two system calls. The rest is asked for again.
const EXTENTS_MAX: usize = 1024;

/// A file or block device as a volume.
pub(crate) struct FileEngine {
    disk: Arc<Disk>,
    traits: EngineTraits,
}

/// What running requests share.
struct Disk {
    path: PathBuf,
    files: Arc<Descriptors>,
    /// What direct IO asks of memory.
    alignment: Alignment,
    executor: Executor,
    overlaps: Overlaps,
    buffers: BufferPool,
    device: bool,
    block_size: BlockSize,
    /// Bytes; grows only.
    size: AtomicU64,
    standing: watch::Sender<Standing>,
    /// A sync has failed.
    poisoned: AtomicBool,
}

/// Who does the work.
enum Executor {
    Ring(Ring),
    Threads(Threads),
}

impl Executor {
    fn submit(&self, job: Job) {
        match self {
            Self::Ring(ring) => ring.submit(job),
            Self::Threads(threads) => threads.submit(job),
        }
    }

    /// Blocks until everything is done; false if that can not be known.
    fn close(&self) -> bool {
        match self {
            Self::Ring(ring) => ring.close(),
            Self::Threads(threads) => {
                threads.close();
                true
            }
        }
    }
}

impl Engine for FileEngine {
    fn name(&self) -> &'static str {
        "file"
    }

    fn geometry(&self) -> Geometry {
        Geometry { size: self.disk.size.load(Ordering::Acquire), block_size: self.disk.block_size }
    }

    fn traits(&self) -> EngineTraits {
        self.traits
    }

    /// A file is locked: nobody takes it. Which file has the name by now is not looked at.
    fn prove(&self, _: bool) -> BoxFuture<'_, Result<(), OpenError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn standing(&self) -> watch::Receiver<Standing> {
        self.disk.standing.subscribe()
    }

    fn execute(
        &self,
        request: BlockRequest,
        payload: Bytes,
    ) -> BoxFuture<'static, Result<EngineAnswer, Fault>> {
        let disk = Arc::clone(&self.disk);
        Box::pin(async move { disk.execute(request, payload).await })
    }

    fn pass(&self) -> BoxFuture<'_, Result<Passed, OpenError>> {
        Box::pin(std::future::ready(self.disk.pass()))
    }

    fn release(&self) -> BoxFuture<'_, bool> {
        let disk = Arc::clone(&self.disk);
        Box::pin(async move {
            // The lock is the next process's as well, which would lose it. What a lane of a link that has gone left in the kernel
            // is waited for too: it must not land on what the next process writes.
            let ended = tokio::task::spawn_blocking(move || {
                let ended = [disk.executor.close(), disk.overlaps.close()];
                ended == [true; 2] && !disk.poisoned.load(Ordering::Acquire)
            });
            matches!(ended.await, Ok(true))
        })
    }

    fn lane(&self) -> Option<Box<dyn Lane>> {
        Some(Box::new(FileLane::start(&self.disk)?))
    }

    fn has_lane(&self) -> bool {
        matches!(self.disk.executor, Executor::Ring(_))
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        let disk = Arc::clone(&self.disk);
        Box::pin(async move {
            let closed = tokio::task::spawn_blocking(move || {
                // Whoever still holds the descriptors does nothing with them: the next opener may have the file. But
                // while the kernel may still write, the lock stays, until the kernel lets go of the file.
                let ended = [disk.executor.close(), disk.overlaps.close()];
                ended == [true; 2] && flock(&disk.files.buffered, FlockOperation::Unlock).is_ok()
            });
            if !matches!(closed.await, Ok(true)) {
                let path = self.disk.path.display();
                tracing::error!(%path, "file was not given back: it stays locked until this process has ended");
            }
        })
    }
}

impl Disk {
    /// Tells whoever asked if the file has grown. One that has shrunk keeps its size, and what lies past its end fails: guests
    /// can not be told. Blocks.
    fn look_at_size(&self) {
        match open::geometry(&self.files.buffered, self.device) {
            Ok(now) => {
                let size = now.size.min(VOLUME_BYTES_MAX);
                if self.size.fetch_max(size, Ordering::AcqRel) < size {
                    tracing::info!(path = %self.path.display(), size, "file has grown");
                    self.standing.send_modify(|known| known.size = known.size.max(size));
                }
            }
            Err(error) => tracing::debug!(path = %self.path.display(), %error, "size of a file is not known"),
        }
    }

    async fn execute(&self, request: BlockRequest, payload: Bytes) -> Result<EngineAnswer, Fault> {
        if self.poisoned.load(Ordering::Acquire) && (request.op.modifies() || request.op == BlockOp::Flush) {
            return Err(Fault::Internal);
        }
        let BlockRequest { range, fua, .. } = request;
        match request.op {
            BlockOp::Read => self.read(range).await.map(|data| EngineAnswer::Data(vec![data])),
            BlockOp::Write => self.write(range, payload, fua).await.map(|()| EngineAnswer::Done),
            BlockOp::Flush => self.sync().await.map(|()| EngineAnswer::Done),
            BlockOp::Discard => {
                self.discard(range).await?;
                self.sync_if(fua).await
            }
            BlockOp::WriteZeroes { no_hole, fast } => {
                self.zero(range, no_hole, fast).await?;
                self.sync_if(fua).await
            }
            // The page cache decides for itself, and direct reads pass it by.
            BlockOp::Cache => Ok(EngineAnswer::Done),
            BlockOp::Status => self.status(range).await.map(EngineAnswer::Extents),
        }
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes, Fault> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let direct = self.is_direct(range);
        let _hold = self.overlaps.hold(range, false).await;
        let buffer = self.buffers.take(range.length() as usize);
        let buffer =
            self.run(Action::Read(buffer), range, direct).await.map_err(|e| self.fault("read", e))?;
        Ok(buffer.ok_or(Fault::Internal)?.freeze())
    }

    /// A request that is given up gives its hold up as well: that happens only when the file is about to be closed.
    async fn write(&self, range: ByteRange, payload: Bytes, durable: bool) -> Result<(), Fault> {
        if range.is_empty() {
            return self.sync_if(durable).await.map(drop);
        }
        let direct = self.is_direct(range);
        let _hold = self.overlaps.hold(range, true).await;
        let data = if direct { self.aligned(payload) } else { payload };
        let done = self.run(Action::Write { data, durable }, range, direct).await;
        if done.is_err() && durable {
            self.poison();
        }
        done.map(drop).map_err(|error| self.fault("write", error))
    }

    /// The bytes in memory that a disk can take them from.
    fn aligned(&self, payload: Bytes) -> Bytes {
        if payload.as_ptr().addr().is_multiple_of(ALIGNMENT) {
            return payload;
        }
        let mut copy = self.buffers.take(payload.len());
        copy.as_mut_slice().copy_from_slice(&payload);
        copy.freeze()
    }

    async fn sync(&self) -> Result<(), Fault> {
        let empty = ByteRange::new(0, 0).ok_or(Fault::Internal)?;
        let synced = self.run(Action::Sync, empty, false).await;
        synced.map(drop).map_err(|error| {
            self.poison();
            self.fault("sync", error)
        })
    }

    async fn sync_if(&self, durable: bool) -> Result<EngineAnswer, Fault> {
        if durable {
            self.sync().await?;
        }
        Ok(EngineAnswer::Done)
    }

    fn poison(&self) {
        if !self.poisoned.swap(true, Ordering::AcqRel) {
            let path = self.path.display();
            tracing::error!(%path, "sync failed: what was written may be lost, writes are refused until it is opened anew");
        }
    }

    async fn discard(&self, range: ByteRange) -> Result<(), Fault> {
        if range.is_empty() {
            return Ok(());
        }
        let _hold = self.overlaps.hold(range, true).await;
        match self.allocate(FallocateFlags::PUNCH_HOLE, range).await {
            // A file system that can not give space back keeps it: a discard is advice.
            Err(error) if self.cannot(error) => Ok(()),
            done => done.map_err(|error| self.fault("discard", error)),
        }
    }

    async fn zero(&self, range: ByteRange, no_hole: bool, fast: bool) -> Result<(), Fault> {
        if range.is_empty() {
            return Ok(());
        }
        let _hold = self.overlaps.hold(range, true).await;
        let ways: &[FallocateFlags] = match no_hole {
            true => &[FallocateFlags::ZERO_RANGE],
            false => &[FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE],
        };
        for way in ways {
            match self.allocate(*way, range).await {
                Err(error) if self.cannot(error) => {}
                done => return done.map_err(|error| self.fault("write_zeroes", error)),
            }
        }
        if fast {
            return Err(Fault::Unsupported);
        }
        let mut at = range.offset();
        while at < range.end() {
            let length = (range.end() - at).min(ZEROS.len() as u64);
            let piece = ByteRange::new(at, length).ok_or(Fault::Internal)?;
            let data = Bytes::from_static(&ZEROS[..length as usize]);
            let written = self.run(Action::Write { data, durable: false }, piece, false).await;
            written.map_err(|error| self.fault("write_zeroes", error))?;
            at += length;
        }
        Ok(())
    }

    async fn allocate(&self, way: FallocateFlags, range: ByteRange) -> Result<(), Errno> {
        let flags = way | FallocateFlags::KEEP_SIZE;
        self.run(Action::Allocate(flags), range, false).await.map(drop)
    }

    /// Whether an error of fallocate means that it can not be done here at all: devices refuse ranges that are not
    /// whole blocks.
    fn cannot(&self, error: Errno) -> bool {
        matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV)
            || (self.device && error == Errno::INVAL)
    }

    async fn status(&self, range: ByteRange) -> Result<Vec<Extent>, Fault> {
        if self.device {
            return Ok(vec![Extent { length: range.length(), hole: false, zero: false }]);
        }
        let files = Arc::clone(&self.files);
        let found = tokio::task::spawn_blocking(move || extents(&files, range)).await;
        found.map_err(|_| Fault::Internal)?.map_err(|error| self.fault("status", error))
    }

    fn is_direct(&self, range: ByteRange) -> bool {
        let whole = |value: u64| value.is_multiple_of(ALIGNMENT as u64);
        self.files.direct.is_some() && whole(range.offset()) && whole(range.length())
    }

    async fn run(
        &self,
        action: Action,
        range: ByteRange,
        direct: bool,
    ) -> Result<Option<crate::buffer::Buffer>, Errno> {
        let (done, ended) = oneshot::channel();
        self.executor.submit(Job { action, range, direct, done });
        // A job that is dropped belongs to a file that is closed.
        ended.await.unwrap_or(Err(Errno::BADF))
    }

    fn fault(&self, what: &str, error: Errno) -> Fault {
        let fault = match error {
            Errno::NOSPC | Errno::DQUOT => Fault::NoSpace,
            Errno::ROFS | Errno::PERM | Errno::ACCESS => Fault::ReadOnly,
            Errno::OPNOTSUPP => Fault::Unsupported,
            Errno::BADF => Fault::Fenced,
            _ => Fault::Internal,
        };
        if fault == Fault::Internal {
            tracing::error!(path = %self.path.display(), what, %error, "file request failed");
        }
        fault
    }
}

/// The allocation of a range of a regular file, by the file system's word. Blocks.
fn extents(files: &Descriptors, range: ByteRange) -> Result<Vec<Extent>, Errno> {
    let find = |from: SeekFrom| match seek(&files.buffered, from) {
        // No data, or no hole, up to the end of the file.
        Err(Errno::NXIO) => Ok(range.end()),
        found => found.map(|at| at.min(range.end())),
    };
    let mut list = Vec::new();
    let mut at = range.offset();
    while at < range.end() && list.len() < EXTENTS_MAX {
        let data = find(SeekFrom::Data(at))?;
        Extent::push_merged(&mut list, Extent { length: data - at, hole: true, zero: true });
        if data < range.end() {
            // Data right here may be gone by now: the next look is from the same place.
            let hole = find(SeekFrom::Hole(data))?;
            Extent::push_merged(&mut list, Extent { length: hole - data, hole: false, zero: false });
            at = hole;
        } else {
            at = data;
        }
    }
    Ok(list)
}
