//! Sessions held still: by a process that passes them on, so that none is opened, joined or closed meanwhile; by the one that
//! takes them over, so that none is served before it may be; and one of them, to put another in its place.
//!
//! Called by the upgrade. Whoever wants such a volume waits for its slot.

use super::{Listed, Registry, Session};
use crate::engine::{Engine, OpenError};
use spline_types::VolumeName;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::OwnedMutexGuard;
use tokio::time::{timeout, timeout_at};

type Guard = OwnedMutexGuard<Option<Arc<Session>>>;

/// Every session of a registry, held still until this is dropped.
pub(crate) struct Held {
    registry: Arc<Registry>,
    pub(crate) sessions: Vec<HeldSession>,
    /// Names without a session.
    _empty: Vec<Guard>,
}

/// One of them.
pub(crate) struct HeldSession {
    pub(crate) session: Arc<Session>,
    slot: Guard,
}

impl Registry {
    /// Holds every session still; waits `until` then for those that are being opened or closed.
    ///
    /// # Errors
    /// The volume of which that takes longer; nothing is held.
    pub(crate) async fn hold(self: &Arc<Self>, until: Instant) -> Result<Held, VolumeName> {
        let slots: Vec<_> = {
            let mut slots = self.slots();
            slots.held = Some(slots.list());
            slots.by_name.iter().map(|(name, slot)| (name.clone(), Arc::clone(slot))).collect()
        };
        // From here on, so that it lets go however this ends.
        let mut held = Held { registry: Arc::clone(self), sessions: Vec::new(), _empty: Vec::new() };
        for (name, slot) in slots {
            let Ok(slot) = timeout_at(until.into(), slot.lock_owned()).await else { return Err(name) };
            match slot.clone() {
                Some(session) => held.sessions.push(HeldSession { session, slot }),
                None => held._empty.push(slot),
            }
        }
        let sessions = held.sessions.iter().map(|held| Arc::clone(&held.session)).collect();
        self.slots().held = Some(Listed { sessions, busy: Vec::new() });
        Ok(held)
    }

    /// Makes a session of an engine that was taken over; nobody can join it before it is [entered](Reserved::enter).
    ///
    /// # Errors
    /// `Unavailable` if there are too many volumes.
    pub(crate) async fn reserve(
        &self,
        name: &VolumeName,
        engine: Arc<dyn Engine>,
    ) -> Result<Reserved, OpenError> {
        let slot = self.slot(name).await?.lock_owned().await;
        Ok(Reserved { session: self.opened(name, engine), slot })
    }
}

impl Registry {
    /// Holds one session still; `None` if it is not served any more.
    pub(crate) async fn hold_one(&self, session: &Arc<Session>) -> Option<HeldSession> {
        let slot = self.slots().by_name.get(&session.name).cloned()?;
        let slot = slot.lock_owned().await;
        let is_served = slot.as_ref().is_some_and(|served| Arc::ptr_eq(served, session));
        is_served.then(|| HeldSession { session: Arc::clone(session), slot })
    }
}

impl HeldSession {
    /// Serves the volume by another engine in place of the session, of which nothing runs any more.
    pub(crate) fn replace(&mut self, registry: &Registry, engine: Arc<dyn Engine>) -> Arc<Session> {
        registry.metrics.sessions.dec();
        self.session = registry.opened(&self.session.name, engine);
        *self.slot = Some(Arc::clone(&self.session));
        Arc::clone(&self.session)
    }

    /// Closes the session, which can not be opened anew, because it is lost to another gateway or for another reason: its links
    /// leave within `limit`, and find out by themselves.
    pub(crate) async fn close(&mut self, registry: &Registry, limit: Duration, lost: bool) {
        let session = Arc::clone(&self.session);
        session.leaving.cancel();
        session.engine.leave();
        if timeout(limit, session.deserted()).await.is_err() {
            tracing::warn!(volume = %session.name, links = session.links(), "links did not end in time");
        }
        session.in_doubt.store(false, Ordering::Release);
        session.engine.close().await;
        registry.ended(&session, lost);
        *self.slot = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.registry.slots().held = None;
        self.registry.released.notify_waiters();
    }
}

/// A session that was taken over and is not served yet. Dropped, it leaves its name without a session.
pub(crate) struct Reserved {
    pub(crate) session: Arc<Session>,
    slot: Guard,
}

impl Reserved {
    /// Serves it. Closed after the grace if no link comes.
    pub(crate) fn enter(mut self, registry: &Arc<Registry>) -> Arc<Session> {
        let session = Arc::clone(&self.session);
        *self.slot = Some(Arc::clone(&session));
        drop(self.slot);
        registry.link_left(Arc::clone(&session), false);
        session
    }

    /// Does not serve it: whoever wants the volume opens it anew.
    pub(crate) async fn give_up(self, registry: &Registry) {
        // What it holds of the volume, a file's lock, say, is left to who has it too.
        self.session.engine.release().await;
        registry.metrics.sessions.dec();
    }
}
