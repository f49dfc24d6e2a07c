//! The network as `volume` and `route` see it. Must never know retries or sessions.

mod chunk;
mod mds;

use crate::client::ClientConfig;
use crate::meta::{MetaError, RouteUpdate};
use crate::metrics::Metrics;
use crate::retry::Outcome;
use bytes::Bytes;
use spline_types::{ChunkCommand, CopysetId};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// What the cores ask of the network; tests put a scripted one in its place.
pub(crate) trait Network: Send + Sync + 'static {
    /// One attempt at one chunkserver, over at `deadline`.
    fn attempt(
        &self,
        to: SocketAddr,
        command: &ChunkCommand,
        payload: Vec<Bytes>,
        deadline: Instant,
    ) -> impl Future<Output = Outcome> + Send;

    /// Where copysets are.
    fn routes(&self, copysets: &[CopysetId]) -> impl Future<Output = Result<RouteUpdate, MetaError>> + Send;
}

/// The real network: wire to chunkservers, gRPC to metadata servers.
pub(crate) struct Transport {
    chunks: chunk::Chunkservers,
    pub(crate) mds: mds::Mds,
}

impl Transport {
    pub(crate) fn new(config: &ClientConfig, metrics: Arc<Metrics>) -> Self {
        Self { chunks: chunk::Chunkservers::default(), mds: mds::Mds::new(config, metrics) }
    }

    /// Connects to chunkservers, all at once, at most for `limit`.
    pub(crate) async fn connect(&self, addresses: HashSet<SocketAddr>, limit: Duration) {
        let deadline = Instant::now() + limit;
        let connects = addresses.into_iter().map(|address| self.chunks.connect(address, deadline));
        futures_util::future::join_all(connects).await;
    }
}

impl Network for Transport {
    async fn attempt(
        &self,
        to: SocketAddr,
        command: &ChunkCommand,
        payload: Vec<Bytes>,
        deadline: Instant,
    ) -> Outcome {
        self.chunks.attempt(to, command, payload, deadline).await
    }

    async fn routes(&self, copysets: &[CopysetId]) -> Result<RouteUpdate, MetaError> {
        self.mds.routes(copysets).await
    }
}
