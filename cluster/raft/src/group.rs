//! One replica of one raft group, as its user sees it: propose, read, status, members, checkpoint.
//!
//! Called by the chunkserver's copysets and by the MDS. `acked_is_durable`: an answer to a proposal means that a
//! majority has it on disk. Reads are linearizable: by the leader's lease, or by a round to the followers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, ForwardReason};
use openraft::impls::EmptyNode;
use openraft::{ChangeMembers, ServerState};

use crate::clock::Moment;
use crate::command::{Answer, GroupId, LogCommand, LogPosition, NodeId};
use crate::error::{ProposeError, RaftError};
use crate::member::Member;
use crate::places::{Placed, Places};
use crate::rounds::Proposal;
use crate::types::{LeaderId, position, proposer};
use crate::wal::Wal;

/// Longest wait for a transfer of leadership to be seen done.
const TRANSFER_LIMIT: Duration = Duration::from_secs(3);

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
#[derive(Clone)]
pub struct Group {
    pub(crate) member: Arc<Member>,
    pub(crate) wal: Wal,
    pub(crate) places: Arc<Places>,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("id", &self.member.id).field("status", &self.status()).finish()
    }
}

/// The right to answer one local read linearizably. Read, then ask [`ReadLease::still_held`].
pub struct ReadLease {
    /// `None`: a round to the followers came first, and any later read is linearizable.
    leased: Option<(Arc<Member>, LeaderId)>,
}

impl std::fmt::Debug for ReadLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadLease").field("by_lease", &self.leased.is_some()).finish()
    }
}

impl ReadLease {
    /// True if the data read since the lease was taken may be returned. False if the process was stopped or starved
    /// in between: take a new lease and read again.
    pub fn still_held(&self) -> bool {
        match &self.leased {
            None => true,
            Some((member, leader)) => held_lease(member) == Some(*leader),
        }
    }
}

/// The leadership under which this replica may read now without asking anybody, from cached state.
fn held_lease(member: &Member) -> Option<LeaderId> {
    let raft = member.raft.borrow_watched();
    let leader = raft.vote.leader_id;
    // Applied past the first entry of its own term: everything acknowledged by earlier leaders is in the state.
    let is_ready = raft.state == ServerState::Leader
        && raft.running_state.is_ok()
        && !member.stopped.load(Ordering::Acquire)
        && leader.node_id == member.node.0
        && raft.last_applied.as_ref().is_some_and(|applied| applied.leader_id == leader);
    if !is_ready || member.is_handing_over(leader.term) {
        return None;
    }
    // The cached state may lag behind a vote that this replica has given: that is on disk before it counts.
    if member.log.vote().is_none_or(|vote| vote.leader_id != leader) {
        return None;
    }
    // Alone, no lease is needed: nobody can be elected without this node's vote.
    let is_alone = || {
        let mut voters = raft.membership_config.voter_ids();
        voters.next() == Some(member.node.0) && voters.next().is_none()
    };
    if !member.has_grown.load(Ordering::Acquire) && is_alone() {
        return Some(leader);
    }
    let acked = member.quorum_heard(&raft)?;
    (acked.elapsed() < member.timing.read_lease()).then_some(leader)
}

/// Why a proposal was not carried out, before it is given up.
enum Refusal {
    /// openraft's leader has heard from no majority within its lease; nothing was logged.
    Idle,
    Final(ProposeError),
}

impl From<ProposeError> for Refusal {
    fn from(error: ProposeError) -> Self {
        Refusal::Final(error)
    }
}

impl Group {
    /// Which group this is.
    pub fn id(&self) -> GroupId {
        self.member.id
    }

    /// Writes the first membership. Every member may call it with the same members. Ok if the group is initialised.
    ///
    /// # Errors
    /// `Refused` if this node is not among `members`.
    pub async fn bootstrap(&self, members: &[NodeId]) -> Result<(), RaftError> {
        if self.member.log.vote().is_some() || self.member.raft.borrow_watched().last_log_index.is_some() {
            return Ok(());
        }
        let nodes = members.iter().map(|node| (node.0, EmptyNode::new())).collect();
        self.member.replica.initialize(nodes).await
    }

