//! A session: one open volume, its limits and the links that it serves.
//!
//! Called by links, the registry, upgrades, the watchdog and the service. Knows: who is linked, whether a request may pass. Must
//! not know: sockets' bytes, where the data is. Invariants: `one_writer` (a lost session serves nothing more), `replay_before_new`
//! and `no_late_duplicate` (a new link is served only when what its dead predecessors started has ended).

use crate::admission::Admission;
use crate::engine::{Engine, EngineAnswer, Standing, Wanted};
use crate::link::ring::Freeze;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use rustix::event::{PollFd, PollFlags, poll};
use spline_link::InstanceId;
use spline_types::{BlockOp, BlockRequest, Fault, Invalid, VolumeName};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

/// One open volume.
pub(crate) struct Session {
    pub(crate) name: VolumeName,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) admission: Admission,
    /// Cancelled when links are to say farewell: the gateway leaves or an operator closed the volume.
    pub(crate) leaving: CancellationToken,
    /// When it was opened.
    pub(crate) since: SystemTime,
    /// The next process of this gateway gets it: what can not be carried out any more is withdrawn, not failed.
    pub(crate) passing: AtomicBool,
    /// Taken over from another process, and not served yet: when that one took its last request, nanoseconds of the monotonic
    /// clock.
    pub(crate) paused: Mutex<Option<u64>>,
    /// A process that was given up may have opened the volume in this session's place. Which session of this gateway is the newest
    /// is not known until it is opened anew.
    pub(crate) in_doubt: AtomicBool,
    /// Held while that is done.
    pub(crate) opening: tokio::sync::Mutex<()>,
    members: Mutex<Members>,
    /// Number of links, for whoever waits until there is none.
    links: watch::Sender<usize>,
}

#[derive(Default)]
struct Members {
    /// Links that joined so far; tells a grace timer whether anybody came meanwhile.
    joined: u64,
    now: HashMap<u64, Member>,
}

struct Member {
    instance: InstanceId,
    /// Its requests travel in a ring.
    ring: bool,
    orders: mpsc::UnboundedSender<Order>,
    /// To see whether the other side is still there.
    socket: Weak<OwnedFd>,
    /// Tells the link to stop reading.
    stop: CancellationToken,
    /// Cancelled when the link's last request has ended.
    ended: CancellationToken,
}

/// What a link's task is told.
pub(crate) enum Order {
    /// Let what runs end and give the link away. Dropped by a link that can not be given away.
    Freeze(Freeze),
    /// Say that the task runs.
    Probe(oneshot::Sender<()>),
}

/// Who joins a session.
#[derive(Clone, Copy)]
pub(crate) struct Caller<'a> {
    /// The nebd, or its thread.
    pub(crate) instance: InstanceId,
    /// Its connection.
    pub(crate) socket: &'a Arc<OwnedFd>,
    /// Its requests travel in a ring.
    pub(crate) ring: bool,
}

/// A link's place in its session; leaves when dropped.
pub(crate) struct Membership {
    pub(crate) session: Arc<Session>,
    id: u64,
    /// Cancelled when a newer link takes this one's place.
    pub(crate) stop: CancellationToken,
    /// Links whose requests must have ended before this one is served.
    pub(crate) predecessors: Vec<CancellationToken>,
    /// Changes of the volume since the link joined.
    pub(crate) standing: watch::Receiver<Standing>,
    /// What the link's task is told.
    pub(crate) orders: mpsc::UnboundedReceiver<Order>,
    ring: bool,
    _ended: DropGuard,
}

