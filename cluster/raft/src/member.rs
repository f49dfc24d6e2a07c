//! One replica as this host keeps it: the running raft, its log, and what it has promised about leases.
//!
//! Called by `host`, `pulse`, `network::receive`, `group`. Votes pass through here, so that the [`Promise`] to the leader
//! is kept; a leader that a majority still hears keeps its own vote back too.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::{RaftMetrics, ServerState};
use tokio::sync::mpsc;

use crate::clock::Moment;
use crate::command::{GroupId, NodeId};
use crate::host::HostState;
use crate::log_store::LogStore;
use crate::metrics::Metrics;
use crate::network::acks::Acks;
use crate::promise::Promise;
use crate::replica::Replica;
use crate::rounds::{self, Proposal};
use crate::snapshot::Inbound;
use crate::types::{LeaderId, MetricsReceiver, TransferRequest, TypeConfig, VoteRequest, VoteResponse};

/// How elections and leases are timed; the same on all nodes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    pub(crate) heartbeat: Duration,
    pub(crate) election_min: Duration,
    /// The longest election timeout and the leader's lease: how long a follower gives nobody else a vote.
    pub(crate) lease: Duration,
}

impl Timing {
    /// How long after the last acknowledged round a leader may read without asking: the followers' lease less a tenth
    /// for clocks that run at different speeds and a twentieth for scheduling.
    pub(crate) fn read_lease(&self) -> Duration {
        self.lease - self.lease / 10 - self.lease / 20
    }
}

pub(crate) struct Member {
    pub(crate) id: GroupId,
    pub(crate) node: NodeId,
    pub(crate) replica: Arc<dyn Replica>,
    pub(crate) rounds: mpsc::Sender<Proposal>,
    pub(crate) log: LogStore,
    pub(crate) acks: Arc<Acks>,
    pub(crate) raft: MetricsReceiver,
    pub(crate) timing: Timing,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) inbound: Inbound,
    pub(crate) started: Moment,
    pub(crate) promise: Arc<Promise>,
    /// Requests of peers that were taken and have not been answered.
    pub(crate) unanswered: AtomicU32,
    /// Once other voters were added, a single voter's rule (no lease needed) never applies again in this run.
    pub(crate) has_grown: AtomicBool,
    /// One round at a time; the others wait for it and share its result. When one has failed last.
    pub(crate) round: tokio::sync::Mutex<Option<Moment>>,
    /// Rounds that were made because openraft's leader had heard from nobody for a lease.
    pub(crate) renewals: AtomicU64,
    /// When this replica may stand for election again.
    pub(crate) campaign_not_before: Mutex<Option<Moment>>,
    pub(crate) checkpointing: tokio::sync::Mutex<()>,
    pub(crate) stopped: AtomicBool,
}

impl Member {
    pub(crate) fn new(
        host: &HostState,
        id: GroupId,
        replica: Arc<dyn Replica>,
        log: LogStore,
        acks: Arc<Acks>,
        promise: Arc<Promise>,
    ) -> Member {
        let HostState { node, timing, metrics, flight, .. } = host;
        let (node, timing, metrics) = (*node, *timing, metrics.clone());
        Member {
            id,
            node,
            raft: replica.metrics(),
            rounds: rounds::start(replica.clone(), flight.clone(), metrics.clone()),
            replica,
            log,
            acks,
            timing,
            metrics,
            inbound: Inbound::default(),
            started: Moment::now(),
            promise,
            unanswered: AtomicU32::new(0),
            has_grown: AtomicBool::new(false),
            round: tokio::sync::Mutex::new(None),
            renewals: AtomicU64::new(0),
            campaign_not_before: Mutex::default(),
            checkpointing: tokio::sync::Mutex::new(()),
            stopped: AtomicBool::new(false),
        }
    }

    /// The moment since which a majority has accepted the present leadership, as `raft` shows it.
    pub(crate) fn quorum_heard(&self, raft: &RaftMetrics<TypeConfig>) -> Option<Moment> {
        let configs = raft.membership_config.membership().get_joint_config();
        self.acks.quorum(raft.vote.leader_id, self.node, configs, Moment::now())
    }

    /// Whether this replica leads and a majority has heard so within a lease. openraft asks this before it votes, but
    /// does not know of heartbeats.
    fn leads(&self) -> bool {
        let raft = self.raft.borrow_watched();
        raft.state == ServerState::Leader
            && self.quorum_heard(&raft).is_some_and(|heard| heard.elapsed() < self.timing.lease)
    }

    /// Answers a heartbeat: whether this replica follows `leader` and knows all that is committed (`committed`: the last
    /// such index and one). True is a promise.
    pub(crate) fn hears(&self, leader: LeaderId, committed: u64) -> bool {
        if self.stopped.load(Ordering::Acquire) {
            return false;
        }
        let is_level = {
            let raft = self.raft.borrow_watched();
            let known = raft.local_committed.as_ref().map_or(0, |id| id.index + 1);
            raft.running_state.is_ok() && known >= committed
        };
        is_level && self.promise.beat(leader, || self.log.vote())
    }

