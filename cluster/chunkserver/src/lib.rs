//! The chunkserver: keeps replicas of chunks on one disk and serves them to gateways.
//!
//! Knows: chunk files, copysets, the fence, the wire protocol, the raft adapter's traits, the metadata server's
//! heartbeat. Must never know: guests, exports, volumes' names, openraft, how the metadata server decides.
//!
//! Modules in the order in which a request meets them: [`service`] (the wire listener) → [`copysets`] → [`copyset`]
//! (early refusal, proposals, leased reads, [`mend`], [`successor`]) → [`command`] (as logged) → [`state_machine`] →
//! [`fence`] → [`store`] (chunk files). Beside the route: [`heartbeat`], [`identity`], [`config`], [`metrics`].

pub mod command;
pub mod config;
pub mod copyset;
pub mod copysets;
pub mod fence;
pub mod heartbeat;
pub mod identity;
pub mod mend;
pub mod metrics;
pub mod service;
pub mod state_machine;
pub mod store;
pub mod successor;

pub use config::Config;

use anyhow::Context;
use copyset::{ServerState, node_of};
use copysets::{Copysets, count_chunk_files};
use heartbeat::Heartbeat;
use heartbeat::transport::{MdsClient, RegisterError};
use identity::DataDir;
use metrics::Metrics;
use prometheus_client::registry::Registry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use service::Service;
use spline_raft::wal::WalError;
use spline_raft::{RaftConfig, RaftError, RaftHost, WalConfig};
use spline_types::ChunkserverId;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use store::{Disk, Pool};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Pause between two attempts to register a new directory.
const REGISTER_PAUSE: Duration = Duration::from_millis(500);
/// How long a shutdown waits for requests that run.
const DRAIN: Duration = Duration::from_secs(2);

/// A running chunkserver.
pub struct Chunkserver {
    address: SocketAddr,
    id: ChunkserverId,
    copysets: Arc<Copysets>,
    stop: CancellationToken,
    tasks: TaskTracker,
    /// Unlocks the data directory when all else has stopped.
    _data: DataDir,
}

impl Chunkserver {
    /// Starts on `config.data_dir` and returns when it serves. Replicas found on disk serve at once, whether a metadata
    /// server answers or not; only a new directory waits for one, to get its id.
    ///
    /// # Errors
    /// If the directory is in use, of another version or can not be read, or the listener or the log can not be opened.
    pub async fn start(config: Config, registry: &mut Registry) -> anyhow::Result<Self> {
        raise_file_limit();
        let mut data = DataDir::open(&config.data_dir)?;
        let listen = config.listen()?;
        let listener =
            TcpListener::bind(listen).await.with_context(|| format!("could not listen on {listen}"))?;
        let address = listener.local_addr()?;
        let advertise = config.advertise(address)?;
        let mut mds = MdsClient::new(config.mds.clone());

        let (id, host) = open_log(&config, &mut data, advertise, &mut mds, registry).await?;
        let book = heartbeat::load_book(&config.data_dir);
        host.set_addresses(book.clone());
        let metrics = Arc::new(Metrics::register(registry));
        let disk = open_disk(&config, &metrics)?;
        let server = Arc::new(ServerState::new(host.clone()));
        server.book.store(Arc::new(book));
        let dir = config.data_dir.join("copysets");
        let copysets = Copysets::new(host, disk, Arc::clone(&server), Arc::clone(&metrics), dir);
        copysets.start_found().await?;
        let copysets = Arc::new(copysets);

        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let service = Service {
            copysets: Arc::clone(&copysets),
            metrics: Arc::clone(&metrics),
            stop: stop.clone(),
            tasks: tasks.clone(),
        };
        tasks.spawn(Arc::new(service).run(listener));
        let heartbeat = Heartbeat {
            id,
            address: advertise,
            data_dir: config.data_dir,
            copysets: Arc::clone(&copysets),
            server,
            metrics,
            stop: stop.clone(),
            tasks: tasks.clone(),
        };
        tasks.spawn(heartbeat.run(mds));
        tracing::info!(chunkserver = %id, %address, "chunkserver serves");
        Ok(Self { address, id, copysets, stop, tasks, _data: data })
    }

    /// Where the wire listener is bound.
    pub fn wire_address(&self) -> SocketAddr {
        self.address
    }

    /// The id that the metadata server gave to the data directory.
    pub fn id(&self) -> ChunkserverId {
        self.id
    }

