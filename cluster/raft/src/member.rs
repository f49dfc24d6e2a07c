//! One replica as this host keeps it: the running raft, its log, and what it has promised about leases.
//!
//! Called by `host`, `pulse`, `network::receive`, `group`. Owns the rule that makes lease reads safe across restarts:
//! openraft forgets a follower's lease when the process restarts, so here a replica that starts with a vote for an
//! established leader gives nobody else a vote, nor stands itself, until a full lease has passed since the start. The
//! old leader itself may be elected at once: the lease is its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;

use crate::command::{GroupId, NodeId};
use crate::log_store::LogStore;
use crate::metrics::Metrics;
use crate::network::acks::Acks;
use crate::replica::Replica;
use crate::snapshot::Inbound;
use crate::types::{MetricsReceiver, VoteRequest, VoteResponse};

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
    pub(crate) replica: Box<dyn Replica>,
    pub(crate) log: LogStore,
    pub(crate) acks: Arc<Acks>,
    pub(crate) raft: MetricsReceiver,
    pub(crate) timing: Timing,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) inbound: Inbound,
    pub(crate) started: Instant,
    /// The leader to which the vote on disk was committed at the start.
    promised: Option<NodeId>,
    /// Milliseconds after `started` at which a leader was last heard; 0 is never.
    heard: AtomicU64,
    /// The term in which leadership was handed away: its lease must not be used any more.
    pub(crate) transferring: AtomicU64,
    /// Once other voters were added, a single voter's rule (no lease needed) never applies again in this run.
    pub(crate) has_grown: AtomicBool,
    /// One read round at a time; the others wait for it and share its result.
    pub(crate) round: tokio::sync::Mutex<()>,
    /// When this replica may stand for election again.
    pub(crate) campaign_not_before: Mutex<Option<Instant>>,
    pub(crate) checkpointing: tokio::sync::Mutex<()>,
    pub(crate) stopped: AtomicBool,
}

impl Member {
    pub(crate) fn new(
        id: GroupId,
        node: NodeId,
        replica: Box<dyn Replica>,
        log: LogStore,
        acks: Arc<Acks>,
        timing: Timing,
        metrics: Arc<Metrics>,
    ) -> Member {
        let vote = log.vote();
        let promised = vote.filter(|vote| vote.committed).map(|vote| NodeId(vote.leader_id.node_id));
        Member {
            id,
            node,
            raft: replica.metrics(),
            replica,
            log,
            acks,
            timing,
            metrics,
            inbound: Inbound::default(),
            started: Instant::now(),
            promised,
            heard: AtomicU64::new(0),
            transferring: AtomicU64::new(u64::MAX),
            has_grown: AtomicBool::new(false),
            round: tokio::sync::Mutex::new(()),
            campaign_not_before: Mutex::default(),
            checkpointing: tokio::sync::Mutex::new(()),
            stopped: AtomicBool::new(false),
        }
    }

    /// A leader's message was accepted now.
    pub(crate) fn heard_leader(&self) {
        let now = self.started.elapsed().as_millis() as u64;
        self.heard.store(now.max(1), Ordering::Relaxed);
    }

    pub(crate) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    /// When the last lease ends that this replica has granted to another node, as far as this process knows.
    pub(crate) fn lease_of_others(&self) -> Option<Instant> {
        if let heard @ 1.. = self.heard() {
            return Some(self.started + Duration::from_millis(heard + 1) + self.timing.lease);
        }
        self.promised.filter(|leader| *leader != self.node).map(|_| self.started + self.timing.lease)
    }

    fn withholds(&self, candidate: NodeId) -> bool {
        let from_before = self.heard() == 0 && self.promised.is_some_and(|leader| leader != candidate);
        from_before && self.started.elapsed() < self.timing.lease
    }

    /// True if `candidate` is the leader this replica follows, so that the lease in the way is the candidate's own.
    fn is_own_lease(&self, candidate: NodeId) -> bool {
        self.raft.borrow_watched().current_leader == Some(candidate.0) && candidate != self.node
    }

    pub(crate) async fn vote(&self, mut request: VoteRequest) -> Result<VoteResponse, String> {
        let candidate = NodeId(request.vote.leader_id.node_id);
        if !request.leadership_transfer {
            if self.withholds(candidate) {
                self.metrics.votes_withheld.inc();
                return Err(format!("vote withheld until an earlier leader's lease ends, group={}", self.id));
            }
            request.leadership_transfer = self.is_own_lease(candidate);
        }
        self.replica.vote(request).await
    }

    pub(crate) async fn pre_vote(&self, request: VoteRequest) -> Result<VoteResponse, String> {
        let candidate = NodeId(request.vote.leader_id.node_id);
        if self.withholds(candidate) {
            self.metrics.votes_withheld.inc();
            return Err(format!("vote withheld until an earlier leader's lease ends, group={}", self.id));
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

    pub(crate) fn state(&self) -> ServerState {
        self.raft.borrow_watched().state
    }

    pub(crate) fn leader(&self) -> Option<NodeId> {
        self.raft.borrow_watched().current_leader.map(NodeId)
    }

    pub(crate) async fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.replica.stop().await;
    }
}
