//! The outbox: a bounded queue in front of the write half of a socket. One task owns the write half and sends
//! whatever is queued with as few vectored writes as possible. Called by `connection` and by the gateway's link.
//! Must never know what the bytes mean.
//!
//! `bounded`: a sender waits (or is refused) while [`QUEUE_BYTES_MAX`] are queued; a peer that takes nothing for
//! [`STALL_LIMIT`] is given up.
//!
//! Small pieces are copied behind each other into one buffer, large ones are queued by reference. Both buffers are
//! swapped with the writer's, so that nothing is allocated per frame.

use bytes::Bytes;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

/// Bytes that may be queued; holds one largest frame and as much again of small ones.
pub const QUEUE_BYTES_MAX: usize = 64 << 20;
/// How long a write may make no progress before the connection is given up: far above any healthy pause.
pub const STALL_LIMIT: Duration = Duration::from_secs(10);
/// A piece up to this long is copied into the common buffer: cheaper than a slice of its own in the system call.
const COPY_BYTES_MAX: usize = 1024;
/// Slices of one vectored write: a quarter of a megabyte of 4 KiB frames, and far below IOV_MAX (1024).
const SLICES_MAX: usize = 128;
/// A buffer that grew beyond this is given back after use.
const KEEP_BYTES_MAX: usize = 1 << 20;

/// The connection's write half is closed; nothing of the message was queued.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
#[error("connection is closed")]
pub struct Closed;

/// Why a message was not queued; nothing of it was.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrySendError {
    /// The connection's write half is closed.
    #[error("connection is closed")]
    Closed,
    /// Too much is queued.
    #[error("send queue is full")]
    Full,
}

/// Handle to the queue; clones share it. When the last one is dropped, what is queued is sent and the write half is
/// shut down.
#[derive(Clone, Debug)]
pub struct Outbox(Arc<Handle>);

#[derive(Debug)]
struct Handle(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Wakes the writer.
    work: Notify,
    /// Wakes senders that wait for room.
    room: Notify,
    /// Wakes those that wait for the end.
    end: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    batch: Batch,
    /// Queued and not yet written.
    bytes: usize,
    /// The writer waits on `work`.
    writer_waits: bool,
    /// Some sender waits on `room`.
    sender_waits: bool,
    /// All handles are gone: write what is there, then shut down.
    leaving: bool,
    /// The write half is gone.
    closed: bool,
}

/// What is written next, in order.
#[derive(Debug, Default)]
struct Batch {
    copied: Vec<u8>,
    pieces: VecDeque<Piece>,
}

#[derive(Debug)]
enum Piece {
    /// The next so many bytes of `copied`.
    Copied(usize),
    Shared(Bytes),
}

impl Batch {
    fn push_copied(&mut self, bytes: &[u8]) {
        self.copied.extend_from_slice(bytes);
        match self.pieces.back_mut() {
            Some(Piece::Copied(length)) => *length += bytes.len(),
            _ => self.pieces.push_back(Piece::Copied(bytes.len())),
        }
    }

    fn push(&mut self, bytes: Bytes) {
        match bytes.len() {
            0 => {}
            length if length <= COPY_BYTES_MAX => self.push_copied(&bytes),
            _ => self.pieces.push_back(Piece::Shared(bytes)),
        }
    }

    fn clear(&mut self) {
        self.copied.clear();
        self.pieces.clear();
        self.copied.shrink_to(KEEP_BYTES_MAX);
    }
}

impl Outbox {
    /// Starts the writer task of `writer`. Must be called inside a tokio runtime.
    pub fn start(writer: impl AsyncWrite + Send + Unpin + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        tokio::spawn(run(writer, Closing(shared.clone())));
        Self(Arc::new(Handle(shared)))
    }

    /// Queues `head`, `meta` and `payload` as one message that nothing gets between. Waits while the queue is full.
    /// Cancel safe: all or nothing is queued.
    ///
    /// # Errors
    /// [`Closed`]; then nothing was queued.
    pub async fn send(&self, head: &[u8], meta: Bytes, payload: Vec<Bytes>) -> Result<(), Closed> {
        let bytes = message_bytes(head, &meta, &payload);
        loop {
            let room = {
                let mut queue = self.0.0.lock();
                match queue.room_for(bytes) {
                    Ok(()) => {
                        queue.push(bytes, head, meta, payload);
                        self.0.0.wake_writer(queue);
                        return Ok(());
                    }
                    Err(TrySendError::Closed) => return Err(Closed),
                    Err(TrySendError::Full) => queue.sender_waits = true,
                }
                // Made under the lock, so that no wake-up is missed.
                self.0.0.room.notified()
            };
            room.await;
        }
    }

    /// Queues a message if there is room for it now.
    ///
    /// # Errors
    /// `Closed` or `Full`; then nothing was queued.
    pub fn try_send(&self, head: &[u8], meta: Bytes, payload: Vec<Bytes>) -> Result<(), TrySendError> {
        let bytes = message_bytes(head, &meta, &payload);
        let mut queue = self.0.0.lock();
        queue.room_for(bytes)?;
        queue.push(bytes, head, meta, payload);
        self.0.0.wake_writer(queue);
        Ok(())
    }

    /// Whether the write half is gone.
    pub fn is_closed(&self) -> bool {
        self.0.0.lock().closed
    }

    /// Waits until the write half is gone.
    pub async fn closed(&self) {
        // Made before the look, so that no change is missed.
        let end = self.0.0.end.notified();
        if !self.is_closed() {
            end.await;
        }
    }

