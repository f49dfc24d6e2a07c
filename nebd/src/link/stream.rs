//! What travels over the link for NBD clients: frames with payloads in buffers of nebd's own.
//!
//! Called by the event loop once the link is up. Must not know: NBD's bytes, clients. `complete_once`: an answer that
//! fits no request that was sent cuts the link.

use super::reader::{Body, Reader};
use super::{Link, LinkDown, not_ours};
use crate::inflight::Outcome;
use crate::poller::Poller;
use crate::receive::{READS_PER_TURN, Received, read_after, read_payload};
use crate::send_queue::SendQueue;
use crate::volume::{Answer, Origin, ReadData, Volume};
use rustix::event::epoll::EventFlags;
use spline_link::{Header, Message, extents};
use spline_types::{BlockOp, Completion, Fault, RequestId, Unavailable};
use std::rc::Rc;

/// Unsent bytes past which requests stay in the table: more would only lie in another queue.
const UNSENT_MAX: usize = 1 << 20;

/// Frames on their way in and out.
#[derive(Debug, Default)]
pub struct Stream {
    reader: Reader,
    /// Came with the welcome, not looked at yet.
    left_over: Vec<u8>,
    partial: Vec<u8>,
    out: SendQueue,
    watching_out: bool,
}

impl Stream {
    /// The stream of a link that has just come up; `left_over` came with its welcome.
    pub fn new(left_over: Vec<u8>) -> Self {
        Self { left_over, ..Self::default() }
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
        mut answer: impl FnMut(&mut Volume, Origin, Result<Answer<'_>, Fault>),
    ) -> Result<(), LinkDown> {
        let left_over = std::mem::take(&mut self.left_over);
        let mut input = &left_over[..];
        while let Some((message, body)) = self.reader.next(&mut input)? {
            act(message, body, link, volume, &mut answer)?;
        }
        self.partial.extend_from_slice(input);
        for _ in 0..READS_PER_TURN {
            let Some(socket) = link.socket() else { return Ok(()) };
            let mut direct = false;
            let received = match self.reader.payload() {
                Some((payload, missing)) if self.partial.is_empty() => {
                    direct = true;
                    read_payload(socket, payload, missing, &mut self.partial)?
                }
                _ => read_after(socket, &mut self.partial, scratch)?,
            };
            let Received::Bytes { count, drained } = received else {
                return if received == Received::Closed { Err(LinkDown::Closed) } else { Ok(()) };
            };
            let left = std::mem::take(&mut self.partial);
            let mut input = if direct { &left[..] } else { &scratch[..count] };
            while let Some((message, body)) = self.reader.next(&mut input)? {
                act(message, body, link, volume, &mut answer)?;
            }
            self.partial.extend_from_slice(input);
            if drained {
                break;
            }
        }
        Ok(())
    }

    /// Puts unsent requests into the queue, oldest first, and sends what the socket takes.
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn flush(
        &mut self,
        link: &Link,
        volume: &mut Volume,
        poller: &Poller,
        token: u64,
    ) -> Result<(), LinkDown> {
        let Some(socket) = link.socket() else { return Ok(()) };
        loop {
            while let Some(window) = link.window()
                && self.out.bytes() < UNSENT_MAX
            {
                let Some(entry) = volume.inflight.next_to_send(window) else { break };
                self.out.push(&Header::request(entry.request).encode());
                self.out.push_shared(&entry.context.payload, 0..entry.context.payload.len());
            }
            let queued = self.out.bytes();
            if queued == 0 || !self.out.write_to(socket)? || queued < UNSENT_MAX {
                break;
            }
        }
        let watch_out = !self.out.is_empty();
        if watch_out != self.watching_out {
            let flags = if watch_out { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            poller.modify(socket, token, flags)?;
            self.watching_out = watch_out;
        }
        Ok(())
    }

    /// Says goodbye for good: the gateway may close the session. Sent as far as the socket takes it.
    pub fn detach(&mut self, link: &mut Link) {
        if let Some(socket) = link.socket() {
            self.out.push(&Header::bare(Message::Detach).encode());
            if let Err(error) = self.out.write_to(socket) {
                tracing::debug!(%error, "goodbye to the gateway not sent");
            }
        }
        link.end();
    }

    /// Gives memory back while nothing happens.
    pub fn shrink(&mut self) {
        self.out.shrink();
        self.partial.shrink_to_fit();
    }
}

fn act(
    message: Message,
    body: Body<'_>,
    link: &mut Link,
    volume: &mut Volume,
    answer: &mut impl FnMut(&mut Volume, Origin, Result<Answer<'_>, Fault>),
) -> Result<(), LinkDown> {
    match message {
        Message::Reply { id, completion } => complete(id, &completion, body, volume, answer),
        Message::Resized { size } => {
            tracing::info!(size, "volume resized");
            volume.export.geometry.size = size;
            Ok(())
        }
        Message::Leaving => {
            link.gateway_leaves(volume.now);
            Ok(())
        }
        Message::Lost => Err(LinkDown::Lost),
        other => Err(not_ours(&other)),
    }
}

/// Checks an answer against its request before anything is done with it.
fn complete(
    id: RequestId,
    completion: &Completion,
    body: Body<'_>,
    volume: &mut Volume,
    answer: &mut impl FnMut(&mut Volume, Origin, Result<Answer<'_>, Fault>),
) -> Result<(), LinkDown> {
    let request = volume.inflight.sent(id).ok_or(LinkDown::WrongAnswer(id))?.request;
    let expected = match (completion, request.op) {
        (Completion::Done(()), BlockOp::Read) => request.range.length(),
        (Completion::Done(()), BlockOp::Status) => body.bytes().len() as u64,
        _ => 0,
    };
    if body.bytes().len() as u64 != expected {
        return Err(LinkDown::WrongAnswer(id));
    }
    let result = match (completion, request.op) {
        (Completion::Done(()), BlockOp::Read) => Ok(Answer::Data(match body {
            Body::Slice(bytes) => ReadData::Slice(bytes),
            Body::Whole(bytes) => ReadData::Shared(Rc::new(bytes)),
        })),
        (Completion::Done(()), BlockOp::Status) => {
            Ok(Answer::Extents(extents::decode(body.bytes(), request.range.length())?))
        }
        (Completion::Done(()), _) => Ok(Answer::Done),
        (Completion::Failed(fault), _) => Err(*fault),
        (Completion::Withdrawn, _) => Err(Fault::Unavailable(Unavailable::Unreachable)),
    };
    match volume.inflight.complete(id, completion) {
        Outcome::Answer(entry) => {
            volume.count(&entry, &result.as_ref().map(|_| ()).map_err(|fault| *fault));
            answer(volume, entry.context.origin, result);
            Ok(())
        }
        // Withdrawn: the guest learns nothing, the next link gets it again.
        Outcome::Kept => Ok(()),
        Outcome::Unknown => Err(LinkDown::WrongAnswer(id)),
    }
}
