//! Sessions by volume name: opened by the first link, shared by its links, closed a grace after the last.
//!
//! Called by links, the service, the watchdog, upgrades and the gateway's shutdown. Each name has a slot whose lock is held while
//! its volume is opened or closed, so that a volume is never opened twice, and slow volumes do not hold up others. It is not held
//! while the metadata server is asked about a session that is open: links that resume it need no answer.

mod held;

use crate::admission::Admission;
use crate::engine::{Engine, OpenError, Opener, Wanted, replaced};
use crate::metrics::Metrics;
use crate::session::{Caller, Membership, Session};
use crate::upgrade::monotonic_ns;
pub(crate) use held::{Held, HeldSession, Reserved};
use spline_types::VolumeName;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// Most names in use at once: what a host with a few hundred guests never meets.
const VOLUMES_MAX: usize = 4096;
/// Time to open a session that is in doubt anew when it ends; whoever stops this gateway waits for it. Its lease runs out instead.
const SETTLE_LIMIT: Duration = Duration::from_secs(2);

type Slot = tokio::sync::Mutex<Option<Arc<Session>>>;

/// The slots of all names.
#[derive(Default)]
struct Slots {
    by_name: HashMap<VolumeName, Arc<Slot>>,
    /// Nothing is opened or closed any more, and so it stands: see [`Held`].
    held: Option<Listed>,
}

/// The volumes of a registry, for operators and the watchdog.
#[derive(Clone, Default)]
pub(crate) struct Listed {
    /// Open sessions.
    pub(crate) sessions: Vec<Arc<Session>>,
    /// What is just being opened or closed.
    pub(crate) busy: Vec<VolumeName>,
}

impl Slots {
    /// Looks at each slot; the lock on all of them keeps others from looking at the same time.
    fn list(&self) -> Listed {
        let mut listed = Listed::default();
        for (name, slot) in &self.by_name {
            match slot.try_lock() {
                Ok(session) => listed.sessions.extend(session.clone()),
                Err(_) => listed.busy.push(name.clone()),
            }
        }
        listed
    }
}

/// Limits of each session.
#[derive(Clone, Copy)]
pub(crate) struct SessionLimits {
    pub(crate) requests: usize,
    pub(crate) bytes: u64,
    /// How long a session outlives its last link.
    pub(crate) grace: Duration,
}

/// All sessions of a gateway.
pub(crate) struct Registry {
    engines: Box<dyn Opener>,
    limits: SessionLimits,
    metrics: Arc<Metrics>,
    /// Cancelled when the gateway leaves.
    leaving: CancellationToken,
    slots: Mutex<Slots>,
    /// Told when they are not held any more.
    released: Notify,
    graces: TaskTracker,
}

impl Registry {
    pub(crate) fn new(
        engines: Box<dyn Opener>,
        limits: SessionLimits,
        metrics: Arc<Metrics>,
        leaving: CancellationToken,
    ) -> Self {
        let (slots, released, graces) = (Mutex::default(), Notify::new(), TaskTracker::new());
        Self { engines, limits, metrics, leaving, slots, released, graces }
    }

