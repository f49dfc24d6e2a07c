//! The vocabulary of replication: who, which group, where in the log, what is logged.
//!
//! Called by every module of the crate and by its users. Knows no encoding and no openraft type: an upgrade of openraft
//! must not reach past this crate.

use std::fmt;

use bytes::Bytes;

/// One raft node: a process's data directory (a chunkserver id, or the MDS server's number). Never reused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One raft group: a copyset, or the MDS's own group. The WAL and the peer connections are shared by all groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(pub u32);

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A place in a group's log: the term and node of the leader that proposed the entry, and the entry's index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LogPosition {
    /// Term of the proposing leader.
    pub term: u64,
    /// The proposing leader.
    pub node: u64,
    /// Index in the log; the first entry has index 0 (the bootstrap membership).
    pub index: u64,
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.term, self.node, self.index)
    }
}

/// What is replicated: opaque to this crate. `payload` is carried by reference from the connection to the log, to the
/// peers and to `apply`; it is never copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogCommand {
    /// The user's own encoding of the command (at most 32 KiB).
    pub meta: Bytes,
    /// Bulk bytes (at most 32 MiB).
    pub payload: Bytes,
}

impl LogCommand {
    /// Bytes of meta and payload.
    pub(crate) fn bytes(&self) -> usize {
        self.meta.len() + self.payload.len()
    }
}

/// What `apply` returns to the proposer: opaque, small.
pub type Answer = Bytes;
