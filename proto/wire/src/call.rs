//! Calls: which reply belongs to which request, over one connection that is made when first needed and made again
//! after a fault. Called by the cluster client and raft's network. Must never know what is asked.
//!
//! What a caller may conclude from a failed call is the point of [`CallError`]: only `NotSent` proves that the request
//! was not carried out (`no_late_duplicate` builds on it).
//!
//! `bounded`: [`CALLS_MAX`] unanswered calls; each ends by its deadline at the latest; a failed connect is not tried
//! again before a pause of [`RECONNECT_PAUSE_MIN`] to [`RECONNECT_PAUSE_MAX`].

use crate::connection::{self, FrameReceiver, FrameSender};
use crate::error::WireError;
use crate::frame::{Frame, Kind};
use bytes::Bytes;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout_at};

/// Unanswered calls on one connection; a volume has at most 1024 requests in flight, a host some volumes.
pub const CALLS_MAX: usize = 65_536;
/// Longest wait for a connection, whatever the call's deadline: a peer that is there answers sooner.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Pause after the first failed connect; doubles with each further one.
pub const RECONNECT_PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause between two connects: a peer that is back is noticed within a second.
pub const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long a ping may go unanswered, after a call went unanswered, before the connection is given up: it may be
/// one whose other end is gone without a word.
pub const PING_LIMIT: Duration = Duration::from_secs(1);

/// Why a call has no reply, and whether the request may have been carried out.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum CallError {
    /// The request certainly never reached the peer.
    #[error("not sent: {0}")]
    NotSent(Arc<str>),
    /// The connection ended first: the request may or may not have been carried out, or still be.
    #[error("connection lost before the reply: {0}")]
    Lost(Arc<str>),
    /// No reply in time: the request may or may not have been carried out, or still be.
    #[error("no reply in time")]
    Deadline,
}

/// Calls one peer. Clones share the connection; it is closed when the last clone is gone.
#[derive(Clone, Debug)]
pub struct Caller(Arc<Peer>);

#[derive(Debug)]
struct Peer {
    addr: SocketAddr,
    state: Mutex<State>,
    /// Held while connecting, so that one call connects and the others wait for it.
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
enum State {
    Idle,
    Up(Arc<Link>),
    /// The last connect failed.
    Down {
        why: Arc<str>,
        pause: Duration,
        retry_at: Instant,
    },
}

/// One connection. Its drop ends the reader task.
#[derive(Debug)]
struct Link {
    sender: FrameSender,
    next_request: AtomicU64,
    pinging: AtomicBool,
    shared: Arc<Shared>,
}

/// What a link's reader task shares with its callers.
#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<Pending>,
    /// Frames received.
    received: AtomicU64,
    /// Tells the reader to stop.
    stop: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    calls: HashMap<u64, oneshot::Sender<Result<Frame, CallError>>>,
    /// Why the connection ended.
    ended: Option<Arc<str>>,
}

impl Caller {
    /// A caller of the peer at `addr`; connects at the first call.
    pub fn new(addr: SocketAddr) -> Self {
        let (state, connecting) = (Mutex::new(State::Idle), tokio::sync::Mutex::default());
        Self(Arc::new(Peer { addr, state, connecting }))
    }

    /// The peer's address.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr
    }

    /// Connects now, if there is no connection, so that the next call need not. A failure is that call's to see.
    pub async fn connect(&self, deadline: Instant) {
        if self.0.current().is_none() {
            // It is remembered by the peer's state.
            let _ = self.0.connected(deadline).await;
        }
    }

    /// Sends a request and waits for the reply until `deadline`. A dropped call counts as one that found no reply in
    /// time.
    ///
    /// # Errors
    /// [`CallError`]; only `NotSent` says that the request was certainly not carried out.
    pub async fn call(
        &self,
        kind: Kind,
        meta: Bytes,
        payload: Vec<Bytes>,
        deadline: Instant,
    ) -> Result<Frame, CallError> {
        let link = match self.0.current() {
            Some(link) => link,
            None => self.0.connected(deadline).await?,
        };
        let (mut call, reply) = link.register()?;
        let received = link.shared.received.load(Ordering::Relaxed);
        let frame = Frame { kind, request: call.request, meta, payload };
        match timeout_at(deadline, link.sender.send(frame)).await {
            Ok(Ok(())) => {}
            Ok(Err(closed)) => return Err(CallError::NotSent(closed.to_string().into())),
            Err(_) => return Err(CallError::NotSent("send queue is full".into())),
        }
        let answer = timeout_at(deadline, reply).await;
        call.answered = answer.is_ok();
        match answer {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(CallError::Lost("reader ended".into())),
            Err(_) => {
                if link.shared.received.load(Ordering::Relaxed) == received {
                    link.check_alive();
                }
                Err(CallError::Deadline)
            }
        }
    }
}

impl Peer {
    fn state(&self) -> MutexGuard<'_, State> {
        // Assignments only run under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The link, if there is a live one.
    fn current(&self) -> Option<Arc<Link>> {
        match &*self.state() {
            State::Up(link) if link.is_live() => Some(link.clone()),
            _ => None,
        }
    }

