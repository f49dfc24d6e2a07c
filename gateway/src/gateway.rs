//! A running gateway: started from a config, shut down with a drain, or replaced by another process of its own.
//!
//! Called by `main` and `spline dev`. Several in one process do not disturb each other.

use crate::buffer::BufferPool;
use crate::config::Config;
use crate::engine::Engines;
use crate::link::{LaneThreads, Links};
use crate::listener::Listener;
use crate::metrics::Metrics;
use crate::registry::{Registry, SessionLimits};
use crate::service::{Admin, Service};
use crate::upgrade::{
    Course, Expendable, HandOver, Launch, Outcome, Passing, Predecessor, Reopening, Sockets, stop_successor,
};
use crate::watchdog;
use anyhow::Context;
use spline_process::watchdog::Watchdog;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// What a link's end may take beyond the drain limit: a farewell and a few wakes.
const LINK_END_MARGIN: Duration = Duration::from_secs(1);
/// Time for engines to end what runs and give their volumes back; the metadata server may be away.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// Time for the last answers of the administration service.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

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
    /// Of one that can be replaced: what became of that.
    replaced: watch::Receiver<Option<Outcome>>,
    course: Arc<Course>,
}

/// What a gateway is made of before it listens.
struct Parts {
    config: Config,
    id: String,
    registry: Arc<Registry>,
    links: Arc<Links>,
    leaving: CancellationToken,
}

impl Parts {
    fn new(config: Config, metrics: &mut prometheus_client::registry::Registry) -> Self {
        let id = config.effective_id();
        let leaving = CancellationToken::new();
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
        let links = Arc::new(Links {
            registry: Arc::clone(&registry),
            metrics: counts,
            buffers,
            drain_limit: config.drain_limit,
            threads: LaneThreads::new(config.stay_on_processor),
        });
        Self { config, id, registry, links, leaving }
    }

    /// Serves. With `launch`, it can be replaced; `metrics` is where its metrics page listens, which goes over too.
    fn serve(
        self,
        listener: Listener,
        admin: Option<Admin>,
        launch: Option<Launch>,
        metrics: Option<&TcpListener>,
    ) -> anyhow::Result<Gateway> {
        let Self { config, id, registry, links: shared, leaving } = self;
        let (gone, committed) = (CancellationToken::new(), CancellationToken::new());
        let (outcome, replaced) = watch::channel(None);
        let (links, servers) = (TaskTracker::new(), TaskTracker::new());
        let course = Arc::new(Course::default());
        let hand_over = match launch {
            None => None,
            Some(launch) => Some(Arc::new(HandOver {
                launch,
                id: id.clone(),
                link_socket: config.link_socket.display().to_string(),
                admin_listen: config.admin_listen.map(|address| address.to_string()).unwrap_or_default(),
                metrics_listen: config.metrics_listen.map(|address| address.to_string()).unwrap_or_default(),
                passing: Passing {
                    links: listener.pass()?,
                    admin: admin.as_ref().map(Admin::pass).transpose()?,
                    metrics: metrics.map(|socket| socket.try_clone().map(OwnedFd::from)).transpose()?,
                },
                registry: Arc::clone(&registry),
                metrics: Arc::clone(&shared.metrics),
                upgrade_limit: config.upgrade_limit,
                drain_limit: config.drain_limit,
                leaving: leaving.clone(),
                committed: committed.clone(),
                course: Arc::clone(&course),
                outcome,
                reopening: Reopening::new(Arc::clone(&shared), links.clone(), leaving.clone()),
                one: tokio::sync::Mutex::default(),
                links: AtomicU32::new(0),
            })),
        };
        let link_path = listener.path().to_owned();
        servers.spawn(listener.run(shared, links.clone(), leaving.clone(), committed.clone()));
        let admin_address = admin.as_ref().map(Admin::address);
        if let Some(admin) = admin {
            let service = Service::new(id.clone(), Arc::clone(&registry), hand_over);
            servers.spawn(admin.serve(service, [gone.clone(), committed]));
        }
        if let Some(watched) = Watchdog::of_environment() {
            servers.spawn(watchdog::feed(watched, Arc::clone(&registry), gone.clone()));
        }
        info!(id, link_socket = %link_path.display(), "gateway serves");
        let drain_limit = config.drain_limit;
        Ok(Gateway {
            id,
            link_path,
            admin_address,
            drain_limit,
            registry,
            leaving,
            gone,
            links,
            servers,
            replaced,
            course,
        })
    }
}

