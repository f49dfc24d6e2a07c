//! The metadata server: volumes, sessions, where chunks lie, and the schedulers that keep them replicated.
//!
//! Knows: volumes and their segments, gateways' sessions and leases, chunkservers, copysets, placement, operators.
//! Must never know: the data plane, chunk contents, how raft or a chunkserver works, who mounts a volume.
//!
//! Modules in the order in which a request meets them: [`service`] → [`volume`], [`session`], [`cluster`] (over
//! [`context`]: [`lease`], [`topology`], [`placement`], [`scheduler`]) → [`ledger`] → [`command`] → [`machine`] →
//! [`state`] → [`store`]; [`refusal`] is what any of them may answer, [`metrics`] what they count, [`config`] how they
//! run.
//!
//! Invariants: `one_writer` (a session is a compare-and-swap of the volume's epoch in replicated state),
//! `replicas_identical` (`apply` is pure), `bounded` (every list that a request can grow has a limit).

pub mod cluster;
pub mod command;
pub mod config;
pub mod context;
mod json;
pub mod lease;
pub mod ledger;
pub mod machine;
pub mod metrics;
pub mod placement;
pub mod refusal;
pub mod scheduler;
pub mod service;
pub mod session;
pub mod state;
pub mod store;
pub mod topology;
pub mod volume;

pub use config::Config;

use anyhow::{Context as _, bail};
use cluster::Cluster;
use command::Command;
use context::Context;
use ledger::Ledger;
use machine::Machine;
use metrics::Metrics;
use prometheus_client::registry::Registry;
use service::Service;
use spline_raft::{Group, GroupId, NodeId, ProposeError, RaftConfig, RaftHost};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::Store;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;

/// The one raft group of the metadata.
const GROUP: GroupId = GroupId(1);
/// This node. The group has one member so far.
const NODE: NodeId = NodeId(1);
/// How long a start waits until the group leads; a group of one needs one election.
const LEAD_LIMIT: Duration = Duration::from_secs(30);
/// How often a start looks whether the group leads.
const LEAD_POLL: Duration = Duration::from_millis(5);
/// Bytes of a log segment: commands are small and few.
const LOG_SEGMENT_BYTES: u64 = 8 << 20;
/// Log bytes after which a checkpoint is recorded, which is cheap here.
const CHECKPOINT_LOG_BYTES: u64 = 4 << 20;
/// How often the schedulers look.
const TICK: Duration = Duration::from_millis(500);
/// How long a shutdown waits for requests in progress.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// A running metadata server.
pub struct Mds {
    address: SocketAddr,
    host: RaftHost,
    group: Group,
    stop: watch::Sender<bool>,
    serving: JoinHandle<()>,
    ticking: JoinHandle<()>,
}

impl Mds {
    /// Opens or creates the data directory and returns when the services answer.
    ///
    /// # Errors
    /// What did not fit or could not be opened; if another process has the directory open; if its raft log is
    /// missing although the tables are there.
    pub async fn start(config: Config, registry: &mut Registry) -> anyhow::Result<Mds> {
        config.check().map_err(anyhow::Error::msg)?;
        let listener = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("can not listen for metadata requests: listen={}", config.listen))?;
        let address = listener.local_addr()?;
        let metrics = Metrics::new(registry);
        let (host, group, ledger) = open(&config.data_dir, &metrics, registry).await?;
        found(&ledger).await?;
        let context = Arc::new(Context::new(ledger, config, metrics));
        let cluster = Cluster::new(Arc::clone(&context));
        let (stop, stopped) = watch::channel(false);
        let service = Service::new(context, cluster.clone());
        let serving = tokio::spawn(serve(listener, service, stopped.clone()));
        let ticking = tokio::spawn(tick(cluster, stopped));
        tracing::info!(%address, "metadata server is ready");
        Ok(Mds { address, host, group, stop, serving, ticking })
    }

    /// Where the gRPC services listen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until this server can not go on, and says why: its log or its tables have failed, so that nothing can be changed
    /// or looked up any more. The process should end; a new start recovers what the log holds.
    pub async fn failed(&self) -> String {
        tokio::select! {
            // A log that fails stops the group as well: it is the cause.
            biased;
            why = self.host.failed() => format!("write-ahead log failed: {why}"),
            why = self.group.stopped() => format!("metadata group has stopped: {why}"),
        }
    }

    /// Stops serving, within a limit, and closes the log and the tables.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        let aborter = self.serving.abort_handle();
        if tokio::time::timeout(DRAIN_LIMIT, self.serving).await.is_err() {
            aborter.abort();
        }
        if let Err(error) = self.ticking.await {
            tracing::error!(%error, "scheduler task failed");
        }
        self.host.shutdown().await;
    }
}

