//! Routes: the members of each copyset, which of them leads, and their addresses. Called by `volume`. Must never know
//! what is sent there.
//!
//! The leader is believed from what replicas answer; the metadata server is asked for members and addresses, and for
//! the leader only of copysets that nobody has spoken of yet. It is asked beside the requests, never in their way:
//! IO to known copysets goes on without it.

use crate::meta::{MetaError, RouteUpdate};
use crate::transport::Network;
use spline_types::{ChunkserverId, CopysetId};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Shortest time between two questions to the metadata server: many requests that fail together ask once.
const ASK_PAUSE: Duration = Duration::from_millis(100);

/// What a client knows of routes.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    table: RwLock<Table>,
    asking: Mutex<Asking>,
    learned: Notify,
}

/// The cache. Pure.
#[derive(Debug, Default)]
pub(crate) struct Table {
    addresses: HashMap<ChunkserverId, SocketAddr>,
    copysets: HashMap<CopysetId, Route>,
}

#[derive(Debug, Default)]
struct Route {
    members: Vec<ChunkserverId>,
    leader: Option<ChunkserverId>,
    /// Led last, and then did not answer as leader; asked last.
    doubted: Option<ChunkserverId>,
}

#[derive(Debug, Default)]
struct Asking {
    /// Copysets to ask for at the next question.
    wanted: HashSet<CopysetId>,
    /// A task is asking; it takes `wanted` before it ends.
    running: bool,
}

impl Table {
    /// Whom to ask: the leader, else a member that was not asked yet; `None` when all were, or none is known.
    pub(crate) fn target(
        &self,
        copyset: CopysetId,
        asked: &[ChunkserverId],
    ) -> Option<(ChunkserverId, SocketAddr)> {
        let route = self.copysets.get(&copyset)?;
        let address = |id: ChunkserverId| self.addresses.get(&id).map(|&address| (id, address));
        let fresh = |id: &ChunkserverId| !asked.contains(id);
        if let Some(found) = route.leader.filter(fresh).and_then(address) {
            return Some(found);
        }
        let trusted = route.members.iter().copied().filter(|&id| Some(id) != route.doubted);
        trusted.chain(route.doubted).filter(fresh).find_map(address)
    }

    /// A replica said, or showed by its answer, who leads. It may not be in the list of members yet.
    pub(crate) fn believe(&mut self, copyset: CopysetId, leader: ChunkserverId) {
        let route = self.copysets.entry(copyset).or_default();
        route.leader = Some(leader);
        if route.doubted == Some(leader) {
            route.doubted = None;
        }
    }

    /// This one does not answer as the leader. Does nothing if another is believed to lead by now.
    pub(crate) fn doubt(&mut self, copyset: CopysetId, id: ChunkserverId) {
        if let Some(route) = self.copysets.get_mut(&copyset)
            && route.leader.is_none_or(|leader| leader == id)
        {
            route.leader = None;
            route.doubted = Some(id);
        }
    }

    /// Takes over what the metadata server said.
    pub(crate) fn apply(&mut self, update: RouteUpdate) {
        self.addresses.extend(update.addresses);
        for (copyset, (members, leader)) in update.copysets {
            let route = self.copysets.entry(copyset).or_insert_with(|| Route { leader, ..Route::default() });
            // One that has left leads no more, and its answer would be a time-out.
            route.leader = route.leader.filter(|leader| members.contains(leader)).or(match route.doubted {
                None => leader,
                Some(doubted) => leader.filter(|&leader| leader != doubted),
            });
            route.doubted = route.doubted.filter(|doubted| members.contains(doubted));
            route.members = members;
        }
    }
}

impl Routes {
    /// See [`Table::target`].
    pub(crate) fn target(
        &self,
        copyset: CopysetId,
        asked: &[ChunkserverId],
    ) -> Option<(ChunkserverId, SocketAddr)> {
        self.read().target(copyset, asked)
    }

    /// See [`Table::believe`]. Free when it is believed already.
    pub(crate) fn believe(&self, copyset: CopysetId, leader: ChunkserverId) {
        if self.read().copysets.get(&copyset).is_some_and(|route| route.leader == Some(leader)) {
            return;
        }
        self.write().believe(copyset, leader);
    }

    /// See [`Table::doubt`].
    pub(crate) fn doubt(&self, copyset: CopysetId, id: ChunkserverId) {
        self.write().doubt(copyset, id);
    }

    /// Who is believed to lead, of at most `limit` copysets.
    pub(crate) fn leaders(&self, limit: usize) -> Vec<(CopysetId, ChunkserverId)> {
        let table = self.read();
        let led = table.copysets.iter().filter_map(|(copyset, route)| Some((*copyset, route.leader?)));
        led.take(limit).collect()
    }

    /// Those whose members are not known.
    pub(crate) fn unknown(&self, copysets: HashSet<CopysetId>) -> Vec<CopysetId> {
        let table = self.read();
        let known = |id: &CopysetId| table.copysets.get(id).is_some_and(|route| !route.members.is_empty());
        copysets.into_iter().filter(|id| !known(id)).collect()
    }

    /// Asks the metadata server and waits for its answer.
    pub(crate) async fn learn(
        &self,
        network: &impl Network,
        copysets: &[CopysetId],
    ) -> Result<(), MetaError> {
        let update = network.routes(copysets).await?;
        self.write().apply(update);
        self.learned.notify_waiters();
        Ok(())
    }

    /// Has the metadata server asked soon, by a task beside the requests.
    pub(crate) fn ask(self: &Arc<Self>, network: &Arc<impl Network>, copyset: CopysetId) {
        {
            let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
            asking.wanted.insert(copyset);
            if std::mem::replace(&mut asking.running, true) {
                return;
            }
        }
        let (routes, network) = (self.clone(), network.clone());
        tokio::spawn(async move {
            while let Some(wanted) = routes.take_wanted() {
                let asked_at = Instant::now();
                if let Err(error) = routes.learn(&*network, &wanted).await {
                    tracing::debug!(%error, copysets = wanted.len(), "can not ask for routes");
                }
                tokio::time::sleep_until(asked_at + ASK_PAUSE).await;
            }
        });
    }

    /// Waits until the metadata server has answered a question, at most for `pause`.
    pub(crate) async fn learned_within(&self, pause: Duration) {
        // Either is as good: the caller looks again.
        let _ = tokio::time::timeout(pause, self.learned.notified()).await;
    }

    fn take_wanted(&self) -> Option<Vec<CopysetId>> {
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        asking.running = !asking.wanted.is_empty();
        asking.running.then(|| asking.wanted.drain().collect())
    }

    // Every change of the table leaves it usable at each step, so a poisoned lock is taken all the same.
    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