    /// Replicates a command and returns what `apply` answered here.
    ///
    /// # Errors
    /// `NotLeader`, `LogFull` and `Overloaded`: certainly not logged. `Unknown`: may still commit.
    pub async fn propose(&self, command: LogCommand) -> Result<Answer, ProposeError> {
        let metrics = &self.member.metrics;
        metrics.proposals.inc();
        let begun = Instant::now();
        let renewals = self.member.renewals.load(Ordering::Acquire);
        let mut refused = self.propose_once(command.clone()).await;
        if matches!(refused, Err(Refusal::Idle)) && self.renew(renewals).await.is_ok() {
            refused = self.propose_once(command).await;
        }
        let outcome = refused.map_err(|refusal| match refusal {
            Refusal::Idle => ProposeError::NotLeader { leader: self.other_leader() },
            Refusal::Final(error) => error,
        });
        match &outcome {
            Ok(_) => metrics.propose_seconds.observe(begun.elapsed().as_secs_f64()),
            Err(_) => drop(metrics.proposals_refused.inc()),
        }
        outcome
    }

    async fn propose_once(&self, command: LogCommand) -> Result<Answer, Refusal> {
        self.require_room()?;
        let Some(place) = self.places.take(&command).await else {
            self.require_room()?;
            return Err(ProposeError::Overloaded.into());
        };
        let command = Placed { command, place: Some(place), is_bundle: false };
        let (proposer, outcome) = proposer();
        let queued = self.member.rounds.send(Proposal { command, proposer }).await;
        if queued.is_err() || !self.member.is_running() {
            return Err(ProposeError::Stopped.into());
        }
        let Ok((entry, number)) = outcome.await else { return Err(ProposeError::Unknown.into()) };
        let entry = entry.lock().expect("nothing panics under the lock");
        match &*entry {
            Ok(applied) => applied.data.get(number).cloned().ok_or(ProposeError::Unknown.into()),
            Err(ClientWriteError::ForwardToLeader(forward)) => match forward.reason {
                ForwardReason::LeaseExpired => Err(Refusal::Idle),
                _ => Err(ProposeError::NotLeader { leader: forward.leader_id.map(NodeId) }.into()),
            },
            Err(_) => Err(ProposeError::Unknown.into()),
        }
    }

    fn require_room(&self) -> Result<(), ProposeError> {
        match &self.wal {
            wal if wal.spare() => Ok(()),
            wal if wal.poisoned() => Err(ProposeError::Stopped),
            _ => Err(ProposeError::LogFull),
        }
    }

    /// Lets openraft's leader hear from a majority: it takes no proposal without, and knows nothing of heartbeats. One
    /// round for all that wait; none if there was one since `seen` was read.
    async fn renew(&self, seen: u64) -> Result<(), ()> {
        let (member, begun) = (&self.member, Moment::now());
        let mut failed = member.round.lock().await;
        if member.renewals.load(Ordering::Acquire) != seen {
            return Ok(());
        }
        // Without a majority, those who wait must not try one after the other.
        if failed.is_some_and(|at| at >= begun) {
            return Err(());
        }
        let outcome = member.replica.read_round(member.timing.election_min).await;
        match outcome {
            Ok(()) => drop(member.renewals.fetch_add(1, Ordering::Release)),
            Err(()) => *failed = Some(Moment::now()),
        }
        outcome
    }

    /// [`Group::renew`] before a change of members.
    async fn renew_for_change(&self) -> Result<(), RaftError> {
        let renewed = self.renew(self.member.renewals.load(Ordering::Acquire)).await;
        renewed.map_err(|()| RaftError::Refused("a majority does not answer".to_owned()))
    }