    async fn connected(&self, deadline: Instant) -> Result<Arc<Link>, CallError> {
        let not_sent = |why: &str| CallError::NotSent(why.into());
        let lock = timeout_at(deadline, self.connecting.lock()).await;
        let _connecting = lock.map_err(|_| not_sent("no connection in time"))?;
        if let Some(link) = self.current() {
            return Ok(link);
        }
        let now = Instant::now();
        let pause = match &*self.state() {
            State::Down { why, retry_at, .. } if now < *retry_at => {
                return Err(CallError::NotSent(why.clone()));
            }
            State::Down { pause, .. } => (*pause * 2).min(RECONNECT_PAUSE_MAX),
            State::Idle | State::Up(_) => RECONNECT_PAUSE_MIN,
        };
        let limit = deadline.saturating_duration_since(now).min(CONNECT_LIMIT);
        match connection::connect(self.addr, limit).await {
            Ok((sender, receiver)) => {
                let link = Arc::new(Link::start(self.addr, sender, receiver));
                *self.state() = State::Up(link.clone());
                Ok(link)
            }
            Err(error) => {
                let why: Arc<str> = error.to_string().into();
                tracing::debug!(peer = %self.addr, %error, "can not connect");
                *self.state() = State::Down { why: why.clone(), pause, retry_at: Instant::now() + pause };
                Err(CallError::NotSent(why))
            }
        }
    }
}

impl Link {
    fn start(addr: SocketAddr, sender: FrameSender, receiver: FrameReceiver) -> Self {
        let shared = Arc::new(Shared::default());
        tokio::spawn(read_replies(addr, receiver, shared.clone()));
        Self { sender, next_request: AtomicU64::new(1), pinging: AtomicBool::new(false), shared }
    }

    fn is_live(&self) -> bool {
        !self.sender.is_closed() && self.shared.pending().ended.is_none()
    }

    fn register(self: &Arc<Self>) -> Result<(Call, oneshot::Receiver<Result<Frame, CallError>>), CallError> {
        let request = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (reply, receiver) = oneshot::channel();
        let mut pending = self.shared.pending();
        if let Some(why) = &pending.ended {
            return Err(CallError::NotSent(why.clone()));
        }
        if pending.calls.len() >= CALLS_MAX {
            return Err(CallError::NotSent("too many unanswered calls".into()));
        }
        pending.calls.insert(request, reply);
        drop(pending);
        Ok((Call { link: self.clone(), request, answered: false }, receiver))
    }

    /// Pings the peer; ends the connection if nothing at all is received for [`PING_LIMIT`].
    fn check_alive(self: &Arc<Self>) {
        if self.pinging.swap(true, Ordering::Relaxed) {
            return;
        }
        let link = self.clone();
        tokio::spawn(async move {
            let before = link.shared.received.load(Ordering::Relaxed);
            let ping = Frame { kind: Kind::Ping, request: 0, meta: Bytes::new(), payload: Vec::new() };
            // Not sent is as telling as not answered.
            let _ = link.sender.try_send(ping);
            tokio::time::sleep(PING_LIMIT).await;
            if link.shared.received.load(Ordering::Relaxed) == before {
                link.shared.end("peer answers nothing, not even a ping");
            }
            link.pinging.store(false, Ordering::Relaxed);
        });
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stop.notify_one();
    }
}

/// An unanswered call; forgotten when dropped.
struct Call {
    link: Arc<Link>,
    request: u64,
    answered: bool,
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.answered {
            self.link.shared.pending().calls.remove(&self.request);
        }
    }
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        // Map operations only run under the lock.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails every pending call and all later ones.
    fn end(&self, why: &str) {
        let why: Arc<str> = why.into();
        let calls = {
            let mut pending = self.pending();
            pending.ended.get_or_insert_with(|| why.clone());
            std::mem::take(&mut pending.calls)
        };
        for reply in calls.into_values() {
            // A caller that has left needs no answer.
            let _ = reply.send(Err(CallError::Lost(why.clone())));
        }
        self.stop.notify_one();
    }
}

async fn read_replies(addr: SocketAddr, mut receiver: FrameReceiver, shared: Arc<Shared>) {
    let why = loop {
        let next = tokio::select! {
            biased;
            next = receiver.next() => next,
            () = shared.stop.notified() => break "closed".to_owned(),
        };
        shared.received.fetch_add(1, Ordering::Relaxed);
        match next {
            Ok(Some(frame)) => {
                let call = shared.pending().calls.remove(&frame.request);
                if let Some(reply) = call {
                    // A caller that has left needs no answer.
                    let _ = reply.send(Ok(frame));
                }
            }
            Ok(None) => break "peer closed the connection".to_owned(),
            // The stream is in step: only this call has no usable answer.
            Err(error @ WireError::Payload { request, .. }) => {
                let call = shared.pending().calls.remove(&request);
                if let Some(reply) = call {
                    let _ = reply.send(Err(CallError::Lost(error.to_string().into())));
                }
            }
            Err(error) => break error.to_string(),
        }
    };
    tracing::debug!(peer = %addr, %why, "connection ended");
    shared.end(&why);
}

#[cfg(test)]
mod tests;
