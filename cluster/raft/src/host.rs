//! All replicas of one data directory.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use prometheus_client::registry::Registry;
use spline_wire::{Frame, FrameSender};

use crate::command::{GroupId, NodeId};
use crate::error::RaftError;
use crate::group::Group;
use crate::state_machine::StateMachine;
use crate::wal::WalConfig;

/// How a host runs. Timings must be the same on all nodes of a group.
#[derive(Clone, Debug)]
pub struct RaftConfig {
    /// The data directory's raft folder: the WAL lies in it.
    pub dir: PathBuf,
    /// This node.
    pub node: NodeId,
    /// How often an idle leader speaks.
    pub heartbeat: Duration,
    /// The shortest election timeout.
    pub election_min: Duration,
    /// The longest election timeout, which is also the leader's lease.
    pub election_max: Duration,
    /// A group is checkpointed when its log since the last checkpoint is longer than this (bytes).
    pub checkpoint_log_bytes: u64,
    /// The write-ahead log.
    pub wal: WalConfig,
    /// Most bytes per second that snapshots of this host send.
    pub snapshot_bytes_per_second: u64,
}

impl RaftConfig {
    /// The defaults of a chunkserver for `node`, with the log in `dir`.
    pub fn new(dir: PathBuf, node: NodeId) -> RaftConfig {
        RaftConfig {
            dir,
            node,
            heartbeat: Duration::from_millis(300),
            election_min: Duration::from_millis(600),
            election_max: Duration::from_millis(1000),
            checkpoint_log_bytes: 64 << 20,
            wal: WalConfig::default(),
            snapshot_bytes_per_second: 256 << 20,
        }
    }
}

/// One per data directory: the WAL, the peer connections, all groups. Clones share it.
#[derive(Clone, Debug)]
pub struct RaftHost {}

impl RaftHost {
    /// Opens the WAL of `config.dir` and recovers it.
    pub async fn open(_config: RaftConfig, _metrics: &mut Registry) -> Result<RaftHost, RaftError> {
        Err(RaftError::Stopped(String::new()))
    }
    /// Starts this host's replica of a group.
    pub async fn start_group<S: StateMachine>(&self, _id: GroupId, _machine: S) -> Result<Group, RaftError> {
        Err(RaftError::Stopped(String::new()))
    }
    /// Stops the replica and forgets its log.
    pub async fn remove_group(&self, _id: GroupId) -> Result<(), RaftError> {
        Err(RaftError::Stopped(String::new()))
    }
    /// Replaces the address book of the peers.
    pub fn set_addresses(&self, _book: HashMap<NodeId, SocketAddr>) {}
    /// Takes a `RaftRequest` frame from the process's wire listener.
    pub async fn handle(&self, _frame: Frame, _replies: &FrameSender) {}
    /// Stops all groups and syncs the WAL.
    pub async fn shutdown(&self) {}
}
