//! A running gateway: started from a config, shut down with a drain.
//!
//! Called by `main` and `spline dev`. Several in one process do not disturb each other.

use crate::buffer::BufferPool;
use crate::config::Config;
use crate::engine::Engines;
use crate::link::Links;
use crate::listener::Listener;
use crate::metrics::Metrics;
use crate::registry::{Registry, SessionLimits};
use crate::service;
use crate::watchdog;
use spline_process::watchdog::Watchdog;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// What a link's end may take beyond the drain limit: a farewell and a few wakes.
const LINK_END_MARGIN: Duration = Duration::from_secs(1);
/// Time for engines to end what runs and give their volumes back; the metadata server may be away.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// A gateway that serves.
pub struct Gateway {
    id: String,
    link_path: PathBuf,
    admin_address: Option<SocketAddr>,
    drain_limit: Duration,
    registry: Arc<Registry>,
    leaving: CancellationToken,
    /// Stops the administration service, which answers while links drain.
    gone: CancellationToken,
    links: TaskTracker,
    servers: TaskTracker,
}

impl Gateway {
    /// Starts serving; registers its metrics. Must be called within a tokio runtime with time and IO.
    ///
    /// # Errors
    /// If the config is wrong or an address can not be listened on; the message names it.
    #[allow(clippy::unused_async, reason = "starting is async for every process of Spline")]
    pub async fn start(
        config: Config,
        metrics: &mut prometheus_client::registry::Registry,
    ) -> anyhow::Result<Self> {
        config.check().map_err(anyhow::Error::msg)?;
        let id = config.effective_id();
        let leaving = CancellationToken::new();
        let gone = CancellationToken::new();
        let listener = Listener::bind(&config.link_socket)?;
        let admin = config.admin_listen.map(service::bind).transpose()?;
        let buffers = BufferPool::new();
        let engines = Engines::new(&config, &id, buffers.clone(), metrics);
        let counts = Arc::new(Metrics::new(metrics));
        let limits = SessionLimits {
            requests: config.inflight_requests,
            bytes: config.inflight_bytes.0,
            grace: config.session_grace,
        };
        let registry =
            Arc::new(Registry::new(Box::new(engines), limits, Arc::clone(&counts), leaving.clone()));
        let shared = Arc::new(Links {
            registry: Arc::clone(&registry),
            metrics: counts,
            buffers,
            drain_limit: config.drain_limit,
        });
        let (links, servers) = (TaskTracker::new(), TaskTracker::new());
        let link_path = listener.path().to_owned();
        servers.spawn(listener.run(shared, links.clone(), leaving.clone()));
        let admin_address = admin.as_ref().map(service::Admin::address);
        if let Some(admin) = admin {
            servers.spawn(admin.serve(id.clone(), Arc::clone(&registry), gone.clone()));
        }
        if let Some(watched) = Watchdog::of_environment() {
            servers.spawn(watchdog::feed(watched, gone.clone()));
        }
        info!(id, link_socket = %link_path.display(), "gateway serves");
        let drain_limit = config.drain_limit;
        Ok(Self { id, link_path, admin_address, drain_limit, registry, leaving, gone, links, servers })
    }

    /// The name under which it opens sessions.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The unix socket on which it accepts links.
    pub fn link_path(&self) -> &Path {
        &self.link_path
    }

    /// Where its administration service listens.
    pub const fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// Stops with good manners: accepts nothing new, answers what ends within the drain limit, tells every nebd to
    /// replay the rest elsewhere, closes the sessions.
    pub async fn shutdown(self) {
        info!("gateway leaves");
        self.leaving.cancel();
        self.links.close();
        if tokio::time::timeout(self.drain_limit + LINK_END_MARGIN, self.links.wait()).await.is_err() {
            warn!(links = self.links.len(), "links did not end in time");
        }
        if tokio::time::timeout(CLOSE_LIMIT, self.registry.close_all()).await.is_err() {
            warn!("sessions did not close in time; their leases will run out");
        }
        self.gone.cancel();
        self.servers.close();
        self.servers.wait().await;
        info!("gateway has left");
    }
}
