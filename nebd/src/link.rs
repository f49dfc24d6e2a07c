//! The link to the gateway: connects, says hello, tells what a lost link means; comes back for ever.
//!
//! Called by the event loop and by vhost workers, each with a link of its own. What travels over it is [`carrier`]'s for NBD
//! ([`ringed`] or [`stream`]), `vhost::ringed`'s or `vhost::stream`'s for guests. Must not know: NBD, virtio, requests. `replay_before_new`: whoever loses a link makes
//! its in-flight table hand out everything unanswered again, oldest first, before what came later.

pub mod beside;
pub mod carrier;
pub mod frames;
pub mod ringed;
pub mod stream;
#[cfg(test)]
mod tests;

use crate::inflight::Limits;
use crate::poller::Poller;
use crate::send_queue;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use spline_link::ring::NebdRing;
use spline_link::{
    Accepted, FEATURE_RING, Header, Hello, LinkError, Message, Mode, Refusal, Refused, Welcome, passing,
};
use spline_types::{Epoch, OnUnavailable, RequestId};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use thiserror::Error;

/// First wait after a failed attempt.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
/// How long nobody listens at most while a gateway is started anew: until then the wait does not grow. An attempt costs as much as
/// a failed connect().
const RESTART_TIME: Duration = Duration::from_secs(2);
/// Longest wait between attempts: a guest should not wait much longer than the gateway needs.
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// Longest wait for a welcome: a resuming gateway first ends the old link's requests and may have to ask for the lease.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for a leaving gateway to close; its own drain limit is 2 s.
const LEAVING_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of one read while the welcome is awaited: more than the largest.
const GREETING_BYTES: usize = 4096;

/// Why a link ended.
#[derive(Debug, Error)]
pub enum LinkDown {
    /// Nobody listens, or the socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The gateway closed it.
    #[error("closed by the gateway")]
    Closed,
    /// The gateway does not speak as agreed.
    #[error("gateway broke the link's contract: {0}")]
    Contract(#[from] LinkError),
    /// The gateway answered a request that it was not asked, or not as it was asked.
    #[error("gateway gave a wrong answer: request={0}")]
    WrongAnswer(RequestId),
    /// No welcome, or no close after leaving.
    #[error("gateway did not answer in time")]
    Timeout,
    /// The gateway refused the hello.
    #[error("gateway refuses the volume: {}", .0.text)]
    Refused(Refused),
    /// We cut it, in the middle of a request that nobody waits for any more.
    #[error("cut within a request whose guest is gone")]
    Abandoned,
    /// The session went to someone newer.
    #[error("a newer session holds the volume")]
    Lost,
}

/// What the event loop does after a link ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// The link tries again by itself.
    Retry,
    /// The volume can not be had: nebd ends with this message.
    GiveUp(String),
    /// The volume was had and is gone: everything waiting fails as fenced.
    Fenced,
}

#[derive(Debug)]
enum State {
    Down { retry_at: Instant },
    Greeting { socket: OwnedFd, deadline: Instant, ring: Option<Box<NebdRing>> },
    Up { socket: OwnedFd, leaving: Option<Instant> },
    Ended,
}

/// A frame that a gateway must not send, or not on such a link.
pub fn not_ours(message: &Message) -> LinkDown {
    let kind = Header::bare(message.clone()).encode()[4];
    LinkError::Unknown { field: "kind", value: kind.into() }.into()
}

/// The link. Owned by one thread.
#[derive(Debug)]
pub struct Link {
    path: PathBuf,
    hello: Hello,
    state: State,
    /// What came before the welcome was whole; afterwards what came behind it.
    greeting: Vec<u8>,
    window: Limits,
    on_unavailable: OnUnavailable,
    /// A gateway has served the volume.
    served: bool,
    backoff: Duration,
    down_since: Instant,
    /// The ring of a link that has just come up, until it is taken.
    ring: Option<Box<NebdRing>>,
    /// What was logged last about a failed attempt, so that it is logged once.
    told: Option<String>,
}

impl Link {
    /// A link that connects to the socket at `path` on its first tick.
    pub fn new(path: PathBuf, hello: Hello, now: Instant) -> Self {
        Self {
            path,
            state: State::Down { retry_at: now },
            greeting: Vec::new(),
            window: Limits { requests: 1, bytes: 0 },
            on_unavailable: OnUnavailable::Wait,
            // Who knows the volume by its identity was told it by a gateway that served it, over another link.
            served: hello.identity.is_some(),
            backoff: BACKOFF_MIN,
            down_since: now,
            ring: None,
            told: None,
            hello,
        }
    }

