//! What a session does while another process takes it over, so that neither notices the other: allocations wait, because the
//! metadata server knows the other's epoch already; and that this one's is not the newest there is no loss.
//!
//! Called by the cluster engine. Must not know who the other process is, or how it is told.

use spline_types::Fault;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedRwLockWriteGuard, RwLock, RwLockReadGuard};

/// How far a session is on its way to another process.
#[derive(Default)]
enum Stage {
    /// It is this process's.
    #[default]
    Ours,
    /// The other process may open it; this one serves it still. Holds up allocations.
    Passing(#[allow(dead_code, reason = "held for its drop")] OwnedRwLockWriteGuard<()>),
    /// Links are leaving: what can not be done any more is withdrawn.
    Passed,
}

/// The way of one session from one process to the next.
#[derive(Default)]
pub(super) struct Succession {
    stage: Mutex<Stage>,
    /// Read by each allocation under way.
    allocations: Arc<RwLock<()>>,
}

/// The right to ask for an allocation.
#[must_use = "the session may be passed on as soon as it is dropped"]
pub(super) struct Asking<'a>(#[allow(dead_code, reason = "held for its drop")] RwLockReadGuard<'a, ()>);

impl Succession {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the session is being passed on.
    ///
    /// # Errors
    /// `Fenced` once it was.
    pub(super) async fn ask(&self) -> Result<Asking<'_>, Fault> {
        let asking = Asking(self.allocations.read().await);
        if matches!(*self.stage(), Stage::Passed) {
            return Err(Fault::Fenced);
        }
        Ok(asking)
    }

    /// Another process may open the session from now on. Waits for the allocations that are under way.
    pub(super) async fn pass(&self) {
        let held = Arc::clone(&self.allocations).write_owned().await;
        *self.stage() = Stage::Passing(held);
    }

    /// Nobody has opened it, nor will: it is as it was.
    pub(super) fn keep(&self) {
        *self.stage() = Stage::Ours;
    }

    /// This process does nothing new with it.
    pub(super) fn leave(&self) {
        *self.stage() = Stage::Passed;
    }

    /// Whether a newer session is no loss: it is another process's that goes on with this one.
    pub(super) fn has_heir(&self) -> bool {
        !matches!(*self.stage(), Stage::Ours)
    }

    /// Whether links leave, so that whatever fails is withdrawn.
    pub(super) fn is_left(&self) -> bool {
        matches!(*self.stage(), Stage::Passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn allocations_wait_while_a_session_is_passed_on() {
        let succession = Succession::default();
        let asking = succession.ask().now_or_never().expect("ours").expect("granted");
        let mut pass = Box::pin(succession.pass());
        assert!((&mut pass).now_or_never().is_none(), "one is under way");
        let mut later = Box::pin(succession.ask());
        assert!((&mut later).now_or_never().is_none(), "no overtaking");
        drop(asking);
        pass.now_or_never().expect("none is under way");
        assert!((&mut later).now_or_never().is_none() && succession.has_heir());
        succession.keep();
        assert!(later.now_or_never().expect("goes on").is_ok() && !succession.has_heir());
    }

    #[test]
    fn what_waits_is_withdrawn_once_it_is_passed_on() {
        let succession = Succession::default();
        succession.pass().now_or_never().expect("ours");
        let mut waiting = Box::pin(succession.ask());
        assert!((&mut waiting).now_or_never().is_none());
        succession.leave();
        assert!(matches!(waiting.now_or_never(), Some(Err(Fault::Fenced))));
        assert!(succession.has_heir() && succession.is_left());
        assert!(matches!(succession.ask().now_or_never(), Some(Err(Fault::Fenced))));
    }
}
