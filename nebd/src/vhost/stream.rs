//! What travels over the socket of a worker's link that has no ring: frames whose payload lies in the guest's memory.
//!
//! Called by the worker once its link is up. Data of a guest's write goes from its memory into the socket, data of a read from
//! the socket into its memory; nebd keeps no copy, so a replay sends what the guest's memory holds by then. Must not know:
//! rings. `complete_once`: an answer that fits no request that was sent whole cuts the link.

use super::memory::{GuestMemory, Segment};
use crate::inflight::{Entry, Inflight, Outcome};
use crate::link::{Link, LinkDown, not_ours};
use crate::receive::{READS_PER_TURN, Received, read_after};
use crate::vectored::{Incoming, Outgoing};
use spline_link::{HEADER_BYTES, Header, Message};
use spline_types::{BlockOp, Completion, Fault, RequestId, Unavailable};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// Frames of one send: the pieces of most fit one call.
const FRAMES_PER_SEND: usize = 64;
/// Bytes handed to the socket and not sent, past which requests stay in the table.
const UNSENT_MAX: u64 = 1 << 20;
/// Payloads of which at least so many bytes are missing are read straight into the guest's memory; smaller ones come through
/// the shared buffer, many in one read.
const DIRECT_MIN: u64 = 32 << 10;

/// What the in-flight table keeps of a request.
#[derive(Debug)]
pub enum Asked {
    /// A guest waits for it.
    Guest(GuestRequest),
    /// Nobody does: its answer proves that everything sent before on another link has ended.
    Probe,
}

/// A guest's request.
#[derive(Debug)]
pub struct GuestRequest {
    /// Where it came from.
    pub queue: u16,
    /// Its chain.
    pub head: u16,
    /// The guest's memory as it was then.
    pub memory: Arc<GuestMemory>,
    /// What is written, or where to put what is read.
    pub data: Vec<Segment>,
    /// Where the status goes.
    pub status: Segment,
    /// The connection that asked is gone, or was reset: its memory must not be touched any more.
    pub abandoned: bool,
}

/// What has come.
pub enum Event {
    /// A request has ended.
    Ended(Entry<Asked>, Result<(), Fault>),
    /// The volume has a new size, bytes.
    Resized(u64),
    /// Another gateway process has taken the link over: what was withdrawn is to be sent again.
    Renewed,
}

/// A read's data on its way.
#[derive(Clone, Copy, Debug)]
struct Coming {
    id: RequestId,
    have: u64,
    length: u64,
}

/// Frames on their way in and out.
#[derive(Debug, Default)]
pub struct Stream {
    /// Taken from the table and not sent whole, in the order of their ids.
    sending: VecDeque<RequestId>,
    /// Bytes of the first one that are sent.
    sent: u64,
    headers: Vec<u8>,
    /// Less than a frame's header.
    partial: Vec<u8>,
    coming: Option<Coming>,
    /// The socket took less than it was given: it is watched for room.
    pub full: bool,
}

fn frame_bytes(entry: &Entry<Asked>) -> u64 {
    HEADER_BYTES as u64 + if entry.request.op == BlockOp::Write { entry.request.range.length() } else { 0 }
}

impl Stream {
    /// The stream of a link that has just come up; `left_over` came with its welcome.
    pub fn new(left_over: Vec<u8>) -> Self {
        Self { partial: left_over, ..Self::default() }
    }

    /// Whether a frame has been sent in part: it must be sent whole, or the link cut.
    pub fn is_within_a_frame(&self) -> bool {
        self.sent > 0
    }

    /// Forgets requests that were taken from the table and not sent; the caller takes them out of it.
    pub fn forget_unsent(&mut self) -> impl Iterator<Item = RequestId> {
        std::mem::take(&mut self.sending).into_iter()
    }

