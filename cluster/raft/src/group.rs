//! One replica of one raft group.

use crate::command::{Answer, LogCommand, LogPosition, NodeId};
use crate::error::{ProposeError, RaftError};

/// What part a replica plays now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Takes proposals and reads.
    Leader,
    /// Follows a leader.
    Follower,
    /// Asks for votes.
    Candidate,
    /// Receives the log, has no vote.
    Learner,
    /// Stopped by shutdown or by a storage failure.
    Stopped,
}

/// A snapshot of a replica's raft state, from cached values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupStatus {
    /// What this replica is.
    pub role: Role,
    /// The leader it knows.
    pub leader: Option<NodeId>,
    /// Its current term.
    pub term: u64,
    /// The last entry in its log.
    pub last_log: Option<LogPosition>,
    /// The last applied entry.
    pub applied: Option<LogPosition>,
    /// Members with a vote.
    pub voters: Vec<NodeId>,
    /// Members without a vote.
    pub learners: Vec<NodeId>,
}

/// A handle to one replica; clones share it.
#[derive(Clone, Debug)]
pub struct Group {}

/// The right to answer one local read linearizably.
#[derive(Debug)]
pub struct ReadLease {}

impl ReadLease {
    /// True if the data read since the lease was taken may be returned.
    pub fn still_held(&self) -> bool {
        false
    }
}

impl Group {
    /// Writes the first membership. Ok if the group is initialised already.
    pub async fn bootstrap(&self, _members: &[NodeId]) -> Result<(), RaftError> {
        Err(RaftError::Stopped(String::new()))
    }
    /// Replicates a command and waits until this replica has applied it.
    pub async fn propose(&self, _command: LogCommand) -> Result<Answer, ProposeError> {
        Err(ProposeError::Stopped)
    }
    /// Ready when a linearizable local read may start.
    pub async fn read_lease(&self) -> Result<ReadLease, ProposeError> {
        Err(ProposeError::Stopped)
    }
    /// Role, leader, positions and members as this replica sees them.
    pub fn status(&self) -> GroupStatus {
        GroupStatus {
            role: Role::Stopped,
            leader: None,
            term: 0,
            last_log: None,
            applied: None,
            voters: Vec::new(),
            learners: Vec::new(),
        }
    }
    /// Adds and removes members.
    pub async fn change_members(&self, _add: &[NodeId], _remove: &[NodeId]) -> Result<(), RaftError> {
        Err(RaftError::Stopped(String::new()))
    }
    /// Hands leadership to another voter.
    pub async fn transfer_leadership(&self, _to: NodeId) -> Result<(), RaftError> {
        Err(RaftError::Stopped(String::new()))
    }
    /// Checkpoints now and purges the log behind it.
    pub async fn checkpoint(&self) -> Result<(), RaftError> {
        Err(RaftError::Stopped(String::new()))
    }
    /// Stops this replica.
    pub async fn shutdown(&self) {}
}
