//! Replication: raft groups over one shared log per data directory and one shared connection per peer.
//!
//! Knows: openraft (the only crate that does), the write-ahead log, the raft messages and their encodings, leases,
//! checkpoints and snapshots as opaque items.
//! Must never know: what a command means, chunk files, volumes, the MDS.
//!
//! Modules in the order in which a proposal meets them: [`group`] → `places` → `rounds` (and `bundle`) → `replica`
//! (openraft) → `log_store` → [`wal`] and `network` → [`state_machine`]; [`host`] owns them all, `pulse` is their clock,
//! `promise` what followers owe their leader, both by `clock`, `snapshot` moves whole states, `codec` holds the encodings,
//! `types` openraft's parameters; [`command`] and [`error`] are the vocabulary.

pub mod command;
pub mod error;
pub mod group;
pub mod host;
pub mod state_machine;
pub mod wal;

mod bundle;
mod clock;
mod codec;
mod log_store;
mod member;
mod metrics;
mod network;
mod places;
mod promise;
mod pulse;
mod replica;
mod rounds;
mod snapshot;
mod types;

pub use command::{Answer, GroupId, LogCommand, LogPosition, NodeId};
pub use error::{ProposeError, RaftError};
pub use group::{Group, GroupStatus, ReadLease, Role};
pub use host::{RaftConfig, RaftHost};
pub use state_machine::{Checkpoint, CheckpointJob, SnapshotSink, SnapshotSource, StateMachine};
pub use wal::WalConfig;
