//! What is logged: every change of the metadata, as versioned JSON, and what applying it answers.
//!
//! Written by [`crate::ledger`], read by [`crate::machine`]. Decisions that depend on time, load or chance are made
//! before the log and travel in the command, so that `apply` is deterministic (`replicas_identical`).
//! Must never know: how the state changes.

use crate::json::{block_size, id, ids, text};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use spline_types::{
    BlockSize, ChunkserverId, CopysetId, Epoch, OnUnavailable, SegmentIndex, VolumeId, VolumeName,
};

/// Versions of the encoding, newest first. An unknown one is refused.
///
/// - 2: opening a session may resume one; chunkservers register with their election time.
/// - 1: the first.
pub const COMMAND_VERSIONS: &[u32] = &[2, 1];

/// A change of the metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Names the cluster; the first command of a new one. Answers `Done`, also if it has a name already.
    Found {
        /// Random text.
        cluster: String,
    },
    /// Answers `Volume`.
    CreateVolume {
        /// Unique among volumes.
        #[serde(with = "text")]
        name: VolumeName,
        /// Bytes.
        size: u64,
        /// What guests align to.
        #[serde(with = "block_size")]
        block_size: BlockSize,
        /// The volume's policy.
        #[serde(with = "text")]
        on_unavailable: OnUnavailable,
        /// Wall clock, milliseconds since 1970.
        now_ms: u64,
    },
    /// Grows a volume. Answers `Done`.
    ResizeVolume {
        /// Which.
        #[serde(with = "id")]
        volume: VolumeId,
        /// Bytes; not less than now.
        size: u64,
    },
    /// Answers `Done`.
    RenameVolume {
        /// Which.
        #[serde(with = "id")]
        volume: VolumeId,
        /// The new name.
        #[serde(with = "text")]
        name: VolumeName,
    },
    /// Removes a volume; what it holds is reclaimed copyset by copyset. Answers `Done`.
    DeleteVolume {
        /// Which.
        #[serde(with = "id")]
        volume: VolumeId,
        /// The epoch at which nobody was seen to hold the volume; refused if a session was opened since.
        #[serde(with = "id")]
        epoch: Epoch,
    },
    /// Copysets reported that they hold nothing of a deleted volume any more. Answers `Done`.
    Reclaimed {
        /// The deleted volume.
        #[serde(with = "id")]
        volume: VolumeId,
        /// Those that reported.
        #[serde(with = "ids")]
        copysets: Vec<CopysetId>,
    },
    /// Opens a session: epoch + 1. Answers `Epoch`.
    OpenSession {
        /// Which volume.
        #[serde(with = "id")]
        volume: VolumeId,
        /// The epoch that the decision was based on; refused if it has changed since (`one_writer`).
        #[serde(with = "id")]
        epoch: Epoch,
        /// The gateway's id.
        gateway: String,
        /// It resumes the session before it: nobody else had the volume in between. Not in version 1.
        #[serde(default)]
        resumes: bool,
        /// Wall clock, milliseconds since 1970.
        now_ms: u64,
    },
    /// Ends a session if it is still the newest. Answers `Done`.
    CloseSession {
        /// Which volume.
        #[serde(with = "id")]
        volume: VolumeId,
        /// The session.
        #[serde(with = "id")]
        epoch: Epoch,
    },
    /// Gives a segment its copysets unless it has some. Answers `Segment` with those it has now.
    AllocateSegment {
        /// Which volume.
        #[serde(with = "id")]
        volume: VolumeId,
        /// The session that asks; refused if a newer one exists.
        #[serde(with = "id")]
        epoch: Epoch,
        /// Which segment.
        #[serde(with = "id")]
        index: SegmentIndex,
        /// The proposed copyset of each of its 64 chunks.
        #[serde(with = "ids")]
        copysets: Vec<CopysetId>,
    },
    /// A chunkserver asks for its id. A new store at the address of an old one makes the old one gone. Answers
    /// `Chunkserver`.
    RegisterChunkserver {
        /// Of its formatted directory.
        store_uuid: String,
        /// `host:port` of its wire listener.
        address: String,
        /// Its failure zone.
        zone: String,
        /// Longest silence before its replicas stand for election, and a leader's lease, milliseconds; 0: not told, in
        /// version 1.
        #[serde(default)]
        election_max_ms: u64,
        /// Wall clock, milliseconds since 1970.
        now_ms: u64,
    },
    /// A chunkserver reported from a new address. Answers `Done`.
    MoveChunkserver {
        /// Which.
        #[serde(with = "id")]
        chunkserver: ChunkserverId,
        /// `host:port`.
        address: String,
    },
    /// Creates all copysets; refused once there are some. Answers `Done`.
    CreateCopysets {
        /// Members of each; the first one bootstraps the group.
        copysets: Vec<Members>,
    },
    /// What leaders said about their groups and the state did not yet know. Answers `Done`.
    CopysetsReported {
        /// One per group.
        reports: Vec<LeaderReport>,
    },
    /// Decides that a replica moves. Answers `Done`.
    StartReplace {
        /// Which copyset.
        #[serde(with = "id")]
        copyset: CopysetId,
        /// The newcomer.
        #[serde(with = "id")]
        add: ChunkserverId,
        /// The member it replaces.
        #[serde(with = "id")]
        remove: ChunkserverId,
    },
    /// Gives a replacement up whose newcomer is lost and never became a voter. Answers `Done`.
    AbortReplace {
        /// Which copyset.
        #[serde(with = "id")]
        copyset: CopysetId,
        /// The newcomer of the replacement that is meant.
        #[serde(with = "id")]
        add: ChunkserverId,
    },
}

