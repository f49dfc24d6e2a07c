//! The client of one cluster: what all sessions of a process share. Called by the gateway's session. Must never know
//! requests of guests.

use crate::meta::{MetaError, OpenedSession, Renewal};
use crate::metrics::Metrics;
use crate::route::Routes;
use crate::transport::Transport;
use crate::volume::VolumeClient;
use prometheus_client::registry::Registry;
use spline_types::{ChunkserverId, CopysetId, Epoch, SegmentIndex, VolumeId, VolumeName};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Settings of a client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientConfig {
    /// Addresses of the metadata servers, `host:port`; asked in turn until one answers.
    pub mds: Vec<String>,
    /// How long one attempt of a span may take before another replica is tried: twice an election.
    pub attempt_timeout: Duration,
    /// Shortest pause after all replicas were tried; doubles each time, with jitter.
    pub backoff_min: Duration,
    /// Longest pause: a cluster that is back is noticed within it.
    pub backoff_max: Duration,
    /// How long one metadata server may take to answer before the next is asked.
    pub mds_timeout: Duration,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            mds: vec!["127.0.0.1:6700".into()],
            attempt_timeout: Duration::from_secs(2),
            backoff_min: Duration::from_millis(10),
            backoff_max: Duration::from_secs(1),
            mds_timeout: Duration::from_secs(3),
        }
    }
}

/// Client of one cluster; clones share connections and routes.
#[derive(Clone)]
pub struct ClusterClient {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for ClusterClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterClient").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

struct Shared {
    config: Arc<ClientConfig>,
    network: Arc<Transport>,
    routes: Arc<Routes>,
    metrics: Arc<Metrics>,
}

impl ClusterClient {
    /// A client; connects when first used.
    pub fn new(config: ClientConfig, metrics: &mut Registry) -> Self {
        let config = Arc::new(config);
        let metrics = Arc::new(Metrics::register(metrics));
        let network = Arc::new(Transport::new(&config, metrics.clone()));
        let routes = Arc::new(Routes::default());
        Self { shared: Arc::new(Shared { config, network, routes, metrics }) }
    }

    /// Takes the session of a volume for the gateway of that id, and learns the routes of all its copysets, so that
    /// IO goes on without the metadata server. With `force` it is taken from another gateway whose lease is alive. With
    /// `resumes` it is refused if another gateway had a session since that one. With `known` it is refused if the name is
    /// another volume's. With `newest` it is refused unless that is the volume's newest session.
    ///
    /// # Errors
    /// `NotFound`, `Replaced`, `Refused` (another gateway holds or held it: `Fault::Fenced`), `Unreachable`, `BadReply`.
    pub async fn open_session(
        &self,
        volume: &VolumeName,
        gateway: &str,
        force: bool,
        resumes: Option<Epoch>,
        known: Option<VolumeId>,
        newest: Option<Epoch>,
    ) -> Result<OpenedSession, MetaError> {
        let opened = self.shared.network.mds.open(volume, gateway, force, resumes, known, newest).await?;
        let copysets: HashSet<CopysetId> = opened.segments.values().flat_map(|s| s.iter().copied()).collect();
        self.learn_routes(copysets).await;
        Ok(opened)
    }

    /// Renews the leases of a gateway's sessions; those that are lost are named in the answer.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`, `BadReply`.
    pub async fn renew(&self, gateway: &str, sessions: &[(VolumeId, Epoch)]) -> Result<Renewal, MetaError> {
        self.shared.network.mds.renew(gateway, sessions).await
    }

    /// Gives a session back.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn close_session(&self, volume: VolumeId, epoch: Epoch) -> Result<(), MetaError> {
        self.shared.network.mds.close(volume, epoch).await
    }

    /// Allocates a segment, or finds it allocated; answers the copysets of its chunks, in order. Asks each metadata
    /// server once; [`VolumeClient::allocate_segment`] waits by the volume's policy.
    ///
    /// # Errors
    /// `Refused` (`Fault::Fenced`: the epoch is old; `Fault::NoSpace`), `Unreachable`, `BadReply`.
    pub async fn allocate_segment(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        index: SegmentIndex,
    ) -> Result<Arc<[CopysetId]>, MetaError> {
        let copysets = self.shared.network.mds.allocate(volume, epoch, index).await?;
        self.learn_routes(copysets.iter().copied().collect()).await;
        Ok(copysets)
    }

    /// The data path of an opened session.
    pub fn session(&self, opened: &OpenedSession) -> VolumeClient {
        let Shared { config, network, routes, metrics } = &*self.shared;
        VolumeClient::new(
            opened,
            self.clone(),
            config.clone(),
            network.clone(),
            routes.clone(),
            metrics.clone(),
        )
    }

    /// Connects to the chunkservers that lead the copysets of a session, so that its first requests need not wait for it. At
    /// most for `limit`; what can not be reached by then is the requests' to see.
    pub async fn connect(&self, opened: &OpenedSession, limit: Duration) {
        let copysets: HashSet<CopysetId> = opened.segments.values().flat_map(|s| s.iter().copied()).collect();
        let leaders = copysets.into_iter().filter_map(|copyset| self.shared.routes.target(copyset, &[]));
        let addresses: HashSet<SocketAddr> = leaders.map(|(_, address)| address).collect();
        self.shared.network.connect(addresses, limit).await;
    }

    /// Which chunkserver is believed to lead each copyset that was spoken of, at most `limit` of them.
    pub fn leaders(&self, limit: usize) -> Vec<(CopysetId, ChunkserverId)> {
        self.shared.routes.leaders(limit)
    }

    /// Believes what another client of the cluster believed.
    pub fn believe(&self, leaders: &[(CopysetId, ChunkserverId)]) {
        for (copyset, leader) in leaders {
            self.shared.routes.believe(*copyset, *leader);
        }
    }

    /// Asks for those routes that are not known. A failure is not one of the caller's: spans ask again.
    async fn learn_routes(&self, copysets: HashSet<CopysetId>) {
        let unknown = self.shared.routes.unknown(copysets);
        if !unknown.is_empty()
            && let Err(error) = self.shared.routes.learn(&*self.shared.network, &unknown).await
        {
            tracing::warn!(%error, copysets = unknown.len(), "can not ask for routes, will ask again");
        }
    }
}
