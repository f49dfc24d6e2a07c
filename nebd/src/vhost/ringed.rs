//! What travels over a worker's link that has a ring: requests and completions in shared memory, data where the guest has it.
//!
//! Called by the worker once its link is up; [`stream`](super::stream) is the same over a socket. The gateway maps the guest's memory:
//! each region is passed on once, before the first request that names it, and taken back when no request can name it any more.
//! Must not know: rings of the guest. `complete_once`: a completion that fits no request that was sent cuts the link.

use super::memory::{GuestMemory, Region, Segment};
use super::stream::{Asked, Event, end};
use crate::inflight::Inflight;
use crate::link::frames::{Frame, LinkRing};
use crate::link::{Link, LinkDown, not_ours};
use crate::poller::Poller;
use spline_link::passing::FDS_MAX;
use spline_link::ring::{NebdRing, PIECES_MAX, Piece};
use spline_link::{Header, Message};
use spline_types::BlockOp;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};
use std::time::Instant;

/// A guest's memory that requests name, and its regions with their numbers on this link. Kept by others: other workers know it too.
#[derive(Debug)]
struct Known {
    memory: Weak<GuestMemory>,
    regions: Vec<(Weak<Region>, u32)>,
}

/// A frame that passes a region on, or takes it back.
#[derive(Debug)]
enum Notice {
    Region(u32, Arc<Region>),
    Gone(u32),
}

/// A ring, and what the gateway knows of the guest's memory.
#[derive(Debug)]
pub struct RingStream {
    link: LinkRing,
    /// The newest last.
    known: Vec<Known>,
    next_number: u32,
    /// Frames that the socket has not taken.
    notices: Vec<Notice>,
    pieces: Vec<Piece>,
}

impl RingStream {
    /// The ring of a link that has just come up; `left_over` came with its welcome. Its bell is watched with `token`.
    ///
    /// # Errors
    /// Those of epoll_ctl.
    pub fn new(ring: Box<NebdRing>, left_over: Vec<u8>, poller: &Poller, token: u64) -> io::Result<Self> {
        let link = LinkRing::new(ring, left_over, poller, token)?;
        Ok(Self { link, known: Vec::new(), next_number: 0, notices: Vec::new(), pieces: Vec::new() })
    }

    /// The ring and its frames.
    pub fn link(&mut self) -> &mut LinkRing {
        &mut self.link
    }

    /// The socket had no room for a frame.
    pub fn is_full(&self) -> bool {
        self.link.full
    }

    /// Puts unsent requests into the ring, oldest first, as far as there is room, and shows them to the gateway.
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn flush(&mut self, link: &Link, table: &mut Inflight<Asked>) -> Result<(), LinkDown> {
        self.link.full = false;
        if !self.notices.is_empty() && !self.tell(link)? {
            return Ok(());
        }
        while let Some(window) = link.window() {
            let Some(entry) = table.peek_to_send(window) else { break };
            let (request, context) = (entry.request, &entry.context);
            self.pieces.clear();
            if let Asked::Guest(guest) = context
                && matches!(request.op, BlockOp::Read | BlockOp::Write)
            {
                let is_it = |known: &Known| std::ptr::eq(known.memory.as_ptr(), Arc::as_ptr(&guest.memory));
                let known = match self.known.iter().rposition(is_it) {
                    Some(known) => known,
                    None => self.learn(&guest.memory),
                };
                gather(&mut self.pieces, &guest.data, &self.known[known].regions);
            }
            if !self.link.ring.has_room(self.pieces.len())? || !self.tell(link)? {
                break;
            }
            self.link.ring.push(&request, &self.pieces);
            table.next_to_send(window);
        }
        self.link.ring.publish();
        Ok(())
    }

    /// Gives numbers to the regions of a memory; those of another memory keep theirs.
    fn learn(&mut self, memory: &Arc<GuestMemory>) -> usize {
        // A guest that changes its memory again and again need not rest for that.
        self.forget_memories();
        let mut regions = Vec::with_capacity(memory.regions().len());
        for region in memory.regions() {
            let number = self.number_of(region).unwrap_or_else(|| {
                let number = self.next_number;
                self.next_number += 1;
                self.notices.push(Notice::Region(number, Arc::clone(region)));
                number
            });
            regions.push((Arc::downgrade(region), number));
        }
        self.known.push(Known { memory: Arc::downgrade(memory), regions });
        self.known.len() - 1
    }

    fn number_of(&self, region: &Arc<Region>) -> Option<u32> {
        let all = self.known.iter().rev().flat_map(|known| &known.regions);
        all.into_iter()
            .find(|(other, _)| std::ptr::eq(other.as_ptr(), Arc::as_ptr(region)))
            .map(|found| found.1)
    }

