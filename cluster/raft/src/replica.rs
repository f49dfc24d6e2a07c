//! One running openraft instance behind a trait without type parameters.
//!
//! Called by `member`, `group`, `network::receive`, `pulse`. The only file that calls `openraft::Raft`.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use futures_util::future::BoxFuture;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{Fatal, InitializeError, RaftError as OpenraftError};
use openraft::impls::EmptyNode;
use openraft::raft::AppendEntriesResponse;
use openraft::{ChangeMembers, LinearizerOption, Raft, Snapshot};

use crate::error::RaftError;
use crate::places::Placed;
use crate::state_machine::adapter::{Adapter, SnapshotData};
use crate::state_machine::{SnapshotSink, StateMachine};
use crate::types::{
    AppendRequest, MetricsReceiver, Proposed, Proposer, SnapshotMeta, TransferRequest, TypeConfig, Vote,
    VoteRequest, VoteResponse,
};

/// What the rest of the crate asks of a running replica. Strings are reasons for the peer's log.
pub(crate) trait Replica: Send + Sync {
    fn metrics(&self) -> MetricsReceiver;
    fn append(
        &self,
        request: AppendRequest,
    ) -> BoxFuture<'_, Result<AppendEntriesResponse<TypeConfig>, String>>;
    fn vote(&self, request: VoteRequest) -> BoxFuture<'_, Result<VoteResponse, String>>;
    fn pre_vote(&self, request: VoteRequest) -> BoxFuture<'_, Result<VoteResponse, String>>;
    fn handle_transfer(&self, request: TransferRequest) -> BoxFuture<'_, Result<(), String>>;
    /// Queues a proposal; its outcome goes to `proposer`. `Err`: the replica has stopped and nothing was queued.
    fn propose(&self, command: Placed, proposer: Proposer<Proposed>) -> BoxFuture<'_, Result<(), ()>>;
    /// One round to a quorum, then waits until everything committed before is applied. `Err`: no such permission.
    fn read_round(&self, limit: Duration) -> BoxFuture<'_, Result<(), ()>>;
    fn initialize(&self, members: BTreeMap<u64, EmptyNode>) -> BoxFuture<'_, Result<(), RaftError>>;
    /// Adds a learner and waits until it has nearly caught up.
    fn add_learner(&self, node: u64) -> BoxFuture<'_, Result<(), RaftError>>;
    fn change(&self, change: ChangeMembers<u64, EmptyNode>) -> BoxFuture<'_, Result<(), RaftError>>;
    fn elect(&self, pre_vote: bool) -> BoxFuture<'_, ()>;
    fn heartbeat(&self) -> BoxFuture<'_, ()>;
    fn transfer(&self, to: u64) -> BoxFuture<'_, Result<(), RaftError>>;
    fn build_checkpoint(&self) -> BoxFuture<'_, Result<(), RaftError>>;
    fn purge(&self, index: u64) -> BoxFuture<'_, Result<(), RaftError>>;
    fn sink(&self) -> BoxFuture<'_, Result<io::Result<Box<dyn SnapshotSink>>, String>>;
    fn install(
        &self,
        vote: Vote,
        meta: SnapshotMeta,
        sink: Box<dyn SnapshotSink>,
    ) -> BoxFuture<'_, Result<Vote, String>>;
    fn stop(&self) -> BoxFuture<'_, ()>;
    /// Ready once the core is gone, whether it was stopped, has failed or has panicked.
    fn gone(&self) -> BoxFuture<'static, ()>;
}

fn stopped(fatal: Fatal<TypeConfig>) -> RaftError {
    RaftError::Stopped(fatal.to_string())
}

impl<S: StateMachine> Replica for Raft<TypeConfig, Adapter<S>> {
    fn metrics(&self) -> MetricsReceiver {
        Raft::metrics(self)
    }

