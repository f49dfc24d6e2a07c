//! Sessions that a new process may have opened before it was given up: served on under the epoch that they have, until each is
//! opened anew. Its links then go over to the new session within this process, as they would have gone to the other one.
//!
//! Called by the hand-over. Must not know: the other process. `one_writer`, `fence_before_serve`: whatever epoch that one got, no
//! command was sent under it, and none is; chunkservers hear of the next one with its first command, and refuse from then on what
//! comes late under the old one (`no_late_duplicate`). What waits meanwhile is what needs the metadata server: segments that are
//! not allocated, links that begin.

use super::hand_over::stop;
use crate::engine::{Engine, OpenError, Wanted};
use crate::link::{self, Links};
use crate::registry::HeldSession;
use crate::session::Session;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// Time for the metadata server to open a session: whoever wants the volume waits for so long.
const OPEN_LIMIT: Duration = Duration::from_secs(2);
/// From one try to the next.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Opens sessions anew.
#[derive(Clone)]
pub(crate) struct Reopening {
    links: Arc<Links>,
    /// Runs links that have gone over.
    tasks: TaskTracker,
    /// Cancelled when this process is to stop: then they are left as they are.
    leaving: CancellationToken,
    /// One for each session.
    under_way: TaskTracker,
}

impl Reopening {
    /// `tasks` gets the links that go over.
    pub(crate) fn new(links: Arc<Links>, tasks: TaskTracker, leaving: CancellationToken) -> Self {
        let under_way = TaskTracker::new();
        // What is closed can be waited for.
        under_way.close();
        Self { links, tasks, leaving, under_way }
    }

    /// Begins with these sessions, which nobody holds any more.
    pub(crate) fn begin(&self, sessions: Vec<Arc<Session>>) {
        for session in sessions {
            let this = self.clone();
            self.under_way.spawn(async move {
                tokio::select! {
                    () = this.leaving.cancelled() => {}
                    () = this.reopen(&session) => {}
                }
            });
        }
    }

    /// All are opened anew, or lost.
    pub(crate) async fn ended(&self) {
        self.under_way.wait().await;
    }

    async fn reopen(&self, session: &Arc<Session>) {
        while let Err(error) = self.try_reopen(session).await {
            warn!(volume = %session.name, epoch = %session.engine.traits().epoch, %error, "session can not be opened anew yet, it is served on");
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    /// Opens it anew, unless it is over.
    ///
    /// # Errors
    /// `Unavailable` if it may be had later.
    async fn try_reopen(&self, session: &Arc<Session>) -> Result<(), OpenError> {
        let registry = &self.links.registry;
        // Nobody joins it, and nobody closes it meanwhile.
        let Some(mut held) = registry.hold_one(session).await else { return Ok(()) };
        let traits = session.engine.traits();
        let wanted = Wanted {
            read_only: traits.read_only,
            force: false,
            resumes: Some(traits.epoch),
            known: Some(traits.identity),
        };
        let opening = registry.engines().open(&session.name, wanted);
        match timeout(OPEN_LIMIT, opening).await {
            Ok(Ok(engine)) => self.go_over(held, engine).await,
            Ok(Err(error @ OpenError::Unavailable(_))) => return Err(error),
            Err(_) => return Err(OpenError::Unavailable("no metadata server answers in time".to_owned())),
            Ok(Err(error)) => {
                warn!(volume = %session.name, %error, "session is lost");
                held.close(registry, self.links.drain_limit + super::hand_over::LINK_END_MARGIN).await;
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
            self.tasks.spawn(link::go_on(frozen, Arc::clone(&session), Arc::clone(&self.links)));
        }
        self.links.registry.link_left(session, false);
    }
}