    /// Whether requests are answered.
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }

    /// Whether the welcome is awaited.
    pub fn is_greeting(&self) -> bool {
        matches!(self.state, State::Greeting { .. })
    }

    /// The socket, while requests are answered.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Up { socket, .. } => Some(socket.as_fd()),
            _ => None,
        }
    }

    /// How much may be on the link; nothing while there is none, or while the gateway is leaving.
    pub fn window(&self) -> Option<Limits> {
        matches!(self.state, State::Up { leaving: None, .. }).then_some(self.window)
    }

    /// What the hello asks for: this export's reading only, by our config.
    pub fn is_read_only(&self) -> bool {
        self.hello.read_only
    }

    /// Begins anew after the volume was lost: as a first link, since nothing from before is left to be replayed, but of the
    /// same volume, since that is what guests were told of.
    pub fn reopen(&mut self, now: Instant) {
        (self.hello.mode, self.hello.force) = (Mode::Open, false);
        (self.backoff, self.down_since) = (BACKOFF_MIN, now);
        self.state = State::Down { retry_at: now };
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Down { retry_at } => Some(*retry_at),
            State::Greeting { deadline, .. } => Some(*deadline),
            State::Up { leaving, .. } => *leaving,
            State::Ended => None,
        }
    }

    /// Since when requests wait, and for how long they may; `None` while the link is up or if they may for ever.
    pub fn patience(&self) -> Option<(Instant, Duration)> {
        match (&self.state, self.on_unavailable) {
            (State::Down { .. } | State::Greeting { .. }, OnUnavailable::FailAfter(limit)) => {
                Some((self.down_since, limit))
            }
            _ => None,
        }
    }

    /// Acts upon deadlines: connects again, gives up on a silent gateway.
    ///
    /// # Errors
    /// The link ended; the caller calls [`fail`](Self::fail).
    pub fn tick(&mut self, now: Instant, poller: &Poller, token: u64) -> Result<(), LinkDown> {
        match self.deadline() {
            Some(deadline) if deadline <= now => {}
            _ => return Ok(()),
        }
        if !matches!(self.state, State::Down { .. }) {
            return Err(LinkDown::Timeout);
        }
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let address = SocketAddrUnix::new(&self.path).map_err(io::Error::from)?;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(io::Error::from)?;
        // A unix socket connects at once or not at all; EAGAIN is a full backlog.
        net::connect(&socket, &address).map_err(io::Error::from)?;
        poller.add(socket.as_fd(), token, EventFlags::IN)?;
        send_queue::widen(socket.as_fd());
        let ring = self.say_hello(socket.as_fd())?;
        self.greeting.clear();
        self.state = State::Greeting { socket, deadline: now + WELCOME_TIMEOUT, ring };
        Ok(())
    }

    /// A hello is small and the socket empty: it takes all of it. With it goes a new ring, if one is wanted and can be had.
    fn say_hello(&self, socket: BorrowedFd<'_>) -> io::Result<Option<Box<NebdRing>>> {
        let wanted = self.hello.features & FEATURE_RING != 0;
        match wanted.then(NebdRing::create).transpose() {
            Ok(Some((ring, fds))) => {
                let fds = [fds.memory.as_fd(), fds.to_gateway.as_fd(), fds.to_nebd.as_fd()];
                passing::send(socket, &self.hello.encode(), &fds)?;
                Ok(Some(Box::new(ring)))
            }
            Ok(None) => passing::send(socket, &self.hello.encode(), &[]).map(|_| None),
            Err(error) => {
                tracing::warn!(%error, "no shared memory for a link, requests travel over its socket");
                let plain = Hello { features: self.hello.features & !FEATURE_RING, ..self.hello.clone() };
                passing::send(socket, &plain.encode(), &[]).map(|_| None)
            }
        }
    }

    /// Reads the welcome as far as it has come; answers it once it is there and accepts. What came behind it is
    /// [`left_over`](Self::left_over).
    ///
    /// # Errors
    /// The link ended; the caller calls [`fail`](Self::fail).
    pub fn greet(&mut self, now: Instant) -> Result<Option<Accepted>, LinkDown> {
        let State::Greeting { socket, .. } = &self.state else { return Ok(None) };
        let mut buffer = [0; GREETING_BYTES];
        let count = match rustix::io::read(socket, &mut buffer) {
            Ok(0) => return Err(LinkDown::Closed),
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(LinkDown::Io(error.into())),
        };
        self.greeting.extend_from_slice(&buffer[..count]);
        let Some((welcome, used)) = Welcome::decode(&self.greeting)? else { return Ok(None) };
        self.greeting.drain(..used);
        let accepted = match welcome {
            Welcome::Accepted(accepted) => accepted,
            Welcome::Refused(refused) => return Err(LinkDown::Refused(refused)),
        };
        if self.hello.identity.is_some_and(|known| known != accepted.identity) {
            return Err(LinkError::Mismatch { field: "identity", value: accepted.identity.parts().1 }.into());
        }
        self.accept(&accepted, now)?;
        Ok(Some(accepted))
    }

    /// The ring of a link that has just come up; `None` if requests travel over its socket. To be taken once.
    pub fn take_ring(&mut self) -> Option<Box<NebdRing>> {
        self.ring.take()
    }

    /// The link goes on with a session of this epoch, maybe in another gateway process.
    pub fn renewed(&mut self, epoch: Epoch) {
        self.hello.mode = Mode::Resume { epoch };
        tracing::info!(%epoch, "the link has a new session");
    }

    /// The first bytes of the stream, which came together with the welcome. To be taken once.
    pub fn left_over(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.greeting)
    }

    fn accept(&mut self, accepted: &Accepted, now: Instant) -> Result<(), LinkError> {
        let with_ring = accepted.features & FEATURE_RING != 0;
        let state = std::mem::replace(&mut self.state, State::Down { retry_at: now });
        if let State::Greeting { socket, ring, .. } = state {
            self.ring = ring.filter(|_| with_ring);
            if with_ring && self.ring.is_none() {
                return Err(LinkError::Mismatch { field: "features", value: accepted.features });
            }
            self.state = State::Up { socket, leaving: None };
        }
        self.window = Limits { requests: accepted.requests_max as usize, bytes: accepted.bytes_max };
        self.on_unavailable = accepted.on_unavailable;
        (self.hello.mode, self.hello.identity) =
            (Mode::Resume { epoch: accepted.epoch }, Some(accepted.identity));
        self.served = true;
        self.backoff = BACKOFF_MIN;
        self.told = None;
        tracing::info!(
            epoch = %accepted.epoch, size = accepted.geometry.size, ring = with_ring, "link to the gateway is up"
        );
        Ok(())
    }

    /// The gateway leaves: it gets no more requests, answers what it can and closes.
    pub fn gateway_leaves(&mut self, now: Instant) {
        if let State::Up { leaving, .. } = &mut self.state {
            leaving.get_or_insert(now + LEAVING_TIMEOUT);
        }
    }

    /// Ends a link and decides what follows. If it was up, the caller has its in-flight table replay; `waiting` is how
    /// many requests that are.
    pub fn fail(&mut self, why: &LinkDown, waiting: usize, now: Instant) -> Next {
        let was_up = self.is_up();
        self.ring = None;
        // Closing the socket also takes it out of epoll.
        self.state = State::Down { retry_at: now + self.backoff };
        self.greeting = Vec::new();
        if was_up {
            self.down_since = now;
            self.state = State::Down { retry_at: now };
            tracing::warn!(reason = %why, waiting, "link to the gateway lost");
        } else if !matches!(why, LinkDown::Io(_)) || now > self.down_since + RESTART_TIME {
            self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        }
        let next = self.judge(why);
        if next != Next::Retry {
            self.state = State::Ended;
        }
        if next == Next::Fenced || !was_up {
            self.tell(why, &next);
        }
        next
    }

    fn judge(&self, why: &LinkDown) -> Next {
        let first = !self.served;
        match why {
            LinkDown::Lost => Next::Fenced,
            LinkDown::Refused(refused) => match refused.refusal {
                Refusal::Held | Refusal::Replaced if !first => Next::Fenced,
                Refusal::Held
                | Refusal::Replaced
                | Refusal::NotFound
                | Refusal::Version
                | Refusal::Internal
                    if first =>
                {
                    Next::GiveUp(why.to_string())
                }
                _ => Next::Retry,
            },
            LinkDown::Contract(_) if first => Next::GiveUp(why.to_string()),
            _ => Next::Retry,
        }
    }

    /// Logs why nothing is served, once per reason.
    fn tell(&mut self, why: &LinkDown, next: &Next) {
        let reason = why.to_string();
        if self.told.as_ref() == Some(&reason) {
            return;
        }
        let path = self.path.display();
        match why {
            LinkDown::Refused(Refused { refusal: Refusal::Replaced, .. }) => tracing::error!(
                %reason,
                "another volume has the name, requests fail; give the volume its name back and connect anew, or start this \
                 process again to serve the other one"
            ),
            _ if *next == Next::Fenced => tracing::error!(
                %reason,
                "volume lost, its clients' requests fail; end the other user, then connect anew"
            ),
            LinkDown::Refused(_) | LinkDown::Contract(_) if self.served => {
                tracing::error!(%reason, gateway = %path, "gateway does not take the volume back, still trying");
            }
            _ => tracing::info!(%reason, gateway = %path, "waiting for the gateway"),
        }
        self.told = Some(reason);
    }

    /// Ends for good; the caller has said goodbye ([`Message::Detach`](spline_link::Message::Detach)).
    pub fn end(&mut self) {
        self.state = State::Ended;
    }
}
