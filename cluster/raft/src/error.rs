//! Why replication refused or failed.

use std::io;

use crate::command::NodeId;

/// Why a host or group operation failed.
#[derive(Debug, thiserror::Error)]
pub enum RaftError {
    /// The disk, or what is on it.
    #[error("raft storage failed: {0}")]
    Io(#[from] io::Error),
    /// The group does not run on this host.
    #[error("raft group is not on this host group={0}")]
    NoGroup(u32),
    /// The group runs on this host already.
    #[error("raft group is already started group={0}")]
    AlreadyStarted(u32),
    /// Only the leader can do this.
    #[error("not the leader, ask the leader leader={0:?}")]
    NotLeader(Option<NodeId>),
    /// The replica has stopped.
    #[error("raft replica has stopped: {0}")]
    Stopped(String),
    /// The arguments or the group's state do not allow it.
    #[error("{0}")]
    Refused(String),
}

/// Why a proposal or a read was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// This replica does not lead; the command is certainly not in the log.
    #[error("not the leader leader={leader:?}")]
    NotLeader {
        /// Who leads, if known.
        leader: Option<NodeId>,
    },
    /// The command may or may not commit later.
    #[error("outcome unknown, the command may still commit")]
    Unknown,
    /// The replica has stopped.
    #[error("raft replica has stopped")]
    Stopped,
    /// The log does not get through what waits to be written: refused before anything was logged, try again.
    #[error("the log can not keep up, try again")]
    Overloaded,
    /// No room in the log: refused before anything was logged.
    #[error("no room for a new log segment, free disk space")]
    LogFull,
}