    /// Whether leadership of `term` is being handed over: its lease must not be used any more.
    pub(crate) fn is_handing_over(&self, term: u64) -> bool {
        self.acks.is_handing_over(term)
    }

    /// Takes a leader's request to this or another replica to take over. It has stopped reading under its lease.
    pub(crate) async fn transfer(&self, request: TransferRequest) -> Result<(), String> {
        let leader = request.from_leader().leader_id;
        // Before the core hears of it: the requests for votes that it then makes name this leader.
        self.promise.handed_over(leader);
        self.replica.handle_transfer(request).await
    }

    fn withheld(&self) -> String {
        self.metrics.votes_withheld.inc();
        format!("vote withheld while a leader has its lease, group={}", self.id)
    }

    /// True if `candidate` is the leader this replica follows, so that the lease in the way is the candidate's own.
    fn is_own_lease(&self, candidate: NodeId) -> bool {
        self.raft.borrow_watched().current_leader == Some(candidate.0) && candidate != self.node
    }

    /// Whether `leader` is this replica's own leadership, and was handed away.
    fn has_handed_over(&self, leader: LeaderId) -> bool {
        let vote = self.raft.borrow_watched().vote;
        vote.leader_id == leader && leader.node_id == self.node.0 && self.is_handing_over(leader.term)
    }

    /// Passes a request for a vote to the core if nothing is promised against it. `handed_over` is the leader in whose name
    /// it is asked for: a lease of another leader stands in the way.
    pub(crate) async fn vote(
        &self,
        mut request: VoteRequest,
        handed_over: Option<LeaderId>,
    ) -> Result<VoteResponse, String> {
        let candidate = NodeId(request.vote.leader_id.node_id);
        let from_here = handed_over.is_some_and(|leader| self.has_handed_over(leader));
        // openraft keeps leases of its own; they are of the leader that it follows.
        let followed = self.raft.borrow_watched().vote;
        let is_asked_for = followed.committed && handed_over == Some(followed.leader_id);
        let forced = is_asked_for || self.is_own_lease(candidate);
        if (!from_here && self.leads()) || !self.promise.vote_begins(candidate, handed_over, forced) {
            return Err(self.withheld());
        }
        request.leadership_transfer = forced;
        let answer = self.replica.vote(request).await;
        // Not if this task was dropped before: the core may still grant the vote.
        self.promise.vote_ended(forced);
        answer
    }

    pub(crate) async fn pre_vote(&self, request: VoteRequest) -> Result<VoteResponse, String> {
        let candidate = NodeId(request.vote.leader_id.node_id);
        if self.leads() || self.promise.withholds(candidate) {
            return Err(self.withheld());
        }
        if self.is_own_lease(candidate) {
            let (newer, last) = {
                let raft = self.raft.borrow_watched();
                (request.vote > raft.vote, raft.last_log_index)
            };
            // Only a forecast; the real vote compares the whole log position.
            if newer && request.last_log_id.map(|id| id.index) >= last {
                return Ok(VoteResponse { vote: request.vote, vote_granted: true, last_log_id: None });
            }
        }
        self.replica.pre_vote(request).await
    }

    pub(crate) fn is_running(&self) -> bool {
        !self.stopped.load(Ordering::Acquire) && self.raft.borrow_watched().running_state.is_ok()
    }

    /// Whether anything was applied since the last checkpoint.
    pub(crate) fn has_unsaved(&self) -> bool {
        let raft = self.raft.borrow_watched();
        raft.last_applied > raft.snapshot
    }

    pub(crate) fn state(&self) -> ServerState {
        self.raft.borrow_watched().state
    }

    pub(crate) fn leader(&self) -> Option<NodeId> {
        self.raft.borrow_watched().current_leader.map(NodeId)
    }

    /// The core or the state machine has ended. What the core last published may still say that this replica leads: from
    /// here on it sends no heartbeat, reads under no lease, accepts none and is reported as stopped. False if it was
    /// stopped in order.
    pub(crate) fn falls_silent(&self) -> bool {
        !self.stopped.swap(true, Ordering::AcqRel)
    }

    /// Reports the end of a replica that fell silent, and stops what is left of it.
    pub(crate) async fn ended(&self) {
        self.metrics.replicas_ended.inc();
        // A core that failed has said why; one that panicked could not.
        if self.raft.borrow_watched().running_state.is_ok() {
            tracing::error!(group = %self.id, "replica has ended by a panic; restart the process to recover it");
        }
        self.replica.stop().await;
    }

    pub(crate) async fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.replica.stop().await;
    }
}