    /// Ready when a linearizable local read may start. Cheap while the leader's lease holds; otherwise one round to
    /// the followers, shared by all reads that wait.
    ///
    /// # Errors
    /// `NotLeader` if this replica does not lead or reaches no majority.
    pub async fn read_lease(&self) -> Result<ReadLease, ProposeError> {
        let member = &self.member;
        if let Some(leader) = held_lease(member) {
            member.metrics.reads_by_lease.inc();
            return Ok(ReadLease { leased: Some((member.clone(), leader)) });
        }
        self.require_leader()?;
        let begun = Moment::now();
        let mut failed = member.round.lock().await;
        if let Some(leader) = held_lease(member) {
            member.metrics.reads_by_lease.inc();
            return Ok(ReadLease { leased: Some((member.clone(), leader)) });
        }
        self.require_leader()?;
        let outcome = if failed.is_some_and(|at| at >= begun) { Err(()) } else { self.read_round().await };
        match outcome {
            Ok(()) => {
                member.metrics.reads_by_round.inc();
                Ok(ReadLease { leased: None })
            }
            Err(()) => {
                *failed = Some(Moment::now());
                member.metrics.reads_refused.inc();
                Err(ProposeError::NotLeader { leader: self.other_leader() })
            }
        }
    }

    /// One round to the followers: openraft's, which waits until everything committed before is applied, and then
    /// until a majority has really accepted a message sent since it began.
    async fn read_round(&self) -> Result<(), ()> {
        let (member, begun) = (&self.member, Moment::now());
        let limit = member.timing.election_min;
        member.replica.read_round(limit).await?;
        let is_heard =
            || member.quorum_heard(&member.raft.borrow_watched()).is_some_and(|heard| heard >= begun);
        tokio::time::timeout(limit, member.acks.until(is_heard)).await.map_err(drop)
    }

    fn require_leader(&self) -> Result<(), ProposeError> {
        if !self.member.is_running() {
            return Err(ProposeError::Stopped);
        }
        if self.member.state() == ServerState::Leader {
            return Ok(());
        }
        self.member.metrics.reads_refused.inc();
        Err(ProposeError::NotLeader { leader: self.other_leader() })
    }

    fn other_leader(&self) -> Option<NodeId> {
        self.member.leader().filter(|leader| *leader != self.member.node)
    }

    /// Role, leader, positions and members as this replica sees them; from cached values.
    pub fn status(&self) -> GroupStatus {
        let raft = self.member.raft.borrow_watched();
        let role = match raft.state {
            _ if raft.running_state.is_err() || self.member.stopped.load(Ordering::Acquire) => Role::Stopped,
            ServerState::Leader => Role::Leader,
            ServerState::Follower => Role::Follower,
            ServerState::Candidate => Role::Candidate,
            ServerState::Learner => Role::Learner,
            ServerState::Shutdown => Role::Stopped,
        };
        // A node that was leader and restarted names itself until somebody is elected.
        let leader = raft.current_leader.map(NodeId);
        let leader = leader.filter(|leader| (*leader == self.member.node) == (role == Role::Leader));
        GroupStatus {
            role,
            leader,
            term: raft.current_term,
            last_log: self.member.log.last().as_ref().map(position),
            applied: raft.last_applied.as_ref().map(position),
            voters: raft.membership_config.voter_ids().map(NodeId).collect(),
            learners: raft.membership_config.membership().learner_ids().map(NodeId).collect(),
        }
    }

    /// Adds and removes members: newcomers become learners, catch up by log or snapshot, then one joint change. Waits
    /// until done; a newcomer that can not be reached is waited for. Already done parts are skipped.
    ///
    /// # Errors
    /// `NotLeader`; `Refused` if another change is under way or nobody would be left.
    pub async fn change_members(&self, add: &[NodeId], remove: &[NodeId]) -> Result<(), RaftError> {
        let status = self.status();
        if status.role != Role::Leader {
            return Err(RaftError::NotLeader(status.leader));
        }
        if !add.is_empty() {
            self.member.has_grown.store(true, Ordering::Release);
        }
        for node in add.iter().filter(|node| !status.voters.contains(node)) {
            self.renew_for_change().await?;
            self.member.replica.add_learner(node.0).await?;
        }
        let now = self.status();
        let mut voters: BTreeSet<u64> = now.voters.iter().chain(add).map(|node| node.0).collect();
        voters.retain(|node| !remove.contains(&NodeId(*node)));
        if voters.is_empty() {
            return Err(RaftError::Refused("a group can not lose its last member".to_owned()));
        }
        if voters != now.voters.iter().map(|node| node.0).collect() {
            self.renew_for_change().await?;
            self.member.replica.change(ChangeMembers::ReplaceAllVoters(voters)).await?;
        }
        let left: BTreeSet<u64> =
            self.status().learners.iter().filter(|node| remove.contains(node)).map(|node| node.0).collect();
        if !left.is_empty() {
            self.renew_for_change().await?;
            self.member.replica.change(ChangeMembers::RemoveNodes(left)).await?;
        }
        Ok(())
    }

