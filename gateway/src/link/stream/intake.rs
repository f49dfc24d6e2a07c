//! Reads frames from a link: buffered for headers and small payloads, straight into the payload's buffer for large
//! ones. A request's permit is taken before its payload is read, so that unread bytes stay in the socket (`bounded`).
//!
//! Called by the link. What it reads is foreign: every field is checked before it is used (`guest_cannot_crash_us`).

use crate::admission::{Admission, Permit};
use crate::buffer::{Buffer, BufferPool};
use crate::link::{Breach, data_of};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use spline_link::{HEADER_BYTES, Header, Message};
use spline_types::{BlockOp, BlockRequest};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::unix::OwnedReadHalf;

/// Bytes read ahead at most: thirty-two 4 KiB writes with their headers come in with one call.
const READ_AHEAD: usize = 136 << 10;
/// A payload's missing part of at least this many bytes is read straight into its buffer; copying less is cheaper
/// than the extra call.
const DIRECT_READ_MIN: usize = 32 << 10;

/// Something that nebd said.
pub(super) enum Arrival {
    /// A request with its payload, admitted.
    Request(BlockRequest, Bytes, Permit),
    /// It ends for good.
    Detach,
    /// The socket was closed.
    Closed,
}

/// The reading side of a link.
pub(super) struct Intake {
    half: OwnedReadHalf,
    ahead: Box<[u8]>,
    /// What of `ahead` is read but not consumed.
    start: usize,
    end: usize,
    stage: Stage,
    pool: BufferPool,
}

enum Stage {
    Header,
    /// Waits for a permit.
    Admit(BlockRequest, BoxFuture<'static, Permit>),
    /// Waits for the rest of a write's payload; how much of it is there.
    Payload(BlockRequest, Permit, Buffer, usize),
    /// Whole.
    Ready(BlockRequest, Permit, Bytes),
}

impl Intake {
    pub(super) fn new(half: OwnedReadHalf, pool: BufferPool) -> Self {
        let ahead = vec![0; READ_AHEAD].into_boxed_slice();
        Self { half, ahead, start: 0, end: 0, stage: Stage::Header, pool }
    }

    /// The next arrival. Progress is kept between polls.
    pub(super) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        admission: &Admission,
    ) -> Poll<Result<Arrival, Breach>> {
        loop {
            match std::mem::replace(&mut self.stage, Stage::Header) {
                Stage::Header => match ready!(self.poll_header(cx))? {
                    None => return Poll::Ready(Ok(Arrival::Closed)),
                    Some(Message::Detach) => return Poll::Ready(Ok(Arrival::Detach)),
                    Some(Message::Request(request)) => {
                        let bytes = data_of(&request);
                        match admission.try_acquire(bytes) {
                            Some(permit) => self.stage = self.admitted(request, permit),
                            None => self.stage = Stage::Admit(request, admission.acquire(bytes)),
                        }
                    }
                    Some(_) => return Poll::Ready(Err(Breach::Direction)),
                },
                Stage::Admit(request, mut waiting) => match waiting.as_mut().poll(cx) {
                    Poll::Ready(permit) => self.stage = self.admitted(request, permit),
                    Poll::Pending => {
                        self.stage = Stage::Admit(request, waiting);
                        return Poll::Pending;
                    }
                },
                Stage::Payload(request, permit, mut buffer, mut filled) => {
                    let read = self.poll_payload(cx, buffer.as_mut_slice(), &mut filled);
                    self.stage = if filled == buffer.as_ref().len() {
                        Stage::Ready(request, permit, buffer.freeze())
                    } else {
                        Stage::Payload(request, permit, buffer, filled)
                    };
                    if !ready!(read)? {
                        return Poll::Ready(Ok(Arrival::Closed));
                    }
                }
                Stage::Ready(request, permit, payload) => {
                    return Poll::Ready(Ok(Arrival::Request(request, payload, permit)));
                }
            }
        }
    }

    fn admitted(&self, request: BlockRequest, permit: Permit) -> Stage {
        match request.op {
            BlockOp::Write if !request.range.is_empty() => {
                Stage::Payload(request, permit, self.pool.take(request.range.length() as usize), 0)
            }
            _ => Stage::Ready(request, permit, Bytes::new()),
        }
    }

    /// One header, or `None` at the end of the stream.
    fn poll_header(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Message>, Breach>> {
        loop {
            if let Some(bytes) = self.ahead[self.start..self.end].first_chunk::<HEADER_BYTES>() {
                let header = Header::decode(bytes)?;
                self.start += HEADER_BYTES;
                return Poll::Ready(Ok(Some(header.message)));
            }
            if !ready!(self.poll_fill(cx))? {
                return Poll::Ready(Ok(None));
            }
        }
    }

    /// Some more of a payload; false at the end of the stream.
    fn poll_payload(
        &mut self,
        cx: &mut Context<'_>,
        payload: &mut [u8],
        filled: &mut usize,
    ) -> Poll<io::Result<bool>> {
        let missing = payload.len() - *filled;
        if self.start == self.end {
            if missing >= DIRECT_READ_MIN {
                let mut target = ReadBuf::new(&mut payload[*filled..]);
                ready!(Pin::new(&mut self.half).poll_read(cx, &mut target))?;
                let read = target.filled().len();
                *filled += read;
                return Poll::Ready(Ok(read > 0));
            }
            if !ready!(self.poll_fill(cx))? {
                return Poll::Ready(Ok(false));
            }
        }
        let take = missing.min(self.end - self.start);
        payload[*filled..*filled + take].copy_from_slice(&self.ahead[self.start..self.start + take]);
        self.start += take;
        *filled += take;
        Poll::Ready(Ok(true))
    }

    /// Reads more ahead; false at the end of the stream.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.ahead.len() - self.end < HEADER_BYTES {
            self.ahead.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut target = ReadBuf::new(&mut self.ahead[self.end..]);
        ready!(Pin::new(&mut self.half).poll_read(cx, &mut target))?;
        let read = target.filled().len();
        self.end += read;
        Poll::Ready(Ok(read > 0))
    }
}
