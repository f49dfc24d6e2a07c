//! What `spline dev` runs in its own process: metadata server, chunkservers, gateway.
//!
//! Called by `dev`. Knows the parts' configs. Must not know what the parts do.

use super::state::{CHUNKSERVERS, DevDir};
use crate::mds::MdsClient;
use anyhow::{Context, bail};
use prometheus_client::registry::Registry;
use serde::de::DeserializeOwned;
use serde_json::json;
use spline_chunkserver::Chunkserver;
use spline_gateway::Gateway;
use spline_mds::Mds;
use spline_process::metrics::{self, Endpoint};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

/// How often the cluster is asked whether it is ready.
const ASK_EVERY: Duration = Duration::from_millis(25);

/// Why a part can not go on, once it can not.
type Wait<'a> = Pin<Box<dyn Future<Output = String> + 'a>>;

/// The running parts.
pub struct Parts {
    mds: Mds,
    chunkservers: Vec<Chunkserver>,
    gateway: Gateway,
    _metrics: Vec<Endpoint>,
}

impl Parts {
    /// Starts all parts; answers when each listens.
    ///
    /// # Errors
    /// Which part could not be started, and why.
    pub async fn start(dir: &DevDir, copysets: u32) -> anyhow::Result<Self> {
        let state = dir.state();
        let mut pages = Pages { addresses: state.metrics.iter().copied(), endpoints: Vec::new() };

        let mut registry = Registry::default();
        let settings = json!({
            "data_dir": dir.data("mds")?, "listen": state.mds, "copysets": copysets,
        });
        let mds = Mds::start(config(settings)?, &mut registry)
            .await
            .context("can not start the metadata server")?;
        pages.serve(registry)?;

        let mut chunkservers = Vec::new();
        for (chunkserver, registry) in start_chunkservers(dir).await? {
            chunkservers.push(chunkserver);
            pages.serve(registry)?;
        }

        let mut registry = Registry::default();
        let settings = json!({
            "id": "dev", "link_socket": dir.gateway_socket(), "admin_listen": state.gateway, "mds": [state.mds],
        });
        let gateway =
            Gateway::start(config(settings)?, &mut registry).await.context("can not start the gateway")?;
        pages.serve(registry)?;
        Ok(Self { mds, chunkservers, gateway, _metrics: pages.endpoints })
    }

    /// Waits until a part can not go on, and says which and why.
    pub async fn failed(&self) -> String {
        let mds: Wait<'_> = Box::pin(async { format!("metadata server: {}", self.mds.failed().await) });
        let chunkservers = self.chunkservers.iter().map(|chunkserver| -> Wait<'_> {
            Box::pin(
                async move { format!("chunkserver={}: {}", chunkserver.id(), chunkserver.failed().await) },
            )
        });
        let mut waits: Vec<_> = std::iter::once(mds).chain(chunkservers).collect();
        poll_fn(|context| {
            let mut polls = waits.iter_mut().map(|wait| wait.as_mut().poll(context));
            polls.find(Poll::is_ready).unwrap_or(Poll::Pending)
        })
        .await
    }

    /// Stops all parts, from the guest's side down.
    pub async fn shutdown(self) {
        self.gateway.shutdown().await;
        for chunkserver in self.chunkservers {
            chunkserver.shutdown().await;
        }
        self.mds.shutdown().await;
    }
}

/// Starts the chunkservers at once: each reads its whole log first.
async fn start_chunkservers(dir: &DevDir) -> anyhow::Result<Vec<(Chunkserver, Registry)>> {
    let state = dir.state();
    let mut starting = Vec::new();
    for (at, listen) in state.chunkservers.iter().enumerate() {
        let number = at + 1;
        let settings = json!({
            "data_dir": dir.data(&format!("chunkserver{number}"))?, "listen": listen,
            "zone": format!("z{number}"), "mds": [state.mds], "spare_chunks": 2, "log_segment": "32M",
        });
        let config: spline_chunkserver::Config = config(settings)?;
        starting.push(tokio::spawn(async move {
            let mut registry = Registry::default();
            let started = Chunkserver::start(config, &mut registry).await;
            let started = started.with_context(|| format!("can not start a chunkserver: number={number}"));
            started.map(|chunkserver| (chunkserver, registry))
        }));
    }
    let mut started = Vec::new();
    for chunkserver in starting {
        started.push(chunkserver.await.context("a start panicked")??);
    }
    Ok(started)
}

/// Metrics pages, one address after the other.
struct Pages<I> {
    addresses: I,
    endpoints: Vec<Endpoint>,
}

impl<I: Iterator<Item = SocketAddr>> Pages<I> {
    fn serve(&mut self, registry: Registry) -> anyhow::Result<()> {
        let address = self.addresses.next().context("no address left for metrics")?;
        self.endpoints
            .push(metrics::serve(address, registry).with_context(|| format!("metrics: address={address}"))?);
        Ok(())
    }
}

/// A part's config: its defaults, with `settings` on top.
fn config<T: DeserializeOwned>(settings: serde_json::Value) -> anyhow::Result<T> {
    serde_json::from_value(settings).context("a part refuses its settings")
}

/// Waits until every copyset has a leader.
///
/// # Errors
/// What is missing once `limit` has passed.
pub async fn wait_until_led(mds: &MdsClient, limit: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let status = mds.status().await?;
        let up = status.chunkservers.iter().filter(|server| server.state == "up").count();
        let led = status.copysets.iter().filter(|copyset| copyset.leader.is_some()).count();
        if up >= CHUNKSERVERS && !status.copysets.is_empty() && led == status.copysets.len() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("cluster is not ready: chunkservers={up} copysets={} led={led}", status.copysets.len());
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}