    /// Where engines come from.
    pub(crate) fn engines(&self) -> &dyn Opener {
        self.engines.as_ref()
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slot of a name, once nobody holds them.
    async fn slot(&self, name: &VolumeName) -> Result<Arc<Slot>, OpenError> {
        loop {
            // Before the look, so that it is not missed.
            let released = self.released.notified();
            if let Some(slot) = self.slot_now(name)? {
                return Ok(slot);
            }
            released.await;
        }
    }

    fn slot_now(&self, name: &VolumeName) -> Result<Option<Arc<Slot>>, OpenError> {
        let mut slots = self.slots();
        if slots.held.is_some() {
            return Ok(None);
        }
        if !slots.by_name.contains_key(name) && slots.by_name.len() >= VOLUMES_MAX {
            return Err(OpenError::Unavailable(format!("too many volumes are open: limit={VOLUMES_MAX}")));
        }
        Ok(Some(Arc::clone(slots.by_name.entry(name.clone()).or_default())))
    }

    /// Forgets a slot that is empty and that nobody else holds; the caller has let go of its lock.
    fn forget(&self, name: &VolumeName, slot: &Arc<Slot>) {
        let mut slots = self.slots();
        // The map's and the caller's: whoever wants it must come through the map, which is locked.
        let unused = Arc::strong_count(slot) <= 2 && slot.try_lock().is_ok_and(|session| session.is_none());
        if unused && slots.by_name.get(name).is_some_and(|known| Arc::ptr_eq(known, slot)) {
            slots.by_name.remove(name);
        }
    }

    /// Adds a link to a volume's session, which is opened if need be.
    ///
    /// # Errors
    /// Why it can not be served.
    pub(crate) async fn join(
        &self,
        name: &VolumeName,
        wanted: Wanted,
        caller: Caller<'_>,
    ) -> Result<Membership, OpenError> {
        let slot = self.slot(name).await?;
        let joined = self.join_slot(&slot, name, wanted, caller).await;
        if joined.is_err() {
            self.forget(name, &slot);
        }
        joined
    }

    async fn join_slot(
        &self,
        slot: &Slot,
        name: &VolumeName,
        wanted: Wanted,
        caller: Caller<'_>,
    ) -> Result<Membership, OpenError> {
        // Another gateway may have taken the volume, and this one not have heard of it: a link that begins must not join what
        // is over. One that resumes goes on as it was, with the metadata server away too.
        if wanted.resumes.is_none() {
            prove(slot, wanted.known.is_none()).await?;
        }
        let mut session = slot.lock().await;
        if self.leaving.is_cancelled() {
            return Err(OpenError::Unavailable("this gateway leaves; try again".to_owned()));
        }
        if let Some(open) = session.as_ref() {
            let stale = open.is_lost() || open.leaving.is_cancelled();
            // A session for reading only makes room for a writer when nobody uses it any more.
            let too_narrow = open.engine.traits().read_only && !wanted.read_only && open.links() == 0;
            if !stale && !too_narrow {
                may_join(name, open.engine.as_ref(), wanted)?;
                self.goes_on(open);
                return Ok(open.join(caller));
            }
            self.end(open).await;
            *session = None;
        }
        let opened = self.opened(name, self.engines.open(name, wanted).await?);
        let membership = opened.join(caller);
        *session = Some(opened);
        Ok(membership)
    }

    fn opened(&self, name: &VolumeName, engine: Arc<dyn Engine>) -> Arc<Session> {
        let traits = engine.traits();
        info!(volume = %name, engine = engine.name(), epoch = %traits.epoch, read_only = traits.read_only, "session is open");
        self.metrics.sessions.inc();
        let admission = Admission::new(self.limits.requests, self.limits.bytes);
        Arc::new(Session::new(name.clone(), engine, admission, self.leaving.child_token()))
    }

    /// A link is served: if the session was taken over, the first one ends the pause.
    fn goes_on(&self, session: &Session) {
        let paused = session.paused.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(since) = paused {
            let pause = Duration::from_nanos(monotonic_ns().saturating_sub(since));
            self.metrics.upgrade_pause.observe(pause.as_secs_f64());
            info!(volume = %session.name, ?pause, "session goes on");
        }
    }

    async fn end(&self, session: &Session) {
        let mut lost = session.is_lost();
        match session.in_doubt.swap(false, Ordering::AcqRel) && !lost {
            true => lost = self.settle(session).await,
            false => session.engine.close().await,
        }
        self.ended(session, lost);
    }

    /// Ends a session that is in doubt and gives the volume back: what is opened anew is the newest, and is closed. True if another
    /// gateway has it.
    async fn settle(&self, session: &Session) -> bool {
        session.engine.release().await;
        let opening = async {
            let _opening = session.opening.lock().await;
            self.engines.open(&session.name, session.anew()).await
        };
        let error = match tokio::time::timeout(SETTLE_LIMIT, opening).await {
            Ok(Ok(newest)) => {
                newest.close().await;
                return false;
            }
            Ok(Err(OpenError::Held(_))) => return true,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no metadata server answers in time".to_owned(),
        };
        // It may still be the newest.
        session.engine.close().await;
        warn!(
            volume = %session.name, error,
            "volume may not be given back, an upgrade was given up shortly before: its lease will run out"
        );
        false
    }

    fn ended(&self, session: &Session, lost: bool) {
        self.metrics.sessions.dec();
        if lost {
            self.metrics.sessions_lost.inc();
            warn!(volume = %session.name, "session was lost to a newer one and is closed");
        } else {
            info!(volume = %session.name, "session is closed");
        }
    }

    /// Told after a link has left. Closes the session if no link comes within the grace; at once if nebd said that
    /// it ends for good.
    pub(crate) fn link_left(self: &Arc<Self>, session: Arc<Session>, detached: bool) {
        let Some(joined) = session.idle_since() else { return };
        let registry = Arc::clone(self);
        let grace = if detached || session.is_lost() { Duration::ZERO } else { self.limits.grace };
        self.graces.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(grace) => registry.close_if_idle(&session, joined).await,
                // Shutdown closes every session itself.
                () = registry.leaving.cancelled() => {}
            }
        });
    }

    async fn close_if_idle(&self, session: &Arc<Session>, joined: u64) {
        let Some(slot) = self.slots().by_name.get(&session.name).cloned() else { return };
        let mut held = slot.lock().await;
        if held.as_ref().is_some_and(|now| Arc::ptr_eq(now, session)) && session.idle_since() == Some(joined)
        {
            self.end(session).await;
            *held = None;
        }
        drop(held);
        self.forget(&session.name, &slot);
    }

    /// Closes a volume's session: its links drain, are told to leave, and are waited for. False if it is not open.
    pub(crate) async fn close_volume(&self, name: &VolumeName) -> bool {
        let Some(slot) = self.slots().by_name.get(name).cloned() else { return false };
        let mut held = slot.lock().await;
        let session = held.take();
        if let Some(session) = &session {
            session.leaving.cancel();
            session.deserted().await;
            self.end(session).await;
        }
        drop(held);
        self.forget(name, &slot);
        session.is_some()
    }

    /// Closes every session; the links have ended.
    pub(crate) async fn close_all(&self) {
        let names: Vec<VolumeName> = self.slots().by_name.keys().cloned().collect();
        futures_util::future::join_all(names.iter().map(|name| self.close_volume(name))).await;
        self.graces.close();
        self.graces.wait().await;
        self.engines.stop();
    }

    /// What there is now; while an upgrade holds all still, what there was when it began to.
    pub(crate) fn listed(&self) -> Listed {
        let slots = self.slots();
        slots.held.clone().unwrap_or_else(|| slots.list())
    }

    /// The sessions that are open; one that is just being opened or closed is left out.
    pub(crate) fn sessions(&self) -> Vec<Arc<Session>> {
        self.listed().sessions
    }
}

