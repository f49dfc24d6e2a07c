//! What a gateway asks of a copyset about one chunk, and the fence that orders sessions and attempts.

use crate::ids::{ChunkIndex, CopysetId, Epoch, Seq, VolumeId};
use crate::range::ChunkRange;

/// A chunk: a volume and a position in it. Chunks are created by the first write.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct ChunkId {
    /// The volume.
    pub volume: VolumeId,
    /// Which 16 MiB of it.
    pub index: ChunkIndex,
}

impl std::fmt::Display for ChunkId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.volume, self.index)
    }
}

/// What to do with a range of a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum ChunkOp {
    /// Read; a chunk that was never written reads as zeros.
    Read,
    /// Write; the payload is exactly as long as the range. Always durable when answered.
    Write,
    /// Make the range zeros and keep its space.
    WriteZeroes,
    /// Make the range zeros and give whole blocks back.
    Discard,
    /// Tell which parts are allocated.
    Status,
    /// Read the bytes that this replica has, leader or not, however old: for a peer that knows their checksum.
    Peek,
}

impl ChunkOp {
    /// Whether it must go through the log.
    pub const fn modifies(self) -> bool {
        matches!(self, Self::Write | Self::WriteZeroes | Self::Discard)
    }

    /// A short lower-case name for logs and metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write_zeroes",
            Self::Discard => "discard",
            Self::Status => "status",
            Self::Peek => "peek",
        }
    }
}

/// Orders sessions (`one_writer`) and attempts (`no_late_duplicate`). Judged in the copyset's replicated state:
/// an epoch older than the newest seen is refused, and so is a seq below the highest floor seen of that epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FenceTag {
    /// The session's epoch.
    pub epoch: Epoch,
    /// New for every attempt, retries included.
    pub seq: Seq,
    /// The lowest seq that the session still waits for; attempts below it are dead.
    pub floor: Seq,
}

/// One attempt of one span: what travels to a copyset's leader. The payload travels beside it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkCommand {
    /// The copyset that holds the chunk.
    pub copyset: CopysetId,
    /// The chunk.
    pub chunk: ChunkId,
    /// What to do.
    pub op: ChunkOp,
    /// Where, in bytes of the chunk.
    pub range: ChunkRange,
    /// Who asks, and which attempt it is.
    pub fence: FenceTag,
}
