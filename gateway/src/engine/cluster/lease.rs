//! Renews the leases of all sessions of a gateway with one call, and learns from the answer which are lost and which
//! volumes have grown. With the metadata server away everything goes on: a chunkserver, not a clock, says when a
//! session is over (`one_writer`).
//!
//! Called by the cluster engine.

use super::Volume;
use spline_client::{ClusterClient, MetaError, Renewal, SessionState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Renewals per lease: two may be lost.
const RENEWALS_PER_LEASE: u32 = 3;
/// Shortest time between renewals, whatever the lease says.
const PERIOD_MIN: Duration = Duration::from_millis(100);

/// The sessions to renew.
pub(super) struct Leases {
    client: ClusterClient,
    gateway: String,
    table: Mutex<Table>,
    /// The table has its first session.
    filled: Notify,
    stopped: CancellationToken,
    /// Renewals asked for so far: their answers may overtake each other.
    asked: AtomicU64,
}

#[derive(Default)]
struct Table {
    volumes: Vec<Weak<Volume>>,
    /// Shortest lease heard of.
    lease: Option<Duration>,
}

impl Leases {
    /// Starts the renewals.
    pub(super) fn start(client: ClusterClient, gateway: String) -> Arc<Self> {
        let (table, filled, stopped) = (Mutex::default(), Notify::new(), CancellationToken::new());
        let asked = AtomicU64::new(0);
        let leases = Arc::new(Self { client, gateway, table, filled, stopped, asked });
        tokio::spawn(Arc::clone(&leases).run());
        leases
    }

    pub(super) fn stop(&self) {
        self.stopped.cancel();
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, volume: &Arc<Volume>, lease: Duration) {
        let mut table = self.table();
        table.volumes.push(Arc::downgrade(volume));
        table.lease = Some(table.lease.map_or(lease, |known| known.min(lease)));
        self.filled.notify_one();
    }

    pub(super) fn remove(&self, volume: &Arc<Volume>) {
        self.table().volumes.retain(|known| !std::ptr::eq(known.as_ptr(), Arc::as_ptr(volume)));
    }

    /// The sessions that are still held, and how long to wait before their next renewal.
    fn held(&self) -> (Vec<Arc<Volume>>, Duration) {
        let table = self.table();
        let held = table.volumes.iter().filter_map(Weak::upgrade);
        let held = held.filter(|volume| !volume.standing.borrow().lost).collect();
        (held, table.lease.unwrap_or_default() / RENEWALS_PER_LEASE)
    }

    async fn run(self: Arc<Self>) {
        let mut away = false;
        loop {
            // Sessions are not kept over the pause: they may end meanwhile.
            let (idle, period) = {
                let (held, period) = self.held();
                (held.is_empty(), period)
            };
            let pause = async {
                match idle {
                    true => self.filled.notified().await,
                    false => tokio::time::sleep(period.max(PERIOD_MIN)).await,
                }
            };
            tokio::select! {
                () = pause => {}
                () = self.stopped.cancelled() => return,
            }
            let (held, _) = self.held();
            if held.is_empty() {
                continue;
            }
            match self.renew(&held).await {
                Ok(()) => {
                    if std::mem::take(&mut away) {
                        info!(sessions = held.len(), "leases are renewed again");
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut away, true) {
                        warn!(%error, sessions = held.len(), "leases can not be renewed; io goes on");
                    }
                }
            }
        }
    }

    /// Renews the leases of some sessions now; those that are lost are told so.
    ///
    /// # Errors
    /// If no metadata server answers.
    pub(super) async fn renew(&self, held: &[Arc<Volume>]) -> Result<(), MetaError> {
        let sessions: Vec<_> = held.iter().map(|volume| (volume.id, volume.epoch())).collect();
        let number = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        let renewal = self.client.renew(&self.gateway, &sessions).await?;
        self.table().lease = Some(renewal.lease);
        apply(held, &renewal, number);
        Ok(())
    }
}

/// Tells each session what a renewal says of it. `number` orders renewals by when they were asked for. A volume may be held
/// twice: opened anew under another name while the session of the old name has not heard that it is lost.
fn apply(held: &[Arc<Volume>], renewal: &Renewal, number: u64) {
    for renewed in &renewal.sessions {
        let asked = |volume: &&Arc<Volume>| volume.id == renewed.volume && volume.epoch() == renewed.epoch;
        let Some(volume) = held.iter().find(asked) else { continue };
        match &renewed.state {
            SessionState::Alive { size, name } => {
                volume.resized(*size);
                volume.renamed(name, number);
            }
            SessionState::Lost => volume.outlived(),
        }
    }
}

#[cfg(test)]
mod tests;
