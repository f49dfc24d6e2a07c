//! What travels over the socket of a link that has no ring, for NBD clients: frames whose payload lies in buffers of the area.
//!
//! Called by [`carrier`](super::carrier) once the link is up. Must not know: NBD's bytes, clients. `complete_once`: an answer that
//! fits no request that was sent cuts the link. `guest_cannot_crash_us` holds for the gateway too: its bytes are checked
//! before they are used.

use super::{Link, LinkDown, not_ours};
use crate::area::Buffer;
use crate::receive::{DIRECT_MIN, READS_PER_TURN, Received, read_after, read_direct};
use crate::send_queue::SendQueue;
use crate::volume::{Answer, Origin, Volume};
use spline_link::{HEADER_BYTES, Header, Message};
use spline_types::{BlockOp, Completion, Fault, RequestId};
use std::rc::Rc;

/// Unsent bytes past which requests stay in the table: more would only lie in another queue.
const UNSENT_MAX: usize = 1 << 20;

/// A payload on its way.
#[derive(Debug)]
struct Coming {
    id: RequestId,
    into: Rc<Buffer>,
    have: usize,
    length: usize,
}

/// Frames on their way in and out.
#[derive(Debug, Default)]
pub struct Stream {
    /// Less than a frame's header, or what came with the welcome.
    partial: Vec<u8>,
    coming: Option<Coming>,
    out: SendQueue,
}

impl Stream {
    /// The stream of a link that has just come up; `left_over` came with its welcome.
    pub fn new(left_over: Vec<u8>) -> Self {
        Self { partial: left_over, ..Self::default() }
    }

    /// The socket took less than it was given.
    pub fn is_full(&self) -> bool {
        !self.out.is_empty()
    }

    /// Reads what has come. Each answered request goes to `answer`, exactly once (`complete_once`).
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn receive(
        &mut self,
        link: &mut Link,
        volume: &mut Volume,
        scratch: &mut [u8],
        mut answer: impl FnMut(&mut Volume, Origin, Result<Answer, Fault>),
    ) -> Result<(), LinkDown> {
        if self.partial.len() >= HEADER_BYTES {
            let left_over = std::mem::take(&mut self.partial);
            self.take(&left_over, link, volume, &mut answer)?;
        }
        for _ in 0..READS_PER_TURN {
            let Some(socket) = link.socket() else { return Ok(()) };
            let direct = |coming: &&mut Coming| {
                coming.length == coming.into.length() && coming.length - coming.have >= DIRECT_MIN
            };
            let received = match self.coming.as_mut().filter(direct) {
                Some(coming) if self.partial.is_empty() => {
                    let (direct, received) = read_direct(socket, (&coming.into, coming.have), scratch)?;
                    coming.have += direct;
                    received
                }
                _ => read_after(socket, &mut self.partial, scratch)?,
            };
            let Received::Bytes { count, drained } = received else {
                return if received == Received::Closed { Err(LinkDown::Closed) } else { Ok(()) };
            };
            self.take(&scratch[..count], link, volume, &mut answer)?;
            if drained {
                break;
            }
        }
        Ok(())
    }

    /// Acts upon bytes in their order and keeps the start of a header.
    fn take(
        &mut self,
        mut input: &[u8],
        link: &mut Link,
        volume: &mut Volume,
        answer: &mut impl FnMut(&mut Volume, Origin, Result<Answer, Fault>),
    ) -> Result<(), LinkDown> {
        loop {
            if let Some(coming) = &mut self.coming {
                let (front, rest) = input.split_at(input.len().min(coming.length - coming.have));
                coming.into.write(coming.have, front);
                coming.have += front.len();
                input = rest;
            }
            if let Some(came) = self.coming.take_if(|coming| coming.have == coming.length) {
                let payload = status_bytes(volume, &came);
                drop(came.into);
                complete((came.id, Completion::Done(()), payload), volume, answer)?;
            } else if self.coming.is_some() {
                return Ok(());
            }
            let Some((head, rest)) = input.split_first_chunk::<HEADER_BYTES>() else { break };
            input = rest;
            let Header { message, payload } = Header::decode(head)?;
            match message {
                Message::Reply { id, completion } => {
                    self.coming = coming(id, &completion, payload as usize, volume)?;
                    if self.coming.is_none() {
                        complete((id, completion, 0), volume, answer)?;
                    }
                }
                Message::Resized { size } => volume.resized(size),
                Message::Leaving => link.gateway_leaves(volume.now),
                Message::Lost => return Err(LinkDown::Lost),
                other => return Err(not_ours(&other)),
            }
        }
        self.partial.extend_from_slice(input);
        Ok(())
    }

    /// Puts unsent requests into the queue, oldest first, and sends what the socket takes.
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn flush(&mut self, link: &Link, volume: &mut Volume) -> Result<(), LinkDown> {
        let Some(socket) = link.socket() else { return Ok(()) };
        loop {
            while let Some(window) = link.window()
                && self.out.bytes() < UNSENT_MAX
            {
                let Some(entry) = volume.inflight.next_to_send(window) else { break };
                self.out.push(&Header::request(entry.request).encode());
                if let (BlockOp::Write, Some(data)) = (entry.request.op, &entry.context.data) {
                    self.out.push_buffer(data, 0..data.length());
                }
            }
            let queued = self.out.bytes();
            if queued == 0 || !self.out.write_to(socket)? || queued < UNSENT_MAX {
                return Ok(());
            }
        }
    }

    /// Appends a frame behind all others and sends what the socket takes.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn say(&mut self, message: Message, link: &Link) -> Result<(), LinkDown> {
        let Some(socket) = link.socket() else { return Ok(()) };
        self.out.push(&Header::bare(message).encode());
        self.out.write_to(socket)?;
        Ok(())
    }

    /// Gives memory back while nothing happens.
    pub fn shrink(&mut self) {
        self.out.shrink();
        self.partial.shrink_to_fit();
    }
}

/// The payload that follows a reply's header; `None` if there is none. It is checked before anything of it is read.
fn coming(
    id: RequestId,
    completion: &Completion,
    length: usize,
    volume: &Volume,
) -> Result<Option<Coming>, LinkDown> {
    let entry = volume.inflight.sent(id).ok_or(LinkDown::WrongAnswer(id))?;
    let fits = match (completion, entry.request.op) {
        (Completion::Done(()), BlockOp::Read) => length as u64 == entry.request.range.length(),
        (Completion::Done(()), BlockOp::Status) => length > 0,
        _ => length == 0,
    };
    match &entry.context.data {
        _ if !fits => Err(LinkDown::WrongAnswer(id)),
        _ if length == 0 => Ok(None),
        Some(into) if length <= into.length() => {
            Ok(Some(Coming { id, into: Rc::clone(into), have: 0, length }))
        }
        _ => Err(LinkDown::WrongAnswer(id)),
    }
}

/// The bytes of extents that have come.
fn status_bytes(volume: &Volume, came: &Coming) -> usize {
    let is_status = volume.inflight.sent(came.id).is_some_and(|entry| entry.request.op == BlockOp::Status);
    if is_status { came.length } else { 0 }
}

fn complete(
    (id, completion, payload): (RequestId, Completion, usize),
    volume: &mut Volume,
    answer: &mut impl FnMut(&mut Volume, Origin, Result<Answer, Fault>),
) -> Result<(), LinkDown> {
    if let Some((origin, result)) = volume.complete(id, completion, payload)? {
        answer(volume, origin, result);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
