//! The chunkserver's settings: one TOML file, unknown keys refused, flags override (see `main.rs`).
//!
//! Called by `main.rs` and by whoever runs a chunkserver in its own process. Must not know: how settings are used.

use anyhow::Context;
use serde::{Deserialize, Serialize};
use spline_types::ByteSize;
use spline_types::limits::CHUNK_BYTES;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Smallest file of the log: twice the largest entry, which writes a whole chunk.
const LOG_SEGMENT_MIN: u64 = 2 * CHUNK_BYTES as u64;
/// Largest file of the log: what the log's format can address.
const LOG_SEGMENT_MAX: u64 = 1 << 30;

/// Settings of one chunkserver, which serves one data directory (one disk).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where everything is kept; one chunkserver per directory, one directory per disk.
    pub data_dir: PathBuf,
    /// Where gateways and other chunkservers connect (wire protocol), `address:port`; port 0 takes a free one.
    pub listen: String,
    /// The `address:port` that others are told; empty: the address listened on.
    pub advertise: String,
    /// Failure domain: replicas of a copyset lie in distinct zones.
    pub zone: String,
    /// Addresses (`host:port`) of the metadata servers; tried in turn.
    pub mds: Vec<String>,
    /// Bytes that chunks may take, such as `2T`; `0`: what the filesystem has.
    pub capacity: String,
    /// Where `/metrics` is served, `address:port`; empty: nowhere.
    pub metrics_listen: String,
    /// Chunk files kept preallocated, so that a first write need not wait for the filesystem.
    pub spare_chunks: u32,
    /// Open chunk files kept in memory with their checksums (17 KiB each); more only while they are dirty.
    pub open_chunks: u32,
    /// A leader tells its followers this often that it lives, milliseconds.
    pub raft_heartbeat_ms: u64,
    /// Shortest silence after which a follower stands for election, milliseconds.
    pub election_min_ms: u64,
    /// Longest such silence, and the leader's lease, milliseconds. The same on all chunkservers of a cluster: the first one
    /// that registers decides for good.
    pub election_max_ms: u64,
    /// Log that a copyset may have past its checkpoint, such as `64M`; more: it is checkpointed.
    pub checkpoint_log: String,
    /// Size of one file of the log, such as `64M`; three exist at least. At a start all of them are read.
    pub log_segment: String,
    /// Limit of replica copying, bytes per second, such as `100M`.
    pub snapshot_rate: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/spline/chunkserver".into(),
            listen: "127.0.0.1:6800".into(),
            advertise: String::new(),
            zone: "default".into(),
            mds: vec!["127.0.0.1:6700".into()],
            capacity: "0".into(),
            metrics_listen: String::new(),
            spare_chunks: 8,
            open_chunks: 2048,
            raft_heartbeat_ms: 400,
            election_min_ms: 600,
            election_max_ms: 1000,
            checkpoint_log: "64M".into(),
            log_segment: "64M".into(),
            snapshot_rate: "100M".into(),
        }
    }
}

impl Config {
    /// The address to listen on.
    ///
    /// # Errors
    /// If it is not `address:port`.
    pub fn listen(&self) -> anyhow::Result<SocketAddr> {
        self.listen
            .parse()
            .with_context(|| format!("not an address:port: key=listen value={:?}", self.listen))
    }

    /// The address that others are told, given the one that is `bound`.
    ///
    /// # Errors
    /// If it is set and not `address:port`.
    pub fn advertise(&self, bound: SocketAddr) -> anyhow::Result<SocketAddr> {
        match self.advertise.as_str() {
            "" => Ok(bound),
            text => {
                text.parse().with_context(|| format!("not an address:port: key=advertise value={text:?}"))
            }
        }
    }

    /// Where metrics are served, if anywhere.
    ///
    /// # Errors
    /// If it is set and not `address:port`.
    pub fn metrics_listen(&self) -> anyhow::Result<Option<SocketAddr>> {
        match self.metrics_listen.as_str() {
            "" => Ok(None),
            text => {
                let address = text.parse();
                Ok(Some(
                    address
                        .with_context(|| format!("not an address:port: key=metrics_listen value={text:?}"))?,
                ))
            }
        }
    }

    /// Bytes that chunks may take; 0: no limit but the filesystem's.
    ///
    /// # Errors
    /// If it is not a size.
    pub fn capacity(&self) -> anyhow::Result<u64> {
        size("capacity", &self.capacity)
    }

    /// Log past a checkpoint, bytes.
    ///
    /// # Errors
    /// If it is not a size.
    pub fn checkpoint_log(&self) -> anyhow::Result<u64> {
        size("checkpoint_log", &self.checkpoint_log)
    }

    /// Size of one file of the log, bytes.
    ///
    /// # Errors
    /// If it is not a size, or not a multiple of 4096 from 32 MiB to 1 GiB: an entry that writes a whole chunk must fit
    /// into one file.
    pub fn log_segment(&self) -> anyhow::Result<u64> {
        let bytes = size("log_segment", &self.log_segment)?;
        let fits = (LOG_SEGMENT_MIN..=LOG_SEGMENT_MAX).contains(&bytes) && bytes.is_multiple_of(4096);
        anyhow::ensure!(
            fits,
            "value is out of range or no multiple of 4096: key=log_segment value={bytes} \
             allowed={LOG_SEGMENT_MIN}..={LOG_SEGMENT_MAX}"
        );
        Ok(bytes)
    }

    /// Limit of replica copying, bytes per second.
    ///
    /// # Errors
    /// If it is not a size.
    pub fn snapshot_rate(&self) -> anyhow::Result<u64> {
        size("snapshot_rate", &self.snapshot_rate)
    }

    /// How often a leader sends heartbeats.
    pub const fn raft_heartbeat(&self) -> Duration {
        Duration::from_millis(self.raft_heartbeat_ms)
    }
}

fn size(key: &str, text: &str) -> anyhow::Result<u64> {
    text.parse::<ByteSize>().map(|size| size.0).map_err(|error| anyhow::anyhow!("{error} key={key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        let config = Config::default();
        assert!(config.listen().is_ok());
        assert_eq!(config.capacity().expect("parses"), 0);
        assert_eq!(config.checkpoint_log().expect("parses"), 64 << 20);
        assert_eq!(config.log_segment().expect("parses"), 64 << 20);
        let small = Config { log_segment: "16M".into(), ..Config::default() };
        assert!(small.log_segment().is_err());
        assert_eq!(config.snapshot_rate().expect("parses"), 100 << 20);
        assert_eq!(config.metrics_listen().expect("parses"), None);
    }
}