impl Gateway {
    /// Starts serving; registers its metrics. Must be called within a tokio runtime with time and IO. It can not be replaced by
    /// another process.
    ///
    /// # Errors
    /// If the config is wrong or an address can not be listened on; the message names it.
    #[allow(clippy::unused_async, reason = "starting is async for every process of Spline")]
    pub async fn start(
        config: Config,
        metrics: &mut prometheus_client::registry::Registry,
    ) -> anyhow::Result<Self> {
        config.check().map_err(anyhow::Error::msg)?;
        let listener = Listener::bind(&config.link_socket)?;
        let admin = config.admin_listen.map(Admin::bind).transpose()?;
        Parts::new(config, metrics).serve(listener, admin, None, None)
    }

    /// As [`start`](Self::start), as a process of its own, that can be replaced by another one. Also answers where its metrics
    /// page is to be served.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    #[allow(clippy::unused_async, reason = "starting is async for every process of Spline")]
    pub async fn start_as_process(
        config: Config,
        launch: Launch,
        metrics: &mut prometheus_client::registry::Registry,
    ) -> anyhow::Result<(Self, Option<TcpListener>)> {
        config.check().map_err(anyhow::Error::msg)?;
        let listener = Listener::bind(&config.link_socket)?;
        let admin = config.admin_listen.map(Admin::bind).transpose()?;
        let page = config.metrics_listen.map(bind_metrics).transpose()?;
        let gateway = Parts::new(config, metrics).serve(listener, admin, Some(launch), page.as_ref())?;
        Ok((gateway, page))
    }

    /// Takes over from another process of this gateway: its sockets, its sessions, and in the end its place.
    ///
    /// # Errors
    /// Why it can not; the other process serves on.
    pub async fn take_over(
        config: Config,
        launch: Launch,
        predecessor: Predecessor,
        metrics: &mut prometheus_client::registry::Registry,
    ) -> anyhow::Result<(Self, Option<TcpListener>)> {
        let expendable = Expendable::begin();
        let successor = predecessor.channel()?;
        config.check().map_err(anyhow::Error::msg)?;
        let parts = Parts::new(config, metrics);
        let (sockets, entering) = successor.prepare(&parts.config, &parts.registry).await?;
        // There is no way back from here.
        drop(expendable);
        sockets.take_log();
        let Sockets { links, admin, metrics: page, .. } = sockets;
        let listener = Listener::adopt(&parts.config.link_socket, links)?;
        let admin = admin.map(Admin::over).transpose()?;
        let links = Arc::clone(&parts.links);
        let gateway = parts.serve(listener, admin, Some(launch), page.as_ref())?;
        successor.enter(entering, &links, &gateway.links).await;
        Ok((gateway, page))
    }

    /// Waits until another process serves in this one's place; answers false if it does not, and this one can not any more.
    /// Afterwards nothing is left to do but to end, without [`shutdown`](Self::shutdown). For ever, if that does not happen.
    pub async fn replaced(&self) -> bool {
        let mut replaced = self.replaced.clone();
        let outcome = replaced.wait_for(Option::is_some).await.ok().and_then(|outcome| *outcome);
        let Some(outcome) = outcome else { return std::future::pending().await };
        // The command that asked for it is to be answered still.
        self.servers.close();
        let told = async {
            self.gone.cancel();
            self.servers.wait().await;
        };
        if tokio::time::timeout(ANSWER_LIMIT, told).await.is_err() {
            warn!("whoever asked for the upgrade has not taken the answer");
        }
        matches!(outcome, Outcome::Replaced { .. })
    }

    /// This process is told to stop. `None` if it is to [shut down](Self::shutdown), which gives up an upgrade that is not
    /// committed. Otherwise another process serves in its place, or is about to: that one is told to stop, and has stopped when
    /// this answers what [`replaced`](Self::replaced) does.
    pub async fn stops(&self) -> Option<bool> {
        if self.course.stops() {
            return None;
        }
        info!("a stop comes in the middle of an upgrade, the new process is told");
        let replaced = self.replaced().await;
        let outcome = *self.replaced.borrow();
        if let Some(Outcome::Replaced { pid }) = outcome {
            let limit = self.drain_limit + LINK_END_MARGIN + CLOSE_LIMIT + ANSWER_LIMIT;
            if let Err(error) = stop_successor(pid, limit).await {
                warn!(pid, %error, "the new process does not stop");
            }
        }
        Some(replaced)
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

fn bind_metrics(listen: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(listen).with_context(|| format!("can not listen: metrics_listen={listen}"))
}
