//! openraft's type parameters, filled in, and the aliases the crate uses. No other file names openraft's defaults.

use openraft::impls::{BoxedErrorSource, EmptyNode, InlineBatch, TokioRuntime, leader_id_adv};
use openraft::raft::ClientWriteResult;
use openraft::raft::responder::Responder;
use openraft::{EntryPayload, OptionalSend, RaftTypeConfig, alias};
use std::sync::{Arc, Mutex};
use tokio::sync::oneshot;

use crate::command::{Answer, LogPosition};
use crate::places::Placed;
use crate::rounds::Seat;

/// Our openraft. Several leaders per term are allowed (the greater node id wins), which settles split votes without
/// another round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TypeConfig;

impl RaftTypeConfig for TypeConfig {
    type D = Placed;
    type R = Vec<Answer>;
    type NodeId = u64;
    type Node = EmptyNode;
    type Term = u64;
    type LeaderId = leader_id_adv::LeaderId<u64, u64>;
    type Vote = openraft::Vote<Self::LeaderId>;
    type Payload = openraft::EntryPayload<Placed, u64, EmptyNode>;
    type Entry = openraft::Entry<Self::LeaderId, Self::Payload>;
    type AsyncRuntime = TokioRuntime;
    type Responder<T>
        = Proposer<T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type ErrorSource = BoxedErrorSource;
}

pub(crate) type LeaderId = leader_id_adv::LeaderId<u64, u64>;
pub(crate) type LogId = alias::LogIdOf<TypeConfig>;
pub(crate) type Vote = alias::VoteOf<TypeConfig>;
pub(crate) type Entry = alias::EntryOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, EmptyNode>;
pub(crate) type StoredMembership = alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type AppendRequest = openraft::raft::AppendEntriesRequest<TypeConfig>;
pub(crate) type VoteRequest = openraft::raft::VoteRequest<TypeConfig>;
pub(crate) type VoteResponse = openraft::raft::VoteResponse<TypeConfig>;
pub(crate) type TransferRequest = openraft::raft::TransferLeaderRequest<TypeConfig>;
pub(crate) type RpcError = openraft::errors::RPCError<TypeConfig>;
pub(crate) type MetricsReceiver = alias::WatchReceiverOf<TypeConfig, openraft::RaftMetrics<TypeConfig>>;

/// Hands the outcome of an entry to whoever waits for one of its commands; a waiter that has gone needs no answer.
pub(crate) struct Proposer<T> {
    /// One for each command of the entry.
    waiting: Vec<oneshot::Sender<Outcome<T>>>,
    /// Its place in the round in which it was proposed.
    pub(crate) seat: Option<Seat>,
}

/// The outcome of an entry, for all who wait for it, and the number of the command in it. The lock is only there because
/// openraft's outcomes can not be looked at by two threads.
pub(crate) type Outcome<T> = (Arc<Mutex<T>>, usize);

/// The outcome of a proposal as openraft reports it.
pub(crate) type Proposed = ClientWriteResult<TypeConfig>;

/// A proposer and the receiver of its outcome.
pub(crate) fn proposer() -> (Proposer<Proposed>, oneshot::Receiver<Outcome<Proposed>>) {
    let (sender, receiver) = oneshot::channel();
    (Proposer { waiting: vec![sender], seat: None }, receiver)
}

impl<T> Proposer<T> {
    /// Adds those who wait for commands that follow in the same entry.
    pub(crate) fn join(&mut self, other: Proposer<T>) {
        self.waiting.extend(other.waiting);
    }

    /// How many wait.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

impl<T: OptionalSend + 'static> Responder<TypeConfig, T> for Proposer<T> {
    fn on_complete(self, result: T) {
        let result = Arc::new(Mutex::new(result));
        for (number, waiting) in self.waiting.into_iter().enumerate() {
            drop(waiting.send((Arc::clone(&result), number)));
        }
    }
}

/// Bytes of the command that an entry carries.
pub(crate) fn command_bytes(entry: &Entry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(placed) => placed.bytes(),
        EntryPayload::Blank | EntryPayload::Membership(_) => 0,
    }
}

/// openraft's log id as ours.
pub(crate) fn position(id: &LogId) -> LogPosition {
    LogPosition { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
}

/// Our position as openraft's log id.
pub(crate) fn log_id(position: &LogPosition) -> LogId {
    LogId::new(LeaderId { term: position.term, node_id: position.node }, position.index)
}
