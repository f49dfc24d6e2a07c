//! Sessions that a new process may have opened before it was given up: served on under the epoch that they have, until each is
//! opened anew, a few at once. Its links then go over to the new session within this process, as they would have gone to the other
//! one.
//!
//! Called by the hand-over. Must not know: the other process. `one_writer`, `fence_before_serve`: whatever epoch that one got, no
//! command was sent under it, and none is; chunkservers hear of the next one with its first command, and refuse from then on what
//! comes late under the old one (`no_late_duplicate`). What waits meanwhile is what needs the metadata server: segments that are
//! not allocated, links that begin. One that ends before is settled by the registry.

use super::hand_over::stop;
use crate::engine::{Engine, OpenError};
use crate::link::{self, Links};
use crate::registry::HeldSession;
use crate::session::Session;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// Sessions that are opened at once: each costs the metadata server a log entry.
const PARALLEL: usize = 16;
/// Longest wait for one to be opened. Each metadata server has its own, shorter one, after which the next is asked
/// (`ClientConfig::mds_timeout`); what they add up to is less.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
/// How long one that could not be opened keeps its turn: a metadata server that is away is not asked more often for all of them.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Opens sessions anew.
#[derive(Clone)]
pub(crate) struct Reopening {
    links: Arc<Links>,
    /// Runs links that have gone over.
    tasks: TaskTracker,
    /// Cancelled when this process is to stop: then no more are opened, and the registry gives them back.
    leaving: CancellationToken,
    /// One for each session.
    under_way: TaskTracker,
    /// One for each that is being opened.
    turns: Arc<Semaphore>,
}

impl Reopening {
    /// `tasks` gets the links that go over.
    pub(crate) fn new(links: Arc<Links>, tasks: TaskTracker, leaving: CancellationToken) -> Self {
        let under_way = TaskTracker::new();
        // What is closed can be waited for.
        under_way.close();
        Self { links, tasks, leaving, under_way, turns: Arc::new(Semaphore::new(PARALLEL)) }
    }

    /// Begins with these sessions, which are in doubt from now on.
    pub(crate) fn begin(&self, sessions: Vec<Arc<Session>>) {
        for session in sessions {
            session.in_doubt.store(true, Ordering::Release);
            let this = self.clone();
            self.under_way.spawn(async move { this.reopen(&session).await });
        }
    }

    /// All are opened anew, or lost.
    pub(crate) async fn ended(&self) {
        self.under_way.wait().await;
    }

    async fn reopen(&self, session: &Arc<Session>) {
        let mut told = false;
        while let Some(_turn) = self.turn().await {
            let Err(error) = self.try_reopen(session).await else { return };
            if !std::mem::replace(&mut told, true) {
                warn!(volume = %session.name, epoch = %session.engine.traits().epoch, %error, "session can not be opened anew yet, it is served on");
            }
            tokio::select! {
                () = self.leaving.cancelled() => return,
                () = tokio::time::sleep(RETRY_AFTER) => {}
            }
        }
    }

    /// The right to open one session; `None` if this process is to stop.
    async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        tokio::select! {
            biased;
            () = self.leaving.cancelled() => None,
            turn = self.turns.acquire() => turn.ok(),
        }
    }

    /// Opens it anew, unless it is over. It is served and can be joined meanwhile, and closed too: nobody waits for the metadata
    /// server who needs not.
    ///
    /// # Errors
    /// `Unavailable` if it may be had later.
    async fn try_reopen(&self, session: &Arc<Session>) -> Result<(), OpenError> {
        let registry = &self.links.registry;
        let opening = async {
            let _opening = session.opening.lock().await;
            match session.in_doubt.load(Ordering::Acquire) {
                true => registry.engines().open(&session.name, session.anew()).await.map(Some),
                false => Ok(None),
            }
        };
        let opened = timeout(OPEN_LIMIT, opening).await;
        let opened = opened
            .unwrap_or_else(|_| Err(OpenError::Unavailable("no metadata server answers in time".to_owned())));
        match opened {
            Ok(None) => {}
            Ok(Some(engine)) => match registry.hold_one(session).await {
                Some(held) if !self.leaving.is_cancelled() => self.go_over(held, engine).await,
                // It is over, or will be at once: nobody else gives this one back.
                _ => engine.close().await,
            },
            Err(error @ OpenError::Unavailable(_)) => return Err(error),
            Err(error) => {
                let Some(mut held) = registry.hold_one(session).await else { return Ok(()) };
                warn!(volume = %session.name, %error, "session can not be opened anew");
                let limit = self.links.drain_limit + super::hand_over::LINK_END_MARGIN;
                held.close(registry, limit, matches!(error, OpenError::Held(_))).await;
            }
        }
        Ok(())
    }

    async fn go_over(&self, mut held: HeldSession, engine: Arc<dyn Engine>) {
        let frozen = stop(&held.session, self.links.drain_limit).await.unwrap_or_default();
        let session = held.replace(&self.links.registry, engine);
        drop(held);
        info!(volume = %session.name, links = frozen.len(), "session goes on as a new one");
        for frozen in frozen {
            let (begun, _) = oneshot::channel();
            self.tasks.spawn(link::go_on(frozen, Arc::clone(&session), Arc::clone(&self.links), begun));
        }
        self.links.registry.link_left(session, false);
    }
}

#[cfg(test)]
mod tests {
    use super::OPEN_LIMIT;
    use spline_client::ClientConfig;

    /// A session and its routes are asked for, at three servers each.
    #[test]
    fn every_metadata_server_is_asked_before_an_open_is_given_up() {
        assert!(OPEN_LIMIT > ClientConfig::default().mds_timeout * 2 * 3);
    }
}
