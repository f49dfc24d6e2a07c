//! The link to the gateway: connects, says hello, sends requests and takes completions; comes back for ever.
//!
//! Called by the event loop. Must not know: NBD, clients. `replay_before_new`: after a lost link the in-flight table
//! hands out everything unanswered again, oldest first, before what came later.

pub mod reader;

use crate::inflight::{Limits, Outcome};
use crate::poller::Poller;
use crate::receive::{READS_PER_TURN, Received, read_after, read_payload};
use crate::send_queue::{self, SendQueue};
use crate::volume::{Answer, Origin, ReadData, Volume};
use reader::{Body, Reader};
use rustix::event::epoll::EventFlags;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use spline_link::{Accepted, Header, Hello, LinkError, Message, Mode, Refusal, Refused, Welcome, extents};
use spline_types::{BlockOp, Completion, Fault, OnUnavailable, RequestId, Unavailable};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// First wait after a failed attempt.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
/// Longest wait between attempts: a guest should not wait much longer than the gateway needs.
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// Longest wait for a welcome: a resuming gateway first ends the old link's requests and may have to ask for the lease.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for a leaving gateway to close; its own drain limit is 2 s.
const LEAVING_TIMEOUT: Duration = Duration::from_secs(10);
/// Unsent bytes past which requests stay in the table: more would only lie in another queue.
const UNSENT_MAX: usize = 1 << 20;

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
    Greeting { socket: OwnedFd, deadline: Instant },
    Up { socket: OwnedFd, leaving: Option<Instant> },
    Ended,
}

/// The link. Owned by the event loop.
#[derive(Debug)]
pub struct Link {
    path: PathBuf,
    hello: Hello,
    state: State,
    reader: Reader,
    partial: Vec<u8>,
    out: SendQueue,
    window: Limits,
    on_unavailable: OnUnavailable,
    /// A gateway has served the volume.
    served: bool,
    backoff: Duration,
    down_since: Instant,
    /// What was logged last about a failed attempt, so that it is logged once.
    told: Option<String>,
    watching_out: bool,
}

impl Link {
    /// A link that connects to the socket at `path` on its first tick.
    pub fn new(path: PathBuf, hello: Hello, now: Instant) -> Self {
        Self {
            path,
            hello,
            state: State::Down { retry_at: now },
            reader: Reader::default(),
            partial: Vec::new(),
            out: SendQueue::default(),
            window: Limits { requests: 1, bytes: 0 },
            on_unavailable: OnUnavailable::Wait,
            served: false,
            backoff: BACKOFF_MIN,
            down_since: now,
            told: None,
            watching_out: false,
        }
    }

