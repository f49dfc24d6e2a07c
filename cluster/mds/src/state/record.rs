//! The rows of the state: what is kept of each volume, chunkserver, copyset and deletion, and how it is written.
//!
//! Called by [`crate::state`] and read by everyone who looks at the state. The JSON form is the tables' format; see
//! [`crate::store::FORMATS`].

use crate::json::{block_size, id, ids, text};
use serde::{Deserialize, Serialize};
use spline_types::{BlockSize, ChunkserverId, Epoch, OnUnavailable, VolumeId, VolumeName};
use std::collections::BTreeMap;

/// What the whole cluster has one of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// The cluster's id; empty before it is founded.
    pub cluster: String,
    /// The last volume id given out; ids are never reused.
    pub last_volume: u64,
    /// The last chunkserver id given out; ids are never reused.
    pub last_chunkserver: u32,
    /// The highest epoch of any volume, deleted ones included. A new volume begins above it, so that no session of another
    /// volume, whose name it may have, is taken for one of its own (`no_late_duplicate`).
    #[serde(default)]
    pub last_epoch: u64,
    /// Every chunkserver's `election_max_ms`; 0 before the first registered.
    #[serde(default)]
    pub election_max_ms: u64,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    #[serde(with = "id")]
    pub id: VolumeId,
    /// Its name.
    #[serde(with = "text")]
    pub name: VolumeName,
    /// Bytes.
    pub size: u64,
    /// What guests align to.
    #[serde(with = "block_size")]
    pub block_size: BlockSize,
    /// Its policy.
    #[serde(with = "text")]
    pub on_unavailable: OnUnavailable,
    /// Wall clock, milliseconds since 1970.
    pub created_ms: u64,
    /// Epoch of the newest session, ended or not; before the first, one that no session has.
    #[serde(with = "id")]
    pub epoch: Epoch,
    /// The newest session unless it was closed. Whether its lease is alive is not known here.
    pub session: Option<Session>,
    /// The run that the newest session belongs to, whether it was closed or not; `None` before the first.
    #[serde(default)]
    pub run: Option<Run>,
}

impl Volume {
    /// The first session from which on nobody but the newest session's owner had the volume.
    pub fn run_since(&self) -> Epoch {
        self.run.as_ref().map_or(self.epoch, |run| run.since)
    }
}

/// Sessions that followed each other with nobody else's between them: each was opened by the gateway of the one before
/// it, or to resume it. What was sent to any of them and not answered may be sent again (`no_late_duplicate`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The gateway of the newest of them.
    pub gateway: String,
    /// The first of them.
    #[serde(with = "id")]
    pub since: Epoch,
}

/// A session that was opened and not closed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The gateway's id.
    pub gateway: String,
    /// When it was opened; wall clock, milliseconds since 1970.
    pub since_ms: u64,
}

/// A chunkserver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunkserver {
    /// Its id.
    #[serde(with = "id")]
    pub id: ChunkserverId,
    /// Of its formatted directory.
    pub store_uuid: String,
    /// `host:port`; `None` once another chunkserver registered there.
    pub address: Option<String>,
    /// Its failure zone.
    pub zone: String,
    /// A new store took its address: its data is taken for lost.
    pub gone: bool,
    /// When it first registered; wall clock, milliseconds since 1970.
    pub registered_ms: u64,
}

/// A copyset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copyset {
    /// Raft voters as last reported by a leader; before that, as created. The first one bootstraps.
    #[serde(with = "ids")]
    pub members: Vec<ChunkserverId>,
    /// A leader has reported: the group exists and must never be bootstrapped again.
    pub led: bool,
    /// Term of the last report that changed this row.
    pub term: u64,
    /// Applied index of that report.
    pub index: u64,
    /// The replacement under way. Kept here so that a restarted MDS still assigns the newcomer its replica.
    pub replacing: Option<Replacing>,
    /// Chunks that lie here, deleted ones included until reclaimed. Counted from the segments when loaded.
    #[serde(skip)]
    pub chunks: u64,
}

/// A replica that moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replacing {
    /// The newcomer.
    #[serde(with = "id")]
    pub add: ChunkserverId,
    /// The member it replaces.
    #[serde(with = "id")]
    pub remove: ChunkserverId,
}

/// What is left of a deleted volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deletion {
    /// Chunks by copyset, of copysets that have not yet reported them removed.
    pub remaining: BTreeMap<u32, u32>,
}

/// The copyset of each of a segment's 64 chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Segment(#[serde(with = "ids")] pub Vec<spline_types::CopysetId>);