    /// Hands leadership to another voter and waits until it leads.
    ///
    /// # Errors
    /// `NotLeader`; `Refused` if `to` has no vote or does not take over in time (then an election decides).
    pub async fn transfer_leadership(&self, to: NodeId) -> Result<(), RaftError> {
        let status = self.status();
        if status.role != Role::Leader {
            return Err(RaftError::NotLeader(status.leader));
        }
        if to == self.member.node {
            return Ok(());
        }
        if !status.voters.contains(&to) {
            return Err(RaftError::Refused(format!("leadership can only go to a voter, node={to}")));
        }
        // The followers will vote although our lease runs: from here on it must not be read under.
        self.member.acks.hand_over(status.term);
        self.member.replica.transfer(to.0).await?;
        let mut raft = self.member.raft.clone();
        let (from, term) = (self.member.node.0, status.term);
        let wait = async {
            loop {
                let (leader, now) = {
                    let raft = raft.borrow_and_update();
                    (raft.current_leader, raft.current_term)
                };
                match leader {
                    Some(leader) if leader == to.0 => return Ok(()),
                    Some(leader) if leader != from || now > term => {
                        return Err(RaftError::Refused(format!(
                            "another leader was elected, leader={leader}"
                        )));
                    }
                    _ => {}
                }
                raft.changed().await.map_err(|_| RaftError::Stopped("replica stopped".to_owned()))?;
            }
        };
        let timeout = || RaftError::Refused(format!("leadership was not taken over in time, node={to}"));
        tokio::time::timeout(TRANSFER_LIMIT, wait).await.unwrap_or_else(|_| Err(timeout()))
    }

    /// Checkpoints now and purges the whole log behind the checkpoint.
    ///
    /// # Errors
    /// `Stopped`, also if the checkpoint failed (then the replica has stopped).
    pub async fn checkpoint(&self) -> Result<(), RaftError> {
        checkpoint(&self.member, 0).await
    }

    /// Waits until this replica has stopped, and says why.
    pub async fn stopped(&self) -> String {
        let mut raft = self.member.raft.clone();
        loop {
            if let Err(fatal) = raft.borrow_and_update().running_state.clone() {
                return fatal.to_string();
            }
            if raft.changed().await.is_err() {
                return "it ended without a word".to_owned();
            }
        }
    }

    /// Stops this replica. Its log stays.
    pub async fn shutdown(&self) {
        self.member.stop().await;
    }
}

/// Builds a checkpoint of what is applied now, then purges the log behind it except for about `keep` bytes, so that a
/// follower that was away for a moment need not take a snapshot.
pub(crate) async fn checkpoint(member: &Member, keep: u64) -> Result<(), RaftError> {
    let _one = member.checkpointing.lock().await;
    let mut raft = member.raft.clone();
    let Some(target) = raft.borrow_watched().last_applied else { return Ok(()) };
    let mut ask_at = tokio::time::Instant::now();
    let built = loop {
        let (built, running) = {
            let now = raft.borrow_and_update();
            (now.snapshot, now.running_state.clone())
        };
        running.map_err(|fatal| RaftError::Stopped(fatal.to_string()))?;
        match built {
            Some(built) if built.index >= target.index => break built,
            // Asked again now and then: a build of an older state may have been under way.
            _ if ask_at <= tokio::time::Instant::now() => {
                member.replica.build_checkpoint().await?;
                ask_at = tokio::time::Instant::now() + member.timing.heartbeat;
            }
            _ => {}
        }
        // Woken by every change of the replica's state.
        let changed = tokio::time::timeout_at(ask_at, raft.changed()).await;
        if let Ok(Err(_)) = changed {
            return Err(RaftError::Stopped("replica stopped".to_owned()));
        }
    };
    let upto = match keep {
        0 => Some(built.index),
        keep => member.log.purge_to_keep(keep).map(|index| index.min(built.index)),
    };
    match upto {
        Some(index) => member.replica.purge(index).await,
        None => Ok(()),
    }
}