    /// Whether requests are answered.
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up { .. })
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
        self.watching_out = false;
        self.out.push(&self.hello.encode());
        self.state = State::Greeting { socket, deadline: now + WELCOME_TIMEOUT };
        Ok(())
    }

    /// Ends a link and decides what follows.
    pub fn fail(&mut self, why: &LinkDown, volume: &mut Volume) -> Next {
        let was_up = self.is_up();
        // Closing the socket also takes it out of epoll.
        self.state = State::Down { retry_at: volume.now + self.backoff };
        (self.reader, self.partial, self.out) = (Reader::default(), Vec::new(), SendQueue::default());
        if was_up {
            self.down_since = volume.now;
            self.state = State::Down { retry_at: volume.now };
            volume.metrics.link_up.set(0);
            let replays = volume.inflight.link_lost();
            volume.metrics.replays.inc_by(replays as u64);
            tracing::warn!(reason = %why, waiting = volume.inflight.len(), "link to the gateway lost");
        } else {
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

    /// Reads what has come. Each answered request goes to `answer`, exactly once (`complete_once`). Answers whether
    /// the volume was just accepted.
    ///
    /// # Errors
    /// The link ended; the caller calls [`fail`](Self::fail).
    pub fn receive(
        &mut self,
        volume: &mut Volume,
        scratch: &mut [u8],
        mut answer: impl FnMut(&mut Volume, Origin, Result<Answer<'_>, Fault>),
    ) -> Result<bool, LinkDown> {
        let mut accepted = false;
        for _ in 0..READS_PER_TURN {
            let (State::Greeting { socket, .. } | State::Up { socket, .. }) = &self.state else {
                return Ok(accepted);
            };
            let mut direct = false;
            let received = match self.reader.payload() {
                Some((payload, missing)) if self.partial.is_empty() => {
                    direct = true;
                    read_payload(socket.as_fd(), payload, missing, &mut self.partial)?
                }
                _ => read_after(socket.as_fd(), &mut self.partial, scratch)?,
            };
            let Received::Bytes { count, drained } = received else {
                return if received == Received::Closed { Err(LinkDown::Closed) } else { Ok(accepted) };
            };
            let left = std::mem::take(&mut self.partial);
            let mut input = if direct { &left[..] } else { &scratch[..count] };
            if matches!(self.state, State::Greeting { .. }) {
                accepted |= self.welcome(&mut input, volume)?;
            }
            if self.is_up() {
                while let Some((message, body)) = self.reader.next(&mut input)? {
                    self.act(message, body, volume, &mut answer)?;
                }
            }
            self.partial.extend_from_slice(input);
            if drained {
                break;
            }
        }
        Ok(accepted)
    }

    /// Puts unsent requests into the queue, oldest first, and sends what the socket takes.
    ///
    /// # Errors
    /// The link ended; the caller calls [`fail`](Self::fail).
    pub fn flush(&mut self, volume: &mut Volume, poller: &Poller, token: u64) -> Result<(), LinkDown> {
        let (socket, up) = match &self.state {
            State::Greeting { socket, .. } => (socket, false),
            State::Up { socket, leaving } => (socket, leaving.is_none()),
            State::Down { .. } | State::Ended => return Ok(()),
        };
        loop {
            while up && self.out.bytes() < UNSENT_MAX {
                let Some(entry) = volume.inflight.next_to_send(self.window) else { break };
                self.out.push(&Header::request(entry.request).encode());
                self.out.push_shared(&entry.payload, 0..entry.payload.len());
            }
            let queued = self.out.bytes();
            if queued == 0 || !self.out.write_to(socket.as_fd())? || queued < UNSENT_MAX {
                break;
            }
        }
        let watch_out = !self.out.is_empty();
        if watch_out != self.watching_out {
            let flags = if watch_out { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            poller.modify(socket.as_fd(), token, flags)?;
            self.watching_out = watch_out;
        }
        Ok(())
    }

    /// Says goodbye for good: the gateway may close the session. Sent as far as the socket takes it.
    pub fn detach(&mut self) {
        if let State::Up { socket, .. } = &self.state {
            self.out.push(&Header::bare(Message::Detach).encode());
            if let Err(error) = self.out.write_to(socket.as_fd()) {
                tracing::debug!(%error, "goodbye to the gateway not sent");
            }
        }
        self.state = State::Ended;
    }

    /// Gives memory back while nothing happens.
    pub fn shrink(&mut self) {
        self.out.shrink();
        self.partial.shrink_to_fit();
    }

    fn welcome(&mut self, input: &mut &[u8], volume: &mut Volume) -> Result<bool, LinkDown> {
        let Some((welcome, used)) = Welcome::decode(input)? else { return Ok(false) };
        *input = &input[used..];
        let accepted = match welcome {
            Welcome::Accepted(accepted) => accepted,
            Welcome::Refused(refused) => return Err(LinkDown::Refused(refused)),
        };
        if self.hello.identity.is_some_and(|known| known != accepted.identity) {
            return Err(LinkError::Mismatch { field: "identity", value: accepted.identity.parts().1 }.into());
        }
        self.accept(&accepted, volume);
        Ok(true)
    }

    fn accept(&mut self, accepted: &Accepted, volume: &mut Volume) {
        if let State::Greeting { socket, .. } =
            std::mem::replace(&mut self.state, State::Down { retry_at: volume.now })
        {
            self.state = State::Up { socket, leaving: None };
        }
        volume.export.update(accepted, self.hello.read_only);
        self.window = Limits { requests: accepted.requests_max as usize, bytes: accepted.bytes_max };
        self.on_unavailable = accepted.on_unavailable;
        (self.hello.mode, self.hello.identity) =
            (Mode::Resume { epoch: accepted.epoch }, Some(accepted.identity));
        self.served = true;
        self.backoff = BACKOFF_MIN;
        self.told = None;
        volume.metrics.link_up.set(1);
        volume.metrics.link_connects.inc();
        let size = accepted.geometry.size;
        tracing::info!(epoch = %accepted.epoch, size, waiting = volume.inflight.len(), "link to the gateway is up");
    }

    fn act(
        &mut self,
        message: Message,
        body: Body<'_>,
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
                if let State::Up { leaving, .. } = &mut self.state {
                    leaving.get_or_insert(volume.now + LEAVING_TIMEOUT);
                }
                Ok(())
            }
            Message::Lost => Err(LinkDown::Lost),
            Message::Request(_) => Err(LinkError::Unknown { field: "kind", value: 1 }.into()),
            Message::Detach => Err(LinkError::Unknown { field: "kind", value: 6 }.into()),
        }
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
    let request = volume.inflight.sent(id).ok_or(LinkDown::WrongAnswer(id))?;
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
            answer(volume, entry.context, result);
            Ok(())
        }
        // Withdrawn: the guest learns nothing, the next link gets it again.
        Outcome::Kept => Ok(()),
        Outcome::Unknown => Err(LinkDown::WrongAnswer(id)),
    }
}
