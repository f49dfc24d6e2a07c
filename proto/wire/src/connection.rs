//! A connection: version preface, then frames both ways. Called by `call` and by the accept loops of the processes.
//! Must never know what frames mean, except that a ping is answered.
//!
//! `bounded`: one read buffer of [`READ_BYTES`] and one payload of the largest size per connection; the send queue is
//! the [`Outbox`]'s.

use crate::error::WireError;
use crate::frame::{Frame, HEADER_BYTES, Head, Kind, crc32c};
use crate::outbox::{Closed, Outbox, TrySendError, WeakOutbox};
use crate::version::{self, PREFACE_BYTES};
use bytes::{BufMut, Bytes, BytesMut};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bytes of the read buffer: a dozen 4 KiB frames per system call.
pub const READ_BYTES: usize = 64 << 10;
/// With less room than this a new buffer is taken, so that reads do not become small.
const READ_ROOM_MIN: usize = 16 << 10;
/// A payload that is not yet here and at least this long is read into a buffer of its own, without a copy.
const OWN_BUFFER_BYTES_MIN: usize = 16 << 10;

/// Connects to `addr` and agrees on a version, all within `timeout`.
///
/// # Errors
/// `Io` and `Timeout` if there is no connection; `NotSpline` and `Versions` if the peer is not one of ours.
pub async fn connect(addr: SocketAddr, timeout: Duration) -> Result<(FrameSender, FrameReceiver), WireError> {
    let made = tokio::time::timeout(timeout, async {
        let stream = TcpStream::connect(addr).await?;
        greet(stream).await
    });
    made.await.unwrap_or(Err(WireError::Timeout { limit: timeout }))
}

/// Agrees on a version with a peer that connected, within `timeout`.
///
/// # Errors
/// As [`connect`].
pub async fn accept(stream: TcpStream, timeout: Duration) -> Result<(FrameSender, FrameReceiver), WireError> {
    tokio::time::timeout(timeout, greet(stream)).await.unwrap_or(Err(WireError::Timeout { limit: timeout }))
}

async fn greet(stream: TcpStream) -> Result<(FrameSender, FrameReceiver), WireError> {
    stream.set_nodelay(true)?;
    let (read, write) = stream.into_split();
    split(read, write).await
}

/// Agrees on a version over any two halves of a stream and starts the writer task. No time limit of its own.
///
/// # Errors
/// `Io`, `NotSpline`, `Versions`.
pub async fn split(
    mut read: impl AsyncRead + Send + Unpin + 'static,
    mut write: impl AsyncWrite + Send + Unpin + 'static,
) -> Result<(FrameSender, FrameReceiver), WireError> {
    write.write_all(&version::preface()).await?;
    write.flush().await?;
    let mut theirs = [0; PREFACE_BYTES];
    read.read_exact(&mut theirs).await?;
    let version = version::choose(theirs)?;
    let outbox = Outbox::start(write);
    let pongs = outbox.downgrade();
    let sender = FrameSender { outbox, version };
    Ok((
        sender,
        FrameReceiver { read: Box::new(read), buffer: BytesMut::new(), partial: None, version, pongs },
    ))
}

/// Sends frames of one connection; clones share it. When the last is dropped, what is queued is sent and the write
/// half shut down.
#[derive(Clone, Debug)]
pub struct FrameSender {
    outbox: Outbox,
    version: u16,
}

impl FrameSender {
    /// Queues a frame; waits while the queue is full. Cancel safe: all or nothing is queued. Answered once queued:
    /// whether it arrives, only a reply tells.
    ///
    /// # Errors
    /// [`Closed`]; then the frame was certainly not sent. A frame whose meta or payload exceeds its limit is a
    /// caller's defect: it is logged and refused as `Closed` too.
    pub async fn send(&self, frame: Frame) -> Result<(), Closed> {
        let header = self.header(&frame).ok_or(Closed)?;
        self.outbox.send(&header, frame.meta, frame.payload).await
    }

    /// Queues a frame if there is room for it now.
    ///
    /// # Errors
    /// `Closed` (also for a frame over its limits) or `Full`; then the frame was certainly not sent.
    pub fn try_send(&self, frame: Frame) -> Result<(), TrySendError> {
        let header = self.header(&frame).ok_or(TrySendError::Closed)?;
        self.outbox.try_send(&header, frame.meta, frame.payload)
    }

    /// Whether the write half is gone.
    pub fn is_closed(&self) -> bool {
        self.outbox.is_closed()
    }

    /// Waits until the write half is gone.
    pub async fn closed(&self) {
        self.outbox.closed().await;
    }

    fn header(&self, frame: &Frame) -> Option<[u8; HEADER_BYTES]> {
        let header = frame.header(self.version);
        if header.is_none() {
            let (meta, payload) = (frame.meta.len(), frame.payload_bytes());
            tracing::error!(kind = ?frame.kind, meta, payload, "frame is longer than the limit, not sent");
        }
        header
    }
}

