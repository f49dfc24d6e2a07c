//! Replication: raft groups over one shared log per data directory and one shared connection per peer.
//!
//! Knows: openraft (the only crate that does), the write-ahead log, the raft messages and their encodings, checkpoints
//! and snapshots as opaque items.
//! Must never know: what a command means, chunk files, volumes, the MDS.
//!
//! Modules in the order in which a proposal meets them: [`group`] → `log_store` → [`wal`] and `network` → `machine` →
//! [`state_machine`]; [`host`] owns them all, `snapshot` moves whole states, `codec` holds the encodings.

pub mod command;
pub mod error;
pub mod group;
pub mod host;
pub mod state_machine;
pub mod wal;

pub use command::{Answer, GroupId, LogCommand, LogPosition, NodeId};
pub use error::{ProposeError, RaftError};
pub use group::{Group, GroupStatus, ReadLease, Role};
pub use host::{RaftConfig, RaftHost};
pub use state_machine::{Checkpoint, CheckpointJob, SnapshotSink, SnapshotSource, StateMachine};
pub use wal::WalConfig;