    /// Sends unsent requests, oldest first, as far as the socket takes them.
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn flush(&mut self, link: &Link, table: &mut Inflight<Asked>) -> Result<(), LinkDown> {
        let Some(socket) = link.socket() else { return Ok(()) };
        self.full = false;
        let mut mended = false;
        loop {
            self.take_in(link, table);
            if self.sending.is_empty() {
                return Ok(());
            }
            self.headers.clear();
            for id in self.sending.iter().take(FRAMES_PER_SEND) {
                let entry = table.get(*id).ok_or(LinkDown::WrongAnswer(*id))?;
                self.headers.extend_from_slice(&Header::request(entry.request).encode());
            }
            let outgoing = gather(&self.sending, &self.headers, self.sent, table);
            let sent = match outgoing.send(socket) {
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if is_fault(&error) && !mended => {
                    self.sending.iter().take(FRAMES_PER_SEND).for_each(|id| mend(table, *id));
                    mended = true;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            mended = false;
            self.full = sent < outgoing.bytes();
            self.advance(sent as u64, table);
            if self.full {
                return Ok(());
            }
        }
    }

    fn take_in(&mut self, link: &Link, table: &mut Inflight<Asked>) {
        let mut unsent = 0;
        while let Some(window) = link.window()
            && self.sending.len() < FRAMES_PER_SEND
            && unsent < UNSENT_MAX
        {
            let Some(entry) = table.next_to_send(window) else { return };
            unsent += frame_bytes(entry);
            self.sending.push_back(entry.request.id);
        }
    }

    fn advance(&mut self, sent: u64, table: &Inflight<Asked>) {
        self.sent += sent;
        while let Some(entry) = self.sending.front().and_then(|id| table.get(*id)) {
            let Some(rest) = self.sent.checked_sub(frame_bytes(entry)) else { return };
            self.sent = rest;
            self.sending.pop_front();
        }
    }

    /// Reads what has come. Each answered request is an event, exactly once (`complete_once`).
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn receive(
        &mut self,
        link: &mut Link,
        table: &mut Inflight<Asked>,
        scratch: &mut [u8],
        now: Instant,
        mut on: impl FnMut(Event),
    ) -> Result<(), LinkDown> {
        if self.partial.len() >= HEADER_BYTES {
            let left_over = std::mem::take(&mut self.partial);
            self.take(&left_over, link, table, now, &mut on)?;
        }
        for _ in 0..READS_PER_TURN {
            let Some(socket) = link.socket() else { return Ok(()) };
            let (direct, received) =
                match self.coming.filter(|coming| coming.length - coming.have >= DIRECT_MIN) {
                    Some(coming) if self.partial.is_empty() => read_direct(socket, coming, table, scratch)?,
                    _ => (0, read_after(socket, &mut self.partial, scratch)?),
                };
            if let (Some(coming), true) = (&mut self.coming, direct > 0) {
                coming.have += direct;
            }
            let Received::Bytes { count, drained } = received else {
                return if received == Received::Closed { Err(LinkDown::Closed) } else { Ok(()) };
            };
            self.take(&scratch[..count], link, table, now, &mut on)?;
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
        table: &mut Inflight<Asked>,
        now: Instant,
        on: &mut impl FnMut(Event),
    ) -> Result<(), LinkDown> {
        loop {
            if let Some(coming) = &mut self.coming {
                let missing = coming.length - coming.have;
                let (front, rest) =
                    input.split_at(input.len().min(usize::try_from(missing).unwrap_or(usize::MAX)));
                put(table, coming, front);
                coming.have += front.len() as u64;
                input = rest;
                if coming.have < coming.length {
                    return Ok(());
                }
                let id = coming.id;
                self.coming = None;
                end(id, Completion::Done(()), table, on)?;
            }
            let Some((head, rest)) = input.split_first_chunk::<HEADER_BYTES>() else { break };
            input = rest;
            let Header { message, payload } = Header::decode(head)?;
            match message {
                Message::Reply { id, completion } => self.reply(id, completion, payload, table, on)?,
                Message::Resized { size } => on(Event::Resized(size)),
                Message::Leaving => link.gateway_leaves(now),
                Message::Lost => return Err(LinkDown::Lost),
                other => return Err(not_ours(&other)),
            }
        }
        self.partial.extend_from_slice(input);
        Ok(())
    }

    fn reply(
        &mut self,
        id: RequestId,
        completion: Completion,
        payload: u32,
        table: &mut Inflight<Asked>,
        on: &mut impl FnMut(Event),
    ) -> Result<(), LinkDown> {
        let request = table.sent(id).map(|entry| entry.request).ok_or(LinkDown::WrongAnswer(id))?;
        let expected = match (&completion, request.op) {
            (Completion::Done(()), BlockOp::Read) => request.range.length(),
            _ => 0,
        };
        // Ids go out in their order: nobody can have seen one that is not sent whole.
        let is_sent = self.sending.front().is_none_or(|first| id < *first);
        if !is_sent || u64::from(payload) != expected {
            return Err(LinkDown::WrongAnswer(id));
        }
        if expected > 0 {
            self.coming = Some(Coming { id, have: 0, length: expected });
            return Ok(());
        }
        end(id, completion, table, on)
    }
}

/// The frames of `sending`, less what is sent of the first.
fn gather<'a>(
    sending: &VecDeque<RequestId>,
    headers: &'a [u8],
    sent: u64,
    table: &'a Inflight<Asked>,
) -> Outgoing<'a> {
    let mut outgoing = Outgoing::new();
    let mut skip = sent;
    for (id, header) in sending.iter().zip(headers.as_chunks::<HEADER_BYTES>().0) {
        let part = header.get(skip as usize..).unwrap_or_default();
        skip = skip.saturating_sub(HEADER_BYTES as u64);
        if !outgoing.push(part) {
            return outgoing;
        }
        let Some(Entry { request, context: Asked::Guest(guest), .. }) = table.get(*id) else { continue };
        if request.op == BlockOp::Write {
            for segment in &guest.data {
                let length = u64::from(segment.length);
                let segment = segment.skip(skip.min(length) as u32);
                skip = skip.saturating_sub(length);
                if !outgoing.push_segment(&guest.memory, segment) {
                    return outgoing;
                }
            }
        }
    }
    outgoing
}

/// Reads a payload's missing bytes to where the guest wants them, and what comes behind them into `scratch`. Answers how many
/// bytes went to the guest, and what `scratch` holds.
fn read_direct(
    socket: std::os::fd::BorrowedFd<'_>,
    coming: Coming,
    table: &Inflight<Asked>,
    scratch: &mut [u8],
) -> Result<(u64, Received), LinkDown> {
    let Some(Asked::Guest(guest)) = table.get(coming.id).map(|entry| &entry.context) else {
        return Err(LinkDown::WrongAnswer(coming.id));
    };
    if guest.abandoned {
        return Ok((0, read_after(socket, &mut Vec::new(), scratch)?));
    }
    let mut incoming = Incoming::new();
    let (mut skip, mut whole) = (coming.have, true);
    for segment in &guest.data {
        let length = u64::from(segment.length);
        whole = whole && incoming.push_segment(&guest.memory, segment.skip(skip.min(length) as u32));
        skip = skip.saturating_sub(length);
    }
    let wanted = incoming.bytes();
    if whole {
        incoming.push(scratch);
    }
    let offered = incoming.bytes();
    match incoming.receive(socket) {
        Ok(0) => Ok((0, Received::Closed)),
        Ok(got) => {
            let count = got.saturating_sub(wanted);
            Ok(((got - count) as u64, Received::Bytes { count, drained: got < offered }))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok((0, Received::Nothing)),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            Ok((0, Received::Bytes { count: 0, drained: false }))
        }
        Err(error) if is_fault(&error) => {
            mend(table, coming.id);
            Ok((0, Received::Bytes { count: 0, drained: false }))
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether guest memory has vanished under a call.
fn is_fault(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

/// Replaces what has vanished of a request's memory by zeros, so that the call can be repeated. The front-end truncated it: it
/// has lost what was there, and its queues are broken from now on, but the link must not suffer.
fn mend(table: &Inflight<Asked>, id: RequestId) {
    if let Some(Asked::Guest(guest)) = table.get(id).map(|entry| &entry.context) {
        guest.data.iter().for_each(|segment| guest.memory.mend(*segment));
    }
}

/// Copies data of a read to where the guest wants it.
fn put(table: &Inflight<Asked>, coming: &Coming, mut bytes: &[u8]) {
    let Some(Asked::Guest(guest)) = table.get(coming.id).map(|entry| &entry.context) else { return };
    if guest.abandoned {
        return;
    }
    let mut skip = coming.have;
    for segment in &guest.data {
        if bytes.is_empty() {
            return;
        }
        let length = u64::from(segment.length);
        let at = skip.min(length);
        skip -= at;
        let (front, rest) = bytes.split_at(bytes.len().min((length - at) as usize));
        guest.memory.write(*segment, at as u32, front);
        bytes = rest;
    }
}

/// Ends a request by its completion.
pub(super) fn end(
    id: RequestId,
    completion: Completion,
    table: &mut Inflight<Asked>,
    on: &mut impl FnMut(Event),
) -> Result<(), LinkDown> {
    let result = match completion {
        Completion::Done(()) => Ok(()),
        Completion::Failed(fault) => Err(fault),
        Completion::Withdrawn => Err(Fault::Unavailable(Unavailable::Unreachable)),
    };
    match table.complete(id, &completion) {
        Outcome::Answer(entry) => on(Event::Ended(entry, result)),
        // Withdrawn: the guest learns nothing, the next link gets it again.
        Outcome::Kept => {}
        Outcome::Unknown => return Err(LinkDown::WrongAnswer(id)),
    }
    Ok(())
}

#[cfg(test)]
mod tests;