    /// Forgets memories that no request and no queue has any more, and takes regions back that were only theirs.
    pub fn forget_memories(&mut self) {
        let is_gone = |known: &Known| known.memory.strong_count() == 0;
        let (gone, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.known).into_iter().partition(is_gone);
        self.known = left;
        let mut unused: Vec<u32> =
            gone.iter().flat_map(|known| &known.regions).map(|region| region.1).collect();
        unused.sort_unstable();
        unused.dedup();
        let is_used =
            |number: &u32| self.known.iter().any(|known| known.regions.iter().any(|r| r.1 == *number));
        unused.retain(|number| !is_used(number));
        self.notices.extend(unused.into_iter().map(Notice::Gone));
    }

    /// Sends notices; false if the socket has no room for all of them.
    fn tell(&mut self, link: &Link) -> Result<bool, LinkDown> {
        while !self.notices.is_empty() {
            let many = &self.notices[..self.notices.len().min(FDS_MAX)];
            let frames: Vec<u8> = many.iter().flat_map(|notice| notice.frame().encode()).collect();
            let fds: Vec<BorrowedFd<'_>> = many.iter().filter_map(Notice::file).collect();
            if !self.link.tell(link, &frames, &fds)? {
                return Ok(false);
            }
            let told = many.len();
            self.notices.drain(..told);
        }
        Ok(true)
    }

    /// Takes completions. Each answered request is an event, exactly once (`complete_once`).
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn receive(
        &mut self,
        table: &mut Inflight<Asked>,
        mut on: impl FnMut(Event),
    ) -> Result<(), LinkDown> {
        while let Some(answer) = self.link.ring.pop()? {
            if answer.payload != 0 || table.sent(answer.id).is_none() {
                return Err(LinkDown::WrongAnswer(answer.id));
            }
            end(answer.id, answer.completion, table, &mut on)?;
        }
        Ok(())
    }

    /// Reads frames from the socket.
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn receive_frames(
        &mut self,
        link: &mut Link,
        table: &mut Inflight<Asked>,
        scratch: &mut [u8],
        now: Instant,
        mut on: impl FnMut(Event),
    ) -> Result<(), LinkDown> {
        let mut reads = 0;
        loop {
            match self.link.next_frame(link, scratch, &mut reads)? {
                Frame::Said(message) => self.act(message, link, table, now, &mut on)?,
                Frame::Nothing => return Ok(()),
                Frame::Closed => {
                    // What it has answered counts: it is not to be carried out again.
                    self.receive(table, &mut on)?;
                    return Err(LinkDown::Closed);
                }
            }
        }
    }

    fn act(
        &mut self,
        message: Message,
        link: &mut Link,
        table: &mut Inflight<Asked>,
        now: Instant,
        on: &mut impl FnMut(Event),
    ) -> Result<(), LinkDown> {
        match message {
            Message::Resized { size } => on(Event::Resized(size)),
            Message::Leaving => link.gateway_leaves(now),
            Message::Lost => {
                self.receive(table, on)?;
                return Err(LinkDown::Lost);
            }
            Message::Renewed { epoch } => {
                // What was withdrawn was so before this was said.
                self.receive(table, &mut *on)?;
                link.renewed(epoch);
                on(Event::Renewed);
            }
            other => return Err(not_ours(&other)),
        }
        Ok(())
    }
}

impl Notice {
    fn frame(&self) -> Header {
        Header::bare(match self {
            Self::Region(number, region) => {
                let place = region.place();
                Message::Region { number: *number, offset: place.offset, length: place.length }
            }
            Self::Gone(number) => Message::RegionGone { number: *number },
        })
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Region(_, region) => Some(region.file()),
            Self::Gone(_) => None,
        }
    }
}

/// A request's segments as pieces of numbered regions; those that adjoin each other are one. A request that the worker has
/// taken has at most [`PIECES_MAX`].
fn gather(pieces: &mut Vec<Piece>, segments: &[Segment], regions: &[(Weak<Region>, u32)]) {
    for segment in segments {
        let region = regions.get(segment.region as usize).map_or(u32::MAX, |region| region.1);
        match pieces.last_mut() {
            Some(last)
                if last.region == region
                    && last.offset + u64::from(last.length) == segment.offset
                    && last.length.checked_add(segment.length).is_some() =>
            {
                last.length += segment.length;
            }
            _ => pieces.push(Piece { region, length: segment.length, offset: segment.offset }),
        }
    }
    debug_assert!(pieces.len() <= PIECES_MAX);
}
