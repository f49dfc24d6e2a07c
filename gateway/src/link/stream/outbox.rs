//! What waits to be written to a link. Everything that is queued leaves with as few `writev` calls as possible.
//!
//! Called by the link. A reply keeps its request's permit until its last byte is written, so that replies that
//! nobody reads hold admission, not memory without limit (`bounded`).

use crate::admission::Permit;
use bytes::Bytes;
use spline_link::{HEADER_BYTES, Header};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;
use tokio::net::unix::OwnedWriteHalf;

/// Slices per `writev`: half of what Linux takes, 64 replies of 4 KiB.
const SLICES: usize = 128;

/// The writing side of a link.
pub(super) struct Outbox {
    half: OwnedWriteHalf,
    parts: VecDeque<Part>,
    /// Bytes of the first part that are already written.
    offset: usize,
    /// The socket failed or nobody is to hear more: whatever is pushed is dropped.
    deaf: bool,
}

enum Part {
    Header([u8; HEADER_BYTES]),
    Data(Bytes),
    /// Everything before it is written: give the permit back.
    End(#[allow(dead_code, reason = "held for its drop")] Permit),
}

impl Part {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Header(bytes) => bytes,
            Self::Data(bytes) => bytes,
            Self::End(_) => &[],
        }
    }
}

impl Outbox {
    pub(super) fn new(half: OwnedWriteHalf) -> Self {
        Self { half, parts: VecDeque::new(), offset: 0, deaf: false }
    }

    /// Queues a frame without payload.
    pub(super) fn push(&mut self, header: &Header) {
        if !self.deaf {
            self.parts.push_back(Part::Header(header.encode()));
        }
    }

    /// Queues a reply; `header` tells the payload's length.
    pub(super) fn push_reply(
        &mut self,
        header: &Header,
        payload: impl IntoIterator<Item = Bytes>,
        permit: Permit,
    ) {
        if self.deaf {
            return;
        }
        self.push(header);
        self.parts.extend(payload.into_iter().filter(|part| !part.is_empty()).map(Part::Data));
        self.parts.push_back(Part::End(permit));
    }

    /// Drops what is queued and what will be.
    pub(super) fn discard(&mut self) {
        self.deaf = true;
        self.parts.clear();
    }

    /// Writes until everything is written. A socket that fails is discarded, and its error told once.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.parts.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut count = 0;
            let mut skip = self.offset;
            for part in self.parts.iter().filter(|part| !matches!(part, Part::End(_))).take(SLICES) {
                slices[count] = IoSlice::new(&part.bytes()[skip..]);
                skip = 0;
                count += 1;
            }
            let written = match count {
                0 => Ok(0),
                _ => ready!(Pin::new(&mut self.half).poll_write_vectored(cx, &slices[..count])),
            };
            match written {
                Ok(0) if count > 0 => return Poll::Ready(Err(self.fail(io::ErrorKind::WriteZero.into()))),
                Ok(written) => self.advance(written),
                Err(error) => return Poll::Ready(Err(self.fail(error))),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn fail(&mut self, error: io::Error) -> io::Error {
        self.discard();
        error
    }

    fn advance(&mut self, written: usize) {
        self.offset += written;
        while let Some(part) = self.parts.front() {
            let length = part.bytes().len();
            if self.offset < length {
                return;
            }
            self.offset -= length;
            self.parts.pop_front();
        }
    }
}
