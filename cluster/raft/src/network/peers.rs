//! One connection per peer, shared by all groups, made when needed and made again when it breaks.
//!
//! Called by `network` (links), `pulse` (who is up, cutting silent connections) and `host` (addresses). Must never know
//! what a message means.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use spline_wire::{Frame, FrameReceiver, FrameSender, Kind};
use tokio::sync::{mpsc, oneshot};

use crate::codec::message::{Reply, Request};
use crate::command::{GroupId, NodeId};
use crate::metrics::Metrics;

/// Longest wait for a connection: a peer on the same network answers in far less.
const CONNECT_LIMIT: Duration = Duration::from_millis(800);
/// Pause after a failed attempt, so that a hundred groups do not each try.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
/// A connection with unanswered requests and nothing heard for this long is cut (a peer that is stopped, or a network
/// that drops everything).
const SILENCE_LIMIT: Duration = Duration::from_secs(3);

/// The address book and the connections.
pub(crate) struct Peers {
    book: Mutex<HashMap<NodeId, SocketAddr>>,
    peers: Mutex<HashMap<NodeId, Arc<Peer>>>,
    pub(crate) metrics: Arc<Metrics>,
}

/// One peer. `slot` is what calls see; `connecting` lets one task connect while the others wait for it.
pub(crate) struct Peer {
    node: NodeId,
    slot: Mutex<Slot>,
    connecting: tokio::sync::Mutex<()>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Slot {
    address: Option<SocketAddr>,
    link: Option<Arc<Link>>,
    retry_at: Option<Instant>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Peers {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Peers {
        Peers { book: Mutex::default(), peers: Mutex::default(), metrics }
    }

    /// Replaces the address book; connections to addresses that are no longer in it are cut.
    pub(crate) fn set_addresses(&self, book: HashMap<NodeId, SocketAddr>) {
        *lock(&self.book) = book.clone();
        for (node, peer) in lock(&self.peers).iter() {
            peer.set_address(book.get(node).copied());
        }
    }

    /// The peer, known or not: an unknown one is unreachable until the book names it.
    pub(crate) fn peer(&self, node: NodeId) -> Arc<Peer> {
        let address = lock(&self.book).get(&node).copied();
        let mut peers = lock(&self.peers);
        let made = || {
            let slot = Slot { address, ..Slot::default() };
            let metrics = self.metrics.clone();
            Arc::new(Peer { node, slot: Mutex::new(slot), connecting: tokio::sync::Mutex::new(()), metrics })
        };
        peers.entry(node).or_insert_with(made).clone()
    }

    /// Cuts the connections on which requests wait and nothing is heard.
    pub(crate) fn cut_silent(&self) {
        for peer in lock(&self.peers).values() {
            let link = lock(&peer.slot).link.clone();
            if let Some(link) = link.filter(|link| link.silent_for() > SILENCE_LIMIT) {
                tracing::warn!(peer = %peer.node, "peer has not answered, its connection is cut");
                link.fail();
            }
        }
    }

    /// Cuts every connection.
    pub(crate) fn close(&self) {
        for peer in lock(&self.peers).values() {
            peer.set_address(None);
        }
    }
}

impl Peer {
    /// The live connection, or a new one.
    pub(crate) async fn link(self: &Arc<Self>) -> Result<Arc<Link>, String> {
        if let Some(link) = self.live() {
            return Ok(link);
        }
        let _one = self.connecting.lock().await;
        if let Some(link) = self.live() {
            return Ok(link);
        }
        let address = {
            let slot = lock(&self.slot);
            if slot.retry_at.is_some_and(|at| Instant::now() < at) {
                return Err(format!("peer did not answer a moment ago, node={}", self.node));
            }
            slot.address.ok_or_else(|| format!("peer has no address, node={}", self.node))?
        };
        let made = spline_wire::connect(address, CONNECT_LIMIT).await;
        let mut slot = lock(&self.slot);
        match made {
            Ok((sender, receiver)) if slot.address == Some(address) => {
                let link = Link::start(self.node, sender, receiver, self.metrics.clone());
                slot.link = Some(link.clone());
                slot.retry_at = None;
                Ok(link)
            }
            Ok(_) => Err(format!("peer has moved, node={}", self.node)),
            Err(error) => {
                slot.retry_at = Some(Instant::now() + CONNECT_PAUSE);
                Err(format!("{error}, node={} address={address}", self.node))
            }
        }
    }

    /// Which peer this is.
    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    /// Whether there is a live connection.
    pub(crate) fn is_up(&self) -> bool {
        self.live().is_some()
    }

    /// Connects in the background if there is no connection.
    pub(crate) fn warm(self: &Arc<Self>) {
        if !self.is_up() && self.connecting.try_lock().is_ok() {
            let peer = self.clone();
            // The outcome is seen by `is_up`.
            tokio::spawn(async move { drop(peer.link().await) });
        }
    }

    fn live(&self) -> Option<Arc<Link>> {
        lock(&self.slot).link.clone().filter(|link| !link.broken.load(Ordering::Acquire))
    }

    fn set_address(&self, address: Option<SocketAddr>) {
        let mut slot = lock(&self.slot);
        if slot.address != address {
            slot.address = address;
            slot.retry_at = None;
            let link = slot.link.take();
            drop(slot);
            if let Some(link) = link {
                link.fail();
            }
        }
    }
}

/// Who waits for a reply.
enum Waiter {
    One(oneshot::Sender<Frame>),
    /// A pipelined stream; `None` tells it that the connection broke.
    Stream(mpsc::UnboundedSender<(u64, Option<Frame>)>),
}

/// One connection and the requests that wait on it.
pub(crate) struct Link {
    sender: FrameSender,
    waiting: Mutex<HashMap<u64, Waiter>>,
    next: AtomicU64,
    broken: AtomicBool,
    stop: tokio::sync::Notify,
    started: Instant,
    /// Milliseconds since `started` at which the oldest unheard request was sent; 0 is none.
    unheard_since: AtomicU64,
}

impl Link {
    pub(super) fn start(
        node: NodeId,
        sender: FrameSender,
        receiver: FrameReceiver,
        metrics: Arc<Metrics>,
    ) -> Arc<Link> {
        let link = Arc::new(Link {
            sender,
            waiting: Mutex::default(),
            next: AtomicU64::new(1),
            broken: AtomicBool::new(false),
            stop: tokio::sync::Notify::new(),
            started: Instant::now(),
            unheard_since: AtomicU64::new(0),
        });
        let reading = link.clone();
        tokio::spawn(async move {
            let why = tokio::select! {
                why = reading.receive(receiver) => why,
                () = reading.stop.notified() => "cut".to_owned(),
            };
            tracing::info!(peer = %node, why, "connection to a raft peer ended");
            metrics.links_broken.inc();
            reading.fail();
        });
        link
    }

    async fn receive(&self, mut receiver: FrameReceiver) -> String {
        loop {
            match receiver.next().await {
                Ok(Some(frame)) if frame.kind == Kind::RaftReply => {
                    self.unheard_since.store(0, Ordering::Relaxed);
                    let waiter = lock(&self.waiting).remove(&frame.request);
                    match waiter {
                        Some(Waiter::One(sender)) => drop(sender.send(frame)),
                        Some(Waiter::Stream(sender)) => drop(sender.send((frame.request, Some(frame)))),
                        // Its waiter has given up.
                        None => {}
                    }
                }
                Ok(Some(frame)) => return format!("peer sent an unexpected frame, kind={:?}", frame.kind),
                Ok(None) => return "closed by the peer".to_owned(),
                Err(error) => return error.to_string(),
            }
        }
    }

    /// Ends the connection: every waiter learns that its request may or may not have been carried out.
    pub(crate) fn fail(&self) {
        self.broken.store(true, Ordering::Release);
        self.stop.notify_one();
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        for (request, waiter) in waiting {
            if let Waiter::Stream(sender) = waiter {
                drop(sender.send((request, None)));
            }
        }
    }

    fn silent_for(&self) -> Duration {
        match self.unheard_since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => self.started.elapsed().saturating_sub(Duration::from_millis(since)),
        }
    }

    fn sent(&self) {
        let now = (self.started.elapsed().as_millis() as u64).max(1);
        // Only the first unheard request sets it.
        let _ = self.unheard_since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn enter(&self, waiter: Waiter) -> Result<u64, String> {
        let request = self.next.fetch_add(1, Ordering::Relaxed);
        let mut waiting = lock(&self.waiting);
        // Checked under the lock: `fail` sets the flag before it empties the map.
        if self.broken.load(Ordering::Acquire) {
            return Err("connection is broken".to_owned());
        }
        waiting.insert(request, waiter);
        Ok(request)
    }

    pub(crate) fn forget(&self, requests: impl Iterator<Item = u64>) {
        let mut waiting = lock(&self.waiting);
        requests.for_each(|request| drop(waiting.remove(&request)));
    }

    /// Sends a request and waits for its reply, at most `limit`.
    pub(crate) async fn call(
        &self,
        group: GroupId,
        request: Request,
        limit: Duration,
    ) -> Result<Reply, String> {
        let (sender, reply) = oneshot::channel();
        let id = self.enter(Waiter::One(sender))?;
        let sent = async {
            self.sent();
            self.sender
                .send(request.into_frame(group, id))
                .await
                .map_err(|_| "connection is broken".to_owned())?;
            reply.await.map_err(|_| "connection broke".to_owned())
        };
        let outcome = tokio::time::timeout(limit, sent).await;
        match outcome {
            Ok(frame) => Reply::from_frame(frame?).map_err(|e| e.to_string()),
            Err(_) => {
                self.forget(std::iter::once(id));
                Err(format!("no reply in time, limit={limit:?}"))
            }
        }
    }

    /// Sends a request whose reply goes to `replies`. Returns its number.
    pub(crate) async fn send(
        &self,
        group: GroupId,
        request: Request,
        replies: &mpsc::UnboundedSender<(u64, Option<Frame>)>,
    ) -> Result<u64, String> {
        let id = self.enter(Waiter::Stream(replies.clone()))?;
        self.sent();
        if self.sender.send(request.into_frame(group, id)).await.is_err() {
            self.forget(std::iter::once(id));
            return Err("connection is broken".to_owned());
        }
        Ok(id)
    }
}