/// Members of one copyset, as an array of numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Members(#[serde(with = "ids")] pub Vec<ChunkserverId>);

/// What the leader of a copyset says about its group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderReport {
    /// Which copyset.
    #[serde(with = "id")]
    pub copyset: CopysetId,
    /// The leader's term.
    pub term: u64,
    /// The leader's applied index; with the term it orders reports.
    pub index: u64,
    /// The raft voters.
    #[serde(with = "ids")]
    pub members: Vec<ChunkserverId>,
    /// The raft learners.
    #[serde(with = "ids")]
    pub learners: Vec<ChunkserverId>,
}

/// What a command answers when it is carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Nothing to tell.
    Done,
    /// The id of the created volume.
    Volume(#[serde(with = "id")] VolumeId),
    /// The epoch of the opened session.
    Epoch(#[serde(with = "id")] Epoch),
    /// The copysets of the segment's chunks.
    Segment(#[serde(with = "ids")] Vec<CopysetId>),
    /// The chunkserver's id.
    Chunkserver(#[serde(with = "id")] ChunkserverId),
}

/// How an applied command ended; what `apply` hands back to the proposer.
pub type Outcome = Result<Answer, Refusal>;

#[derive(Serialize)]
struct Written<'a> {
    v: u32,
    command: &'a Command,
}

#[derive(Deserialize)]
struct Version {
    v: u32,
}

#[derive(Deserialize)]
struct Read {
    command: Command,
}

impl Command {
    /// Encodes in the newest version.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(&Written { v: COMMAND_VERSIONS[0], command: self })
            .expect("commands hold only what JSON can write")
    }

    /// Decodes a command of any known version.
    ///
    /// # Errors
    /// An unknown version, named; or bytes that are not a command.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let version: Version = serde_json::from_slice(bytes)
            .map_err(|error| format!("not a metadata command: error={error}"))?;
        if !COMMAND_VERSIONS.contains(&version.v) {
            return Err(format!(
                "metadata command of an unknown version, a newer binary wrote it: version={} known={COMMAND_VERSIONS:?}",
                version.v
            ));
        }
        let read: Read = serde_json::from_slice(bytes)
            .map_err(|error| format!("damaged metadata command: error={error}"))?;
        Ok(read.command)
    }

    /// A short name for logs and metric labels.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Found { .. } => "found",
            Self::CreateVolume { .. } => "create_volume",
            Self::ResizeVolume { .. } => "resize_volume",
            Self::RenameVolume { .. } => "rename_volume",
            Self::DeleteVolume { .. } => "delete_volume",
            Self::Reclaimed { .. } => "reclaimed",
            Self::OpenSession { .. } => "open_session",
            Self::CloseSession { .. } => "close_session",
            Self::AllocateSegment { .. } => "allocate_segment",
            Self::RegisterChunkserver { .. } => "register_chunkserver",
            Self::MoveChunkserver { .. } => "move_chunkserver",
            Self::CreateCopysets { .. } => "create_copysets",
            Self::CopysetsReported { .. } => "copysets_reported",
            Self::StartReplace { .. } => "start_replace",
            Self::AbortReplace { .. } => "abort_replace",
        }
    }
}

#[cfg(test)]
mod tests;