/// Receives the frames of one connection.
pub struct FrameReceiver {
    read: Box<dyn AsyncRead + Send + Unpin>,
    buffer: BytesMut,
    partial: Option<Partial>,
    version: u16,
    pongs: WeakOutbox,
}

impl std::fmt::Debug for FrameReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameReceiver").field("buffered", &self.buffer.len()).finish_non_exhaustive()
    }
}

/// A frame whose payload is being read into a buffer of its own.
struct Partial {
    head: Head,
    meta: Bytes,
    payload: BytesMut,
}

impl FrameReceiver {
    /// The next frame, its checksums verified; `None` when the peer shut its side down between frames. Cancel safe.
    /// Pings are answered here and not returned.
    ///
    /// # Errors
    /// After `WireError::Payload` the stream is still in step and `next` may be called again; after any other error
    /// the connection must be dropped.
    pub async fn next(&mut self) -> Result<Option<Frame>, WireError> {
        loop {
            let Some(frame) = self.next_any().await? else { return Ok(None) };
            if frame.kind != Kind::Ping {
                return Ok(Some(frame));
            }
            if let Some(outbox) = self.pongs.upgrade() {
                let pong = Frame { kind: Kind::Pong, meta: Bytes::new(), payload: Vec::new(), ..frame };
                // A full queue or a closed connection is an answer too: the peer concludes from silence.
                let _ = FrameSender { outbox, version: self.version }.try_send(pong);
            }
        }
    }

    async fn next_any(&mut self) -> Result<Option<Frame>, WireError> {
        loop {
            if let Some(partial) = &mut self.partial {
                let missing = partial.head.payload_bytes - partial.payload.len();
                if missing > 0 && self.read.read_buf(&mut (&mut partial.payload).limit(missing)).await? == 0 {
                    return Err(WireError::Truncated);
                }
                if partial.payload.len() < partial.head.payload_bytes {
                    continue;
                }
                let Partial { head, meta, payload } = self.partial.take().expect("just seen");
                return finish(head, meta, payload.freeze()).map(Some);
            }
            let wanted = match self.take_buffered()? {
                Buffered::Frame(frame) => return Ok(Some(frame)),
                Buffered::Partial => continue,
                Buffered::Needs(wanted) => wanted,
            };
            // Replaces a buffer that frames in use still hold, or that is nearly used up.
            let room = self.buffer.capacity() - self.buffer.len();
            if room < READ_ROOM_MIN || self.buffer.capacity() < wanted {
                self.buffer.reserve(wanted.max(READ_BYTES));
            }
            if self.read.read_buf(&mut self.buffer).await? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(WireError::Truncated),
                };
            }
        }
    }

    /// Takes a frame off the buffer if it is there, or starts reading a long payload into its own buffer.
    fn take_buffered(&mut self) -> Result<Buffered, WireError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else {
            return Ok(Buffered::Needs(HEADER_BYTES));
        };
        let head = Head::parse(header, self.version)?;
        let payload_at = HEADER_BYTES + head.meta_bytes;
        let Some(meta) = self.buffer.get(HEADER_BYTES..payload_at) else {
            return Ok(Buffered::Needs(payload_at));
        };
        // Verified before a buffer is made for the payload, and once only for a short payload that is not yet here.
        let whole = payload_at + head.payload_bytes;
        if self.buffer.len() < whole && head.payload_bytes < OWN_BUFFER_BYTES_MIN {
            return Ok(Buffered::Needs(whole));
        }
        Head::verify(header, meta)?;
        let mut front = self.buffer.split_to(payload_at.min(self.buffer.len()));
        let meta = front.split_off(HEADER_BYTES).freeze();
        if self.buffer.len() >= head.payload_bytes {
            let payload = self.buffer.split_to(head.payload_bytes).freeze();
            return finish(head, meta, payload).map(Buffered::Frame);
        }
        let mut payload = BytesMut::with_capacity(head.payload_bytes);
        payload.extend_from_slice(&self.buffer);
        self.buffer.clear();
        self.partial = Some(Partial { head, meta, payload });
        Ok(Buffered::Partial)
    }
}

enum Buffered {
    Frame(Frame),
    /// `partial` was set.
    Partial,
    /// That many bytes of the buffer are needed before more can be said.
    Needs(usize),
}

fn finish(head: Head, meta: Bytes, payload: Bytes) -> Result<Frame, WireError> {
    let Head { kind, request, payload_crc, .. } = head;
    if crc32c([&payload[..]]) != payload_crc {
        return Err(WireError::Payload { kind, request });
    }
    let payload = if payload.is_empty() { Vec::new() } else { vec![payload] };
    Ok(Frame { kind, request, meta, payload })
}

#[cfg(test)]
mod tests;