    fn append(
        &self,
        request: AppendRequest,
    ) -> BoxFuture<'_, Result<AppendEntriesResponse<TypeConfig>, String>> {
        Box::pin(async move { self.append_entries(request).await.map_err(|e| e.to_string()) })
    }

    fn vote(&self, request: VoteRequest) -> BoxFuture<'_, Result<VoteResponse, String>> {
        Box::pin(async move { Raft::vote(self, request).await.map_err(|e| e.to_string()) })
    }

    fn pre_vote(&self, request: VoteRequest) -> BoxFuture<'_, Result<VoteResponse, String>> {
        Box::pin(async move { Raft::pre_vote(self, request).await.map_err(|e| e.to_string()) })
    }

    fn handle_transfer(&self, request: TransferRequest) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            let taken = self.handle_transfer_leader(request).await.map_err(|e| e.to_string())?;
            taken.map_err(|e| e.to_string())
        })
    }

    fn propose(&self, command: Placed, proposer: Proposer<Proposed>) -> BoxFuture<'_, Result<(), ()>> {
        Box::pin(async move { self.client_write_ff(command, Some(proposer)).await.map_err(drop) })
    }

    fn read_round(&self, limit: Duration) -> BoxFuture<'_, Result<(), ()>> {
        Box::pin(async move {
            let fresh = LinearizerOption::new(Some(Duration::ZERO), true).with_wait_timeout(limit);
            let ready = self.get_read_linearizer(fresh).await.map_err(drop)?;
            let applied = ready.try_await_ready(self, Some(limit)).await.map_err(drop)?;
            applied.map(drop).map_err(drop)
        })
    }

    fn initialize(&self, members: BTreeMap<u64, EmptyNode>) -> BoxFuture<'_, Result<(), RaftError>> {
        Box::pin(async move {
            match Raft::initialize(self, members).await {
                // A member that was bootstrapped first has already asked for a vote or sent its log.
                Ok(()) | Err(OpenraftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
                Err(error) => Err(RaftError::Refused(error.to_string())),
            }
        })
    }

    fn add_learner(&self, node: u64) -> BoxFuture<'_, Result<(), RaftError>> {
        Box::pin(async move {
            let added = Raft::add_learner(self, node, EmptyNode::new(), true).await;
            added.map(drop).map_err(|e| RaftError::Refused(e.to_string()))
        })
    }

    fn change(&self, change: ChangeMembers<u64, EmptyNode>) -> BoxFuture<'_, Result<(), RaftError>> {
        Box::pin(async move {
            let changed = self.change_membership(change, false).await;
            changed.map(drop).map_err(|e| RaftError::Refused(e.to_string()))
        })
    }

    fn elect(&self, pre_vote: bool) -> BoxFuture<'_, ()> {
        // A stopped replica does not campaign.
        Box::pin(async move { drop(self.trigger().elect(pre_vote).await) })
    }

    fn heartbeat(&self) -> BoxFuture<'_, ()> {
        // A stopped replica has no heart.
        Box::pin(async move { drop(self.trigger().heartbeat().await) })
    }

    fn transfer(&self, to: u64) -> BoxFuture<'_, Result<(), RaftError>> {
        Box::pin(async move { self.trigger().transfer_leader(to).await.map_err(stopped) })
    }

    fn build_checkpoint(&self) -> BoxFuture<'_, Result<(), RaftError>> {
        Box::pin(async move { self.trigger().snapshot().await.map_err(stopped) })
    }

    fn purge(&self, index: u64) -> BoxFuture<'_, Result<(), RaftError>> {
        Box::pin(async move { self.trigger().purge_log(index).await.map_err(stopped) })
    }

    fn sink(&self) -> BoxFuture<'_, Result<io::Result<Box<dyn SnapshotSink>>, String>> {
        Box::pin(async move {
            let asked = self.with_state_machine(|machine| {
                let sink = machine.sink();
                Box::pin(async move { sink })
            });
            asked.await.map_err(|e| e.to_string())
        })
    }

    fn install(
        &self,
        vote: Vote,
        meta: SnapshotMeta,
        sink: Box<dyn SnapshotSink>,
    ) -> BoxFuture<'_, Result<Vote, String>> {
        Box::pin(async move {
            let snapshot = Snapshot { meta, snapshot: SnapshotData::Sink(sink) };
            let installed = self.install_full_snapshot(vote, snapshot).await.map_err(|e| e.to_string())?;
            Ok(installed.vote)
        })
    }

    fn stop(&self) -> BoxFuture<'_, ()> {
        // A task that panicked has been reported by its own panic.
        Box::pin(async move { drop(self.shutdown().await) })
    }

    fn gone(&self) -> BoxFuture<'static, ()> {
        // The core owns the sender. A channel that changes seldom: not with every entry.
        let mut changes = self.server_metrics();
        Box::pin(async move { while changes.changed().await.is_ok() {} })
    }
}
