//! What travels over a link that has a ring, for NBD clients: requests and completions in shared memory, their data in an area that
//! the gateway maps.
//!
//! Called by [`carrier`](super::carrier) once the link is up; [`stream`](super::stream) is the same over a socket. An area is passed on
//! as a region before the first request that names it: that of the link, and those of links before it, in which data of writes
//! lies that were not answered. Must not know: NBD's bytes, clients. `complete_once`: a completion that fits no request that was
//! sent cuts the link.

use super::{Link, LinkDown, not_ours};
use crate::area::Area;
use crate::poller::Poller;
use crate::receive::{READS_PER_TURN, Received, read_after};
use crate::volume::{Answer, Origin, Volume};
use rustix::event::epoll::EventFlags;
use spline_link::ring::{NebdRing, Piece};
use spline_link::{HEADER_BYTES, Header, Message, passing};
use spline_types::Fault;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

/// A ring, and what the gateway knows of our memory.
#[derive(Debug)]
pub struct RingStream {
    ring: Box<NebdRing>,
    /// Less than a frame's header, or what came with the welcome.
    partial: Vec<u8>,
    /// Areas that were passed on, by the numbers of their regions; few.
    known: Vec<(u32, Rc<Area>)>,
    next_number: u32,
    pieces: Vec<Piece>,
    bells_told: u64,
    /// The socket had no room for a frame.
    full: bool,
}

impl RingStream {
    /// The ring of a link that has just come up; `left_over` came with its welcome. Its bell is watched with `token`.
    ///
    /// # Errors
    /// Those of epoll_ctl.
    pub fn new(ring: Box<NebdRing>, left_over: Vec<u8>, poller: &Poller, token: u64) -> io::Result<Self> {
        // Edge-triggered: a bell is never read, each ring of it is an event.
        poller.add(ring.bell(), token, EventFlags::IN | EventFlags::ET)?;
        let (known, pieces) = (Vec::new(), Vec::new());
        Ok(Self { ring, partial: left_over, known, next_number: 0, pieces, bells_told: 0, full: false })
    }

    /// Watches the bell no more: the gateway holds it too, so that closing it would not end that.
    pub fn close(&self, poller: &Poller) {
        poller.remove(self.ring.bell());
    }

    /// How often the gateway had to be woken since the last time.
    pub fn new_bells(&mut self) -> u64 {
        let bells = self.ring.bells();
        bells - std::mem::replace(&mut self.bells_told, bells)
    }

    /// The socket had no room for a frame.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// Puts unsent requests into the ring, oldest first, as far as there is room, and shows them to the gateway.
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn flush(&mut self, link: &Link, volume: &mut Volume) -> Result<(), LinkDown> {
        self.full = false;
        while let Some(window) = link.window() {
            let Some(entry) = volume.inflight.peek_to_send(window) else { break };
            let (request, data) = (entry.request, entry.context.data.as_ref());
            self.pieces.clear();
            if let Some(data) = data {
                let Some(number) = self.number_of(data.area(), link)? else { break };
                data.pieces(number, &mut self.pieces);
            }
            if !self.ring.has_room(self.pieces.len())? {
                break;
            }
            self.ring.push(&request, &self.pieces);
            volume.inflight.next_to_send(window);
        }
        self.ring.publish();
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
        let Some(socket) = link.socket() else { return Ok(false) };
        let bytes = Header::bare(message).encode();
        loop {
            match passing::send(socket, &bytes, fds) {
                // A unix socket takes a message of this size whole or not at all.
                Ok(count) if count == bytes.len() => return Ok(true),
                Ok(_) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.full = true;
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
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
        while let Some(ended) = self.ring.pop()? {
            if let Some((origin, result)) =
                volume.complete(ended.id, ended.completion, ended.payload as usize)?
            {
                answer(volume, origin, result);
            }
        }
        Ok(())
    }

    /// Whether a completion is there.
    pub fn has_answers(&mut self) -> bool {
        // What makes no sense is found by `receive`.
        self.ring.look().unwrap_or(true)
    }

    /// Whether the gateway has anything to answer.
    pub fn is_asked(&self) -> bool {
        self.ring.unanswered() > 0
    }

    /// Says that the thread is about to wait. False if there is a completion: it must not.
    pub fn sleep(&mut self) -> bool {
        // As above.
        self.ring.sleep().unwrap_or(false)
    }

    /// Says that the thread looks by itself.
    pub fn wake(&mut self) {
        self.ring.wake();
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
        for _ in 0..READS_PER_TURN {
            while let Some((head, rest)) = self.partial.split_first_chunk::<HEADER_BYTES>() {
                let message = Header::decode(head)?.message;
                self.partial = rest.to_vec();
                self.act(&message, link, volume, answer)?;
            }
            let Some(socket) = link.socket() else { return Ok(()) };
            match read_after(socket, &mut self.partial, scratch)? {
                Received::Bytes { count, .. } => self.partial.extend_from_slice(&scratch[..count]),
                Received::Nothing => return Ok(()),
                Received::Closed => {
                    // What it has answered counts: it is not to be carried out again.
                    self.receive(volume, answer)?;
                    return Err(LinkDown::Closed);
                }
            }
        }
        Ok(())
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