    /// Waits until this chunkserver can not go on, and says why: its log has failed, so that its replicas have stopped
    /// for good. The process should end; a new start recovers what the log holds.
    pub async fn failed(&self) -> String {
        let why = self.copysets.host().failed().await;
        format!("write-ahead log failed: {why}")
    }

    /// Stops serving, steps down, checkpoints the copysets for a bounded time and syncs the log.
    pub async fn shutdown(self) {
        self.stop.cancel();
        self.copysets.stop();
        self.tasks.close();
        if tokio::time::timeout(DRAIN, self.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.tasks.len(), "stopping although requests still run");
        }
        self.copysets.host().shutdown().await;
        self.copysets.disk().pool.stop();
    }
}

/// Opens the log under the directory's id. A log that is damaged inside means that promises may be lost: the whole
/// directory is set aside, and a new one starts under a new id for the peers to fill.
async fn open_log(
    config: &Config,
    data: &mut DataDir,
    address: SocketAddr,
    mds: &mut MdsClient,
    registry: &mut Registry,
) -> anyhow::Result<(ChunkserverId, RaftHost)> {
    let id = register(config, data, address, mds).await?;
    match RaftHost::open(raft_config(config, id)?, registry).await {
        Ok(host) => return Ok((id, host)),
        Err(error) if is_corrupt(&error) => {
            let to = data.quarantine()?;
            let to = to.display();
            tracing::error!(%error, %to, "log is damaged inside: data set aside, replicas will be copied from peers");
        }
        Err(error) => return Err(error).context("could not open the log"),
    }
    let id = register(config, data, address, mds).await?;
    let host =
        RaftHost::open(raft_config(config, id)?, registry).await.context("could not open a new log")?;
    Ok((id, host))
}

fn is_corrupt(error: &RaftError) -> bool {
    let RaftError::Io(error) = error else { return false };
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<WalError>());
    matches!(inner, Some(WalError::Corrupt { .. }))
}

/// The directory's id; a new directory asks for one until it gets it, or is refused for good.
async fn register(
    config: &Config,
    data: &mut DataDir,
    address: SocketAddr,
    mds: &mut MdsClient,
) -> anyhow::Result<ChunkserverId> {
    let election_max_ms = config.election_max_ms;
    if let Some(id) = data.id(election_max_ms)? {
        return Ok(id);
    }
    let address = address.to_string();
    let mut told = false;
    loop {
        match mds.register(&address, &config.zone, &data.identity.store_uuid, election_max_ms).await {
            Ok((id, cluster)) => {
                data.registered(id, &cluster, election_max_ms)?;
                tracing::info!(chunkserver = %id, cluster, "registered with the metadata server");
                return Ok(id);
            }
            Err(error @ RegisterError::Refused(_)) => return Err(error.into()),
            Err(error) if !told => {
                told = true;
                tracing::warn!(%error, mds = ?config.mds, "new data directory waits for a metadata server");
            }
            Err(_) => {}
        }
        tokio::time::sleep(REGISTER_PAUSE).await;
    }
}

fn raft_config(config: &Config, id: ChunkserverId) -> anyhow::Result<RaftConfig> {
    let dir = config.data_dir.join("raft");
    std::fs::create_dir_all(&dir).with_context(|| format!("could not create path={}", dir.display()))?;
    Ok(RaftConfig {
        heartbeat: config.raft_heartbeat(),
        election_min: Duration::from_millis(config.election_min_ms),
        election_max: Duration::from_millis(config.election_max_ms),
        checkpoint_log_bytes: config.checkpoint_log()?,
        snapshot_bytes_per_second: config.snapshot_rate()?,
        wal: WalConfig { segment_bytes: config.log_segment()?, ..WalConfig::default() },
        ..RaftConfig::new(dir, node_of(id))
    })
}

fn open_disk(config: &Config, metrics: &Metrics) -> anyhow::Result<Arc<Disk>> {
    let used = count_chunk_files(&config.data_dir.join("copysets"))?;
    let dir = config.data_dir.join("pool");
    let pool = Pool::open(&dir, config.spare_chunks as usize, config.capacity()?, used);
    let pool = pool.with_context(|| format!("could not open the pool: path={}", dir.display()))?;
    Ok(Disk::new(pool, config.open_chunks as usize, metrics.checksum_errors.clone()))
}

/// Each open chunk is a file: lets the process have as many as it may.
fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum && setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_err() {
        tracing::warn!(?current, ?maximum, "could not raise the limit of open files");
    }
}
