//! The ring of a link that is up, with the frames of its socket: what is the same for NBD clients' requests and for guests'.
//!
//! Used by [`ringed`](super::ringed) and by `vhost::ringed`. Must not know: what requests are, where their data lies.

use super::{Link, LinkDown};
use crate::poller::Poller;
use crate::receive::{READS_PER_TURN, Received, read_after};
use rustix::event::epoll::EventFlags;
use spline_link::ring::NebdRing;
use spline_link::{HEADER_BYTES, Header, Message, passing};
use std::io;
use std::os::fd::BorrowedFd;

/// A ring, and what is on its way over the link's socket.
#[derive(Debug)]
pub struct LinkRing {
    /// Requests and completions.
    pub ring: Box<NebdRing>,
    /// Less than a frame's header, or what came with the welcome.
    partial: Vec<u8>,
    bells_told: u64,
    /// The socket had no room for a frame: it is watched until it has.
    pub full: bool,
}

/// What the socket had.
pub enum Frame {
    /// A frame.
    Said(Message),
    /// Nothing more for now.
    Nothing,
    /// Its end.
    Closed,
}

impl LinkRing {
    /// The ring of a link that has just come up; `left_over` came with its welcome. Its bell is watched with `token`.
    ///
    /// # Errors
    /// Those of epoll_ctl.
    pub fn new(ring: Box<NebdRing>, left_over: Vec<u8>, poller: &Poller, token: u64) -> io::Result<Self> {
        // Edge-triggered: the bell is rarely emptied, and the end of a gateway that is gone is told once.
        poller.add(ring.bell(), token, EventFlags::IN | EventFlags::ET)?;
        Ok(Self { ring, partial: left_over, bells_told: 0, full: false })
    }

    /// Watches the bell no more.
    pub fn close(&self, poller: &Poller) {
        poller.remove(self.ring.bell());
    }

    /// How often the gateway had to be woken since the last time.
    pub fn new_bells(&mut self) -> u64 {
        let bells = self.ring.bells();
        bells - std::mem::replace(&mut self.bells_told, bells)
    }

    /// Whether a completion is there.
    pub fn has_answers(&mut self) -> bool {
        // What makes no sense is found by whoever takes it.
        self.ring.look().unwrap_or(true)
    }

    /// Says that the thread is about to wait. False if there is a completion: it must not.
    pub fn sleep(&mut self) -> bool {
        // As above.
        self.ring.sleep().unwrap_or(false)
    }

    /// Sends frames with the descriptors that belong to them, all or none; false if the socket has no room.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn tell(&mut self, link: &Link, frames: &[u8], fds: &[BorrowedFd<'_>]) -> Result<bool, LinkDown> {
        let Some(socket) = link.socket() else { return Ok(false) };
        loop {
            match passing::send(socket, frames, fds) {
                // A unix socket takes a message of this size whole or not at all.
                Ok(count) if count == frames.len() => return Ok(true),
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

    /// The next frame of a turn, in which [`READS_PER_TURN`] reads may be made; `reads` counts them.
    ///
    /// # Errors
    /// Those of the socket; what came is no frame.
    pub fn next_frame(
        &mut self,
        link: &Link,
        scratch: &mut [u8],
        reads: &mut usize,
    ) -> Result<Frame, LinkDown> {
        loop {
            if let Some((head, rest)) = self.partial.split_first_chunk::<HEADER_BYTES>() {
                let message = Header::decode(head)?.message;
                self.partial = rest.to_vec();
                return Ok(Frame::Said(message));
            }
            let Some(socket) = link.socket().filter(|_| *reads < READS_PER_TURN) else {
                return Ok(Frame::Nothing);
            };
            *reads += 1;
            match read_after(socket, &mut self.partial, scratch)? {
                Received::Bytes { count, .. } => self.partial.extend_from_slice(&scratch[..count]),
                Received::Nothing => return Ok(Frame::Nothing),
                Received::Closed => return Ok(Frame::Closed),
            }
        }
    }
}
