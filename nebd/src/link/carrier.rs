//! What the requests of NBD clients travel over: nothing, a link's socket, or its ring.
//!
//! Called by the event loop; hands on to [`stream`](super::stream) and [`ringed`](super::ringed), and watches the socket for room as
//! long as they need it. Must not know: NBD.

use super::ringed::RingStream;
use super::stream::Stream;
use super::{Link, LinkDown};
use crate::poller::Poller;
use crate::volume::{Answer, Origin, Volume};
use rustix::event::epoll::EventFlags;
use spline_link::Message;
use spline_types::Fault;
use std::io;

#[derive(Debug, Default)]
enum Means {
    /// There is no link.
    #[default]
    None,
    Socket(Stream),
    Ring(RingStream),
}

/// The carrier of one link.
#[derive(Debug, Default)]
pub struct Carrier {
    means: Means,
    watching_out: bool,
}

impl Carrier {
    /// For a link that has just come up; a ring's bell is watched with `bell`.
    ///
    /// # Errors
    /// Those of epoll_ctl.
    pub fn new(link: &mut Link, poller: &Poller, bell: u64) -> io::Result<Self> {
        let left_over = link.left_over();
        let means = match link.take_ring() {
            Some(ring) => Means::Ring(RingStream::new(ring, left_over, poller, bell)?),
            None => Means::Socket(Stream::new(left_over)),
        };
        Ok(Self { means, watching_out: false })
    }

    /// The link is gone.
    pub fn close(&mut self, poller: &Poller) {
        if let Means::Ring(ring) = &mut self.means {
            ring.link().close(poller);
        }
        *self = Self::default();
    }

    /// Whether the gateway maps our memory.
    pub fn is_shared(&self) -> bool {
        matches!(self.means, Means::Ring(_))
    }

    /// Reads what has come over the socket. Each answered request goes to `answer`, exactly once (`complete_once`).
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
        match &mut self.means {
            Means::None => Ok(()),
            Means::Socket(stream) => stream.receive(link, volume, scratch, answer),
            Means::Ring(ring) => ring.receive_frames(link, volume, scratch, &mut answer),
        }
    }

    /// Takes completions out of the ring, if there is one.
    ///
    /// # Errors
    /// As above.
    pub fn take_answers(
        &mut self,
        volume: &mut Volume,
        mut answer: impl FnMut(&mut Volume, Origin, Result<Answer, Fault>),
    ) -> Result<(), LinkDown> {
        match &mut self.means {
            Means::Ring(ring) => {
                ring.link().ring.wake();
                ring.receive(volume, &mut answer)
            }
            Means::None | Means::Socket(_) => Ok(()),
        }
    }

    /// Sends unsent requests, oldest first, as far as there is room.
    ///
    /// # Errors
    /// As above.
    pub fn flush(
        &mut self,
        link: &Link,
        volume: &mut Volume,
        poller: &Poller,
        token: u64,
    ) -> Result<(), LinkDown> {
        match &mut self.means {
            Means::None => {}
            Means::Socket(stream) => stream.flush(link, volume)?,
            Means::Ring(ring) => ring.flush(link, volume)?,
        }
        let full = match &self.means {
            Means::None => false,
            Means::Socket(stream) => stream.is_full(),
            Means::Ring(ring) => ring.is_full(),
        };
        if full != self.watching_out
            && let Some(socket) = link.socket()
        {
            let flags = if full { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            poller.modify(socket, token, flags)?;
            self.watching_out = full;
        }
        Ok(())
    }

    /// Whether a completion is in the ring.
    pub fn has_answers(&mut self) -> bool {
        match &mut self.means {
            Means::Ring(ring) => ring.link().has_answers(),
            Means::None | Means::Socket(_) => false,
        }
    }

    /// How often the gateway had to be woken since the last time.
    pub fn new_bells(&mut self) -> u64 {
        match &mut self.means {
            Means::Ring(ring) => ring.link().new_bells(),
            Means::None | Means::Socket(_) => 0,
        }
    }

    /// Where the gateway's thread stays.
    pub fn gateway_processor(&mut self) -> Option<u32> {
        match &mut self.means {
            Means::Ring(ring) => ring.link().ring.gateway_processor(),
            Means::None | Means::Socket(_) => None,
        }
    }

    /// Whether one is awaited there.
    pub fn is_asked(&self) -> bool {
        matches!(&self.means, Means::Ring(ring) if ring.is_asked())
    }

    /// Says that the thread is about to wait; false if it must not.
    pub fn sleep(&mut self) -> bool {
        match &mut self.means {
            Means::Ring(ring) => ring.link().sleep(),
            Means::None | Means::Socket(_) => true,
        }
    }

    /// Says goodbye for good: the gateway may close the session. Sent as far as the socket takes it.
    pub fn detach(&mut self, link: &mut Link) {
        let said = match &mut self.means {
            Means::None => Ok(()),
            Means::Socket(stream) => stream.say(Message::Detach, link),
            Means::Ring(ring) => ring.say(Message::Detach, link),
        };
        if let Err(error) = said {
            tracing::debug!(%error, "goodbye to the gateway not sent");
        }
        link.end();
    }

    /// Gives memory back while nothing happens.
    ///
    /// # Errors
    /// The link ended; the caller calls [`Link::fail`].
    pub fn rest(&mut self, link: &Link) -> Result<(), LinkDown> {
        match &mut self.means {
            Means::None => Ok(()),
            Means::Socket(stream) => {
                stream.shrink();
                Ok(())
            }
            Means::Ring(ring) => ring.forget_areas(link),
        }
    }
}