/// Opens tables and log, starts the group and waits until it leads.
async fn open(
    dir: &Path,
    metrics: &Metrics,
    registry: &mut Registry,
) -> anyhow::Result<(RaftHost, Group, Ledger)> {
    let raft_dir = dir.join("raft");
    std::fs::create_dir_all(&raft_dir)
        .with_context(|| format!("can not create the data directory: data_dir={}", dir.display()))?;
    let store = Arc::new(Store::open(&dir.join("meta.redb"))?);
    let machine = Machine::load(store, metrics.apply.clone())?;
    let state = machine.state();
    let is_new = machine.applied().is_none();
    let mut raft = RaftConfig::new(raft_dir, NODE);
    // Nobody else votes, so an election is a matter of this process only.
    raft.heartbeat = Duration::from_millis(100);
    raft.election_min = Duration::from_millis(200);
    raft.election_max = Duration::from_millis(300);
    raft.checkpoint_log_bytes = CHECKPOINT_LOG_BYTES;
    raft.wal.segment_bytes = LOG_SEGMENT_BYTES;
    raft.wal.spare_segments = 1;
    let host = RaftHost::open(raft, registry).await?;
    let group = host.start_group(GROUP, machine).await?;
    if is_new {
        group.bootstrap(&[NODE]).await?;
    } else if group.status().voters.is_empty() {
        host.shutdown().await;
        bail!(
            "the raft log is missing but the tables are not, restore data_dir from a backup as a whole: data_dir={}",
            dir.display()
        );
    }
    lead(&group).await?;
    Ok((host, group.clone(), Ledger::new(group, state)))
}

/// Waits until everything that was ever answered is applied here.
async fn lead(group: &Group) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        match group.read_lease().await {
            Ok(_) => return Ok(()),
            Err(ProposeError::Stopped) => bail!("the metadata group has stopped: {}", group.stopped().await),
            Err(error) if start.elapsed() > LEAD_LIMIT => {
                bail!("the metadata group has no leader: waited={LEAD_LIMIT:?} error={error}")
            }
            Err(_) => tokio::time::sleep(LEAD_POLL).await,
        }
    }
}

/// Names the cluster if it has no name yet.
async fn found(ledger: &Ledger) -> anyhow::Result<()> {
    if ledger.peek(|state| state.cluster().is_empty()) {
        let cluster = format!("{:032x}", rand::random::<u128>());
        ledger.propose(Command::Found { cluster }).await?;
    }
    Ok(())
}

async fn serve(listener: TcpListener, service: Service, mut stopped: watch::Receiver<bool>) {
    let stop = async move {
        // An error means that the handle was dropped: stop as well.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let incoming = TcpListenerStream::new(listener);
    if let Err(error) = service.router().serve_with_incoming_shutdown(incoming, stop).await {
        tracing::error!(%error, "metadata services failed");
    }
}

async fn tick(cluster: Cluster, mut stopped: watch::Receiver<bool>) {
    // A tick is due whenever the wait for the end runs out.
    while tokio::time::timeout(TICK, stopped.wait_for(|stopped| *stopped)).await.is_err() {
        cluster.tick().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use spline_raft::LogCommand;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_group_that_stops_ends_the_server_and_its_next_start() {
        let dir = tempfile::tempdir().expect("tempdir");
        let config = || Config {
            data_dir: dir.path().to_path_buf(),
            listen: ([127, 0, 0, 1], 0).into(),
            ..Config::default()
        };
        let mds = Mds::start(config(), &mut Registry::default()).await.expect("starts");
        assert!(tokio::time::timeout(2 * TICK, mds.failed()).await.is_err(), "all is well");
        // What a newer version may leave in the log: it can not be applied, so the group stops.
        let strange =
            LogCommand { meta: Bytes::from_static(br#"{"v":999,"command":"x"}"#), payload: Bytes::new() };
        mds.group.propose(strange).await.expect_err("can not be applied");
        let why = tokio::time::timeout(LEAD_LIMIT, mds.failed()).await.expect("is told");
        assert!(why.starts_with("metadata group has stopped: ") && why.contains("999"), "{why}");
        mds.shutdown().await;
        let refused = Mds::start(config(), &mut Registry::default()).await.err().expect("can not start");
        assert!(format!("{refused:#}").contains("999"), "{refused:#}");
    }
}