impl Session {
    pub(crate) fn new(
        name: VolumeName,
        engine: Arc<dyn Engine>,
        admission: Admission,
        leaving: CancellationToken,
    ) -> Self {
        let (since, paused, members) = (SystemTime::now(), Mutex::default(), Mutex::default());
        let (passing, in_doubt) = (AtomicBool::new(false), AtomicBool::new(false));
        Self {
            name,
            engine,
            admission,
            leaving,
            since,
            passing,
            paused,
            in_doubt,
            opening: tokio::sync::Mutex::default(),
            members,
            links: watch::Sender::new(0),
        }
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a link. Links of the same nebd, and those whose other side is gone, are told to stop and become its
    /// predecessors.
    pub(crate) fn join(self: &Arc<Self>, caller: Caller<'_>) -> Membership {
        let Caller { instance, socket, ring } = caller;
        let mut members = self.members();
        let mut predecessors = Vec::new();
        for member in members.now.values() {
            if member.instance == instance || member.stop.is_cancelled() || hung_up(&member.socket) {
                member.stop.cancel();
                predecessors.push(member.ended.clone());
            }
        }
        members.joined += 1;
        let id = members.joined;
        let (stop, ended) = (CancellationToken::new(), CancellationToken::new());
        let socket = Arc::downgrade(socket);
        let (tell, orders) = mpsc::unbounded_channel();
        let (stopped, done) = (stop.clone(), ended.clone());
        members.now.insert(id, Member { instance, ring, orders: tell, socket, stop: stopped, ended: done });
        self.links.send_replace(members.now.len());
        let (session, standing) = (Arc::clone(self), self.engine.standing());
        Membership { session, id, stop, predecessors, standing, orders, ring, _ended: ended.drop_guard() }
    }

    /// Links now.
    pub(crate) fn links(&self) -> usize {
        *self.links.borrow()
    }

    /// Links whose requests travel in a ring.
    pub(crate) fn rings(&self) -> usize {
        self.members().now.values().filter(|member| member.ring).count()
    }

    /// Where to tell each link's task what to do. A few orders at most lie in it.
    pub(crate) fn links_orders(&self) -> Vec<mpsc::UnboundedSender<Order>> {
        self.members().now.values().map(|member| member.orders.clone()).collect()
    }

    /// Waits until no link is left.
    pub(crate) async fn deserted(&self) {
        // The sender lives as long as the session.
        let _ = self.links.subscribe().wait_for(|links| *links == 0).await;
    }

    /// Links that ever joined, if none is here now.
    pub(crate) fn idle_since(&self) -> Option<u64> {
        let members = self.members();
        members.now.is_empty().then_some(members.joined)
    }

    /// Whether what fails as fenced is to be sent again, to whoever has the session next.
    pub(crate) fn withdraws(&self) -> bool {
        self.leaving.is_cancelled() || self.passing.load(Ordering::Acquire)
    }

    /// How it is opened anew: as what goes on with it.
    pub(crate) fn anew(&self) -> Wanted {
        let traits = self.engine.traits();
        Wanted {
            read_only: traits.read_only,
            force: false,
            resumes: Some(traits.epoch),
            known: Some(traits.identity),
        }
    }

    /// Whether a newer session has the volume.
    pub(crate) fn is_lost(&self) -> bool {
        self.engine.standing().borrow().lost
    }

    /// Checks a request.
    ///
    /// # Errors
    /// `Invalid`, `ReadOnly`: it can not be served.
    pub(crate) fn check(&self, request: &BlockRequest, read_only: bool) -> Result<(), Fault> {
        self.engine.geometry().check(request.op, request.range)?;
        if request.op.modifies() && (read_only || self.engine.traits().read_only) {
            return Err(Fault::ReadOnly);
        }
        if request.op == BlockOp::Status && request.range.is_empty() {
            // An answer names at least one extent.
            return Err(Fault::Invalid(Invalid::Flags));
        }
        Ok(())
    }

    /// Checks a request and hands it to the engine.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub(crate) fn execute(
        &self,
        request: BlockRequest,
        payload: Bytes,
        read_only: bool,
    ) -> Result<BoxFuture<'static, Result<EngineAnswer, Fault>>, Fault> {
        self.check(&request, read_only)?;
        Ok(self.engine.execute(request, payload))
    }
}

impl Membership {
    /// Whether the link's requests travel in a ring.
    pub(crate) fn has_ring(&self) -> bool {
        self.ring
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut members = self.session.members();
        members.now.remove(&self.id);
        self.session.links.send_replace(members.now.len());
    }
}

/// Whether the other side of a socket has closed it, whatever is still to be read from it.
pub(crate) fn hung_up(socket: &Weak<OwnedFd>) -> bool {
    let Some(socket) = socket.upgrade() else { return true };
    let mut fds = [PollFd::new(&*socket, PollFlags::RDHUP)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}