/// Makes sure that the session in a slot, if there is one, is still the newest. It is asked without the slot's lock: what is
/// lost is seen under the lock, and a session that is in the slot by then instead was opened meanwhile, so it needs no proof.
/// Who knows the volume by the name only (`by_name`) must not get one that was renamed since.
async fn prove(slot: &Slot, by_name: bool) -> Result<(), OpenError> {
    let open = slot.lock().await.clone();
    match open.filter(|open| !open.is_lost()) {
        Some(open) => open.engine.prove(by_name).await,
        None => Ok(()),
    }
}

/// Refused if the session is another volume's than the one that nebd knows, or if somebody else had the volume since the
/// resumed session (`no_late_duplicate`): the session that is open now was opened anew, for another link.
fn may_join(name: &VolumeName, engine: &dyn Engine, wanted: Wanted) -> Result<(), OpenError> {
    let traits = engine.traits();
    if let Some(known) = wanted.known.filter(|known| *known != traits.identity) {
        return Err(replaced(name, traits.identity, known));
    }
    let since = traits.run_since;
    match wanted.resumes {
        Some(resumed) if resumed < since => Err(OpenError::Held(format!(
            "the volume was open on another gateway meanwhile, what was not answered is not written: volume={name} \
             resumed_epoch={resumed} run_since={since}"
        ))),
        _ => Ok(()),
    }
}
