//! What a guest asks of a volume, and what it gets back. The payload travels beside the request, not in it.

use crate::fault::Fault;
use crate::ids::RequestId;
use crate::range::ByteRange;

/// What to do with a range of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum BlockOp {
    /// Read the range.
    Read,
    /// Write the range; the payload is exactly as long.
    Write,
    /// Make what was answered before this request durable. The range is empty.
    Flush,
    /// Give the range back; it reads as zeros afterwards on the cluster, and at least harmlessly elsewhere.
    Discard,
    /// Make the range read as zeros. With `no_hole` the space stays allocated; with `fast` it is refused with
    /// `Unsupported` unless it is quicker than writing zeros.
    WriteZeroes {
        /// Keep the space allocated.
        no_hole: bool,
        /// Refuse rather than be slow.
        fast: bool,
    },
    /// Read the range into a cache. A hint: never fails for lack of a cache.
    Cache,
    /// Tell which parts of the range are allocated.
    Status,
}

impl BlockOp {
    /// Whether bytes of the range's length travel with the request or its answer.
    pub const fn carries_data(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }

    /// Whether the volume's content may change; such requests are refused on a read-only export.
    pub const fn modifies(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes { .. })
    }

    /// A short lower-case name for logs and metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes { .. } => "write_zeroes",
            Self::Cache => "cache",
            Self::Status => "status",
        }
    }
}

/// One request of a guest, the same type from the export to the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockRequest {
    /// Given by nebd; what a replay after a lost link is recognised by.
    pub id: RequestId,
    /// What to do.
    pub op: BlockOp,
    /// Where, in bytes of the volume.
    pub range: ByteRange,
    /// The answer must wait until this request's effect is durable (force unit access).
    pub fua: bool,
}

/// How a request ends; exactly once (`complete_once`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Completion<T = ()> {
    /// Carried out.
    Done(T),
    /// Not carried out, or not wholly; why.
    Failed(Fault),
    /// This process is leaving: tell the guest nothing, the request will be replayed.
    Withdrawn,
}
