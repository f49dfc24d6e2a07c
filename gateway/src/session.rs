//! A session: one open volume, its limits and the links that it serves.
//!
//! Called by links and the registry. Knows: who is linked, whether a request may pass. Must not know: sockets' bytes,
//! where the data is. Invariants: `one_writer` (a lost session serves nothing more), `replay_before_new` and
//! `no_late_duplicate` (a new link is served only when what its dead predecessors started has ended).

use crate::admission::Admission;
use crate::engine::{Engine, EngineAnswer, Standing};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use rustix::event::{PollFd, PollFlags, poll};
use spline_link::InstanceId;
use spline_types::{BlockOp, BlockRequest, Fault, Invalid, VolumeName};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// One open volume.
pub(crate) struct Session {
    pub(crate) name: VolumeName,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) admission: Admission,
    /// Cancelled when links are to say farewell: the gateway leaves or an operator closed the volume.
    pub(crate) leaving: CancellationToken,
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
    /// To see whether the other side is still there.
    socket: Weak<OwnedFd>,
    /// Tells the link to stop reading.
    stop: CancellationToken,
    /// Cancelled when the link's last request has ended.
    ended: CancellationToken,
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
    _ended: DropGuard,
}

impl Session {
    pub(crate) fn new(
        name: VolumeName,
        engine: Arc<dyn Engine>,
        admission: Admission,
        leaving: CancellationToken,
    ) -> Self {
        Self { name, engine, admission, leaving, members: Mutex::default(), links: watch::Sender::new(0) }
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a link. Links of the same nebd, and those whose other side is gone, are told to stop and become its
    /// predecessors.
    pub(crate) fn join(self: &Arc<Self>, instance: InstanceId, socket: &Arc<OwnedFd>) -> Membership {
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
        members.now.insert(id, Member { instance, socket, stop: stop.clone(), ended: ended.clone() });
        self.links.send_replace(members.now.len());
        let (session, standing) = (Arc::clone(self), self.engine.standing());
        Membership { session, id, stop, predecessors, standing, _ended: ended.drop_guard() }
    }

    /// Links now.
    pub(crate) fn links(&self) -> usize {
        *self.links.borrow()
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

    /// Whether a newer session has the volume.
    pub(crate) fn is_lost(&self) -> bool {
        self.engine.standing().borrow().lost
    }

    /// Checks a request and hands it to the engine.
    ///
    /// # Errors
    /// `Invalid`, `ReadOnly`: the request can not be served.
    pub(crate) fn execute(
        &self,
        request: BlockRequest,
        payload: Bytes,
        read_only: bool,
    ) -> Result<BoxFuture<'static, Result<EngineAnswer, Fault>>, Fault> {
        self.engine.geometry().check(request.op, request.range)?;
        if request.op.modifies() && (read_only || self.engine.traits().read_only) {
            return Err(Fault::ReadOnly);
        }
        if request.op == BlockOp::Status && request.range.is_empty() {
            // An answer names at least one extent.
            return Err(Fault::Invalid(Invalid::Flags));
        }
        Ok(self.engine.execute(request, payload))
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
fn hung_up(socket: &Weak<OwnedFd>) -> bool {
    let Some(socket) = socket.upgrade() else { return true };
    let mut fds = [PollFd::new(&*socket, PollFlags::RDHUP)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}
