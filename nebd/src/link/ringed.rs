//! What travels over a link that has a ring, for NBD clients: requests and completions in shared memory, their data in an area that
//! the gateway maps.
//!
//! Called by [`carrier`](super::carrier) once the link is up; [`stream`](super::stream) is the same over a socket. An area is passed on
//! as a region before the first request that names it: that of the link, and those of links before it, in which data of writes
//! lies that were not answered. Must not know: NBD's bytes, clients. `complete_once`: a completion that fits no request that was
//! sent cuts the link.

use super::frames::{Frame, LinkRing};
use super::{Link, LinkDown, not_ours};
use crate::area::Area;
use crate::poller::Poller;
use crate::volume::{Answer, Origin, Volume};
use spline_link::ring::{NebdRing, Piece};
use spline_link::{Header, Message};
use spline_types::Fault;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

/// A ring, and what the gateway knows of our memory.
#[derive(Debug)]
pub struct RingStream {
    link: LinkRing,
    /// Areas that were passed on, by the numbers of their regions; few.
    known: Vec<(u32, Rc<Area>)>,
    next_number: u32,
    pieces: Vec<Piece>,
}

impl RingStream {
    /// The ring of a link that has just come up; `left_over` came with its welcome. Its bell is watched with `token`.
    ///
    /// # Errors
    /// Those of epoll_ctl.
    pub fn new(ring: Box<NebdRing>, left_over: Vec<u8>, poller: &Poller, token: u64) -> io::Result<Self> {
        let link = LinkRing::new(ring, left_over, poller, token)?;
        Ok(Self { link, known: Vec::new(), next_number: 0, pieces: Vec::new() })
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
    pub fn flush(&mut self, link: &Link, volume: &mut Volume) -> Result<(), LinkDown> {
        self.link.full = false;
        while let Some(window) = link.window() {
            let Some(entry) = volume.inflight.peek_to_send(window) else { break };
            let (request, data) = (entry.request, entry.context.data.as_ref());
            self.pieces.clear();
            if let Some(data) = data {
                let Some(number) = self.number_of(data.area(), link)? else { break };
                data.pieces(number, &mut self.pieces);
            }
            if !self.link.ring.has_room(self.pieces.len())? {
                break;
            }
            self.link.ring.push(&request, &self.pieces);
            volume.inflight.next_to_send(window);
        }
        self.link.ring.publish();
        Ok(())
    }

    /// The number of an area's region, which is passed on if it was not; `None` if the socket has no room for that.
    fn number_of(&mut self, area: &Rc<Area>, link: &Link) -> Result<Option<u32>, LinkDown> {
        let known = self.known.iter().rev().find(|(_, known)| Rc::ptr_eq(known, area));
        if let Some((number, _)) = known {
            return Ok(Some(*number));
        }
        let (number, memory) = (self.next_number, area.memory());
        let (offset, length) = (memory.offset(), memory.length() as u64);
        let region = Message::Region { number, offset, length };
        if !self.tell(region, &[memory.fd()], link)? {
            return Ok(None);
        }
        self.next_number += 1;
        self.known.push((number, Rc::clone(area)));
        Ok(Some(number))
    }

    /// Takes areas back that nothing lies in any more.
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn forget_areas(&mut self, link: &Link) -> Result<(), LinkDown> {
        while let Some(at) = self.known.iter().position(|(_, area)| Rc::strong_count(area) == 1) {
            let number = self.known[at].0;
            if !self.tell(Message::RegionGone { number }, &[], link)? {
                break;
            }
            self.known.remove(at);
        }
        Ok(())
    }

    /// Sends a frame; false if the socket has no room.
    fn tell(&mut self, message: Message, fds: &[BorrowedFd<'_>], link: &Link) -> Result<bool, LinkDown> {
        self.link.tell(link, &Header::bare(message).encode(), fds)
    }

    /// Says something behind everything else.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn say(&mut self, message: Message, link: &Link) -> Result<(), LinkDown> {
        self.tell(message, &[], link).map(|_| ())
    }

    /// Takes completions. Each answered request goes to `answer`, exactly once (`complete_once`).
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn receive(
        &mut self,
        volume: &mut Volume,
        answer: &mut impl FnMut(&mut Volume, Origin, Result<Answer, Fault>),
    ) -> Result<(), LinkDown> {
        while let Some(ended) = self.link.ring.pop()? {
            if let Some((origin, result)) =
                volume.complete(ended.id, ended.completion, ended.payload as usize)?
            {
                answer(volume, origin, result);
            }
        }
        Ok(())
    }

    /// Whether the gateway has anything to answer.
    pub fn is_asked(&self) -> bool {
        self.link.ring.unanswered() > 0
    }

    /// Reads frames from the socket.
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn receive_frames(
        &mut self,
        link: &mut Link,
        volume: &mut Volume,
        scratch: &mut [u8],
        answer: &mut impl FnMut(&mut Volume, Origin, Result<Answer, Fault>),
    ) -> Result<(), LinkDown> {
        let mut reads = 0;
        loop {
            match self.link.next_frame(link, scratch, &mut reads)? {
                Frame::Said(message) => self.act(&message, link, volume, answer)?,
                Frame::Nothing => return Ok(()),
                Frame::Closed => {
                    // What it has answered counts: it is not to be carried out again.
                    self.receive(volume, answer)?;
                    return Err(LinkDown::Closed);
                }
            }
        }
    }

    fn act(
        &mut self,
        message: &Message,
        link: &mut Link,
        volume: &mut Volume,
        answer: &mut impl FnMut(&mut Volume, Origin, Result<Answer, Fault>),
    ) -> Result<(), LinkDown> {
        match message {
            Message::Resized { size } => volume.resized(*size),
            Message::Leaving => link.gateway_leaves(volume.now),
            Message::Lost => {
                self.receive(volume, answer)?;
                return Err(LinkDown::Lost);
            }
            Message::Renewed { epoch } => {
                // What was withdrawn was so before this was said.
                self.receive(volume, answer)?;
                link.renewed(*epoch);
                volume.renewed();
            }
            other => return Err(not_ours(other)),
        }
        Ok(())
    }
}