    /// A handle that does not keep the connection open.
    pub(crate) fn downgrade(&self) -> WeakOutbox {
        WeakOutbox(Arc::downgrade(&self.0))
    }
}

/// See [`Outbox::downgrade`].
#[derive(Debug)]
pub(crate) struct WeakOutbox(Weak<Handle>);

impl WeakOutbox {
    pub(crate) fn upgrade(&self) -> Option<Outbox> {
        self.0.upgrade().map(Outbox)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.leaving = true;
        self.0.wake_writer(queue);
    }
}

fn message_bytes(head: &[u8], meta: &Bytes, payload: &[Bytes]) -> usize {
    head.len() + meta.len() + payload.iter().map(Bytes::len).sum::<usize>()
}

impl Queue {
    fn room_for(&self, bytes: usize) -> Result<(), TrySendError> {
        match () {
            () if self.closed => Err(TrySendError::Closed),
            // An empty queue takes a message of any length.
            () if self.bytes > 0 && self.bytes + bytes > QUEUE_BYTES_MAX => Err(TrySendError::Full),
            () => Ok(()),
        }
    }

    fn push(&mut self, bytes: usize, head: &[u8], meta: Bytes, payload: Vec<Bytes>) {
        self.bytes += bytes;
        self.batch.push_copied(head);
        self.batch.push(meta);
        payload.into_iter().for_each(|part| self.batch.push(part));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // No code that can panic runs under the lock, so its state is whole even if it is poisoned.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_writer(&self, mut queue: MutexGuard<'_, Queue>) {
        let wake = std::mem::take(&mut queue.writer_waits);
        drop(queue);
        if wake {
            self.work.notify_one();
        }
    }

    /// Counts `written` bytes off and swaps what is queued into the empty `batch`. `false`: nothing more will come.
    async fn next_batch(&self, mut written: usize, batch: &mut Batch) -> bool {
        loop {
            let (work, waiters) = {
                let mut queue = self.lock();
                queue.bytes -= std::mem::take(&mut written);
                let waiters = std::mem::take(&mut queue.sender_waits);
                if !queue.batch.pieces.is_empty() {
                    std::mem::swap(&mut queue.batch, batch);
                    drop(queue);
                    if waiters {
                        self.room.notify_waiters();
                    }
                    return true;
                }
                if queue.leaving {
                    return false;
                }
                queue.writer_waits = true;
                (self.work.notified(), waiters)
            };
            if waiters {
                self.room.notify_waiters();
            }
            work.await;
            // Whatever else is ready to run may queue something too: it then shares the system call.
            tokio::task::yield_now().await;
        }
    }
}

/// Marks the queue closed when the writer ends, however it ends.
struct Closing(Arc<Shared>);

impl Drop for Closing {
    fn drop(&mut self) {
        let dropped = {
            let mut queue = self.0.lock();
            queue.closed = true;
            std::mem::take(&mut queue.batch)
        };
        self.0.room.notify_waiters();
        self.0.end.notify_waiters();
        drop(dropped);
    }
}

async fn run(mut writer: impl AsyncWrite + Unpin, shared: Closing) {
    let mut batch = Batch::default();
    let mut written = 0;
    while shared.0.next_batch(written, &mut batch).await {
        written = match write_all(&mut writer, &mut batch).await {
            Ok(bytes) => bytes,
            // Whoever reads from this connection sees its end and tells why; here only nothing more can be sent.
            Err(error) => {
                tracing::debug!(%error, "connection can not be written to any more");
                return;
            }
        };
    }
    if let Err(error) = writer.shutdown().await {
        tracing::debug!(%error, "connection did not shut down cleanly");
    }
}

/// Writes the whole batch, empties it and returns its length in bytes.
async fn write_all(writer: &mut (impl AsyncWrite + Unpin), batch: &mut Batch) -> io::Result<usize> {
    // Both positions are what was written already: of `copied`, and of the piece in front.
    let (mut copied_at, mut piece_at, mut total) = (0, 0, 0);
    while !batch.pieces.is_empty() {
        let write = poll_fn(|cx| {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = fill(&mut slices, batch, copied_at, piece_at);
            Pin::new(&mut *writer).poll_write_vectored(cx, &slices[..count])
        });
        let mut left = match tokio::time::timeout(STALL_LIMIT, write).await {
            Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => written?,
            Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "peer takes no bytes")),
        };
        total += left;
        while let Some(piece) = batch.pieces.front() {
            let length = match piece {
                Piece::Copied(length) => *length,
                Piece::Shared(bytes) => bytes.len(),
            };
            let done = left.min(length - piece_at);
            left -= done;
            if matches!(piece, Piece::Copied(_)) {
                copied_at += done;
            }
            piece_at += done;
            if piece_at < length {
                break;
            }
            piece_at = 0;
            batch.pieces.pop_front();
        }
    }
    batch.clear();
    Ok(total)
}

/// Points `slices` at what is not yet written; returns how many are used.
fn fill<'a>(
    slices: &mut [IoSlice<'a>; SLICES_MAX],
    batch: &'a Batch,
    mut copied_at: usize,
    mut piece_at: usize,
) -> usize {
    let mut count = 0;
    for (slice, piece) in slices.iter_mut().zip(&batch.pieces) {
        let bytes = match piece {
            Piece::Copied(length) => {
                let rest = length - piece_at;
                copied_at += rest;
                &batch.copied[copied_at - rest..copied_at]
            }
            Piece::Shared(bytes) => &bytes[piece_at..],
        };
        piece_at = 0;
        *slice = IoSlice::new(bytes);
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests;
