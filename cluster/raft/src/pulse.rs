//! The clock of all groups of a host: heartbeats, elections, silent connections, checkpoints.
//!
//! One task, started by `host`. openraft's own ticks are off: a hundred groups would wake a hundred timers sixteen
//! times a second, and their heartbeats would never share a message.
//!
//! It sleeps until something is due: the next heartbeat, the end of a follower's lease, the next look at a group that has
//! no leader.
//!
//! An election is asked for as soon as the leader's lease has run out (never earlier: the peers would refuse), first by
//! the group's preferred node, and only while a majority can be reached. Groups whose own last vote made this node
//! their leader ask at once after a start.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::Semaphore;

use crate::clock::Moment;
use crate::codec::message::Beat;
use crate::command::NodeId;
use crate::group::checkpoint;
use crate::host::HostState;
use crate::member::Member;
use crate::network::beats::{self, Led};

/// How often a group without a leader is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest pause of the clock.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Head start of each voter over the next one in the group's order of preference.
const RANK_STEP: Duration = Duration::from_millis(60);
/// Slack after a lease, so that the peers' leases, which began a moment apart, have run out too.
const LEASE_SLACK: Duration = Duration::from_millis(10);
/// Pause between two pre-vote rounds of one group: they cost two messages and change nothing.
const RETRY: Duration = Duration::from_millis(150);
/// Least time between two measurements of the logs for checkpoints.
const CHECKPOINT_EVERY: Duration = Duration::from_millis(250);
/// Checkpoints under way at once: each syncs many files.
const CHECKPOINTS_AT_ONCE: usize = 2;

/// Runs until the host is dropped.
pub(crate) async fn run(host: Weak<HostState>) {
    let Some(wake) = host.upgrade().map(|host| host.wake.clone()) else { return };
    let now = Moment::now();
    let permits = Arc::new(Semaphore::new(CHECKPOINTS_AT_ONCE));
    let mut clock = Clock { next_heartbeat: now, next_checkpoint: now + CHECKPOINT_EVERY, permits };
    loop {
        let next = match host.upgrade() {
            Some(host) => clock.turn(&host),
            None => return,
        };
        tokio::select! {
            () = tokio::time::sleep(next.since(Moment::now())) => {}
            () = wake.notified() => {}
        }
    }
}

struct Clock {
    next_heartbeat: Moment,
    next_checkpoint: Moment,
    permits: Arc<Semaphore>,
}

/// The groups led here, by the peer that is to hear of them.
type Followers = HashMap<NodeId, Vec<Led>>;

impl Clock {
    /// Does what is due; returns when to come again.
    fn turn(&mut self, host: &Arc<HostState>) -> Moment {
        let members = host.members();
        let now = Moment::now();
        let heartbeat = now >= self.next_heartbeat;
        if heartbeat {
            self.next_heartbeat = now + host.timing.heartbeat;
            host.peers.cut_silent();
        }
        let (mut next, mut followers, mut leads) = (now + PAUSE_MAX, Followers::new(), false);
        for member in &members {
            match look(member, now) {
                Look::Nothing => {}
                Look::Leader if heartbeat => leads |= add_followers(member, &mut followers),
                Look::Leader => leads = true,
                Look::Later(due) => next = next.min(due),
                Look::Voter { voters, candidate } => {
                    next = next.min(now + LOOK_EVERY);
                    stand(host, member, now, &voters, candidate);
                }
            }
        }
        for (node, led) in followers {
            tokio::spawn(beats::send(host.peers.peer(node), host.node, led, host.timing.lease));
        }
        if now >= self.next_checkpoint {
            self.next_checkpoint = now + CHECKPOINT_EVERY;
            members.iter().for_each(|member| member.inbound.drop_silent());
            start_checkpoints(host, &members, &self.permits);
        }
        if leads { next.min(self.next_heartbeat) } else { next }
    }
}

/// What one look at a group's cached state says.
enum Look {
    Nothing,
    Leader,
    /// Nothing before this.
    Later(Moment),
    Voter {
        voters: Vec<NodeId>,
        candidate: bool,
    },
}

fn look(member: &Member, now: Moment) -> Look {
    // What is published of a core that panicked stays as it was.
    if !member.is_running() {
        return Look::Nothing;
    }
    let raft = member.raft.borrow_watched();
    if raft.state == ServerState::Leader {
        return Look::Leader;
    }
    // Nothing to do while the leader was heard lately, which is the common case: decided without allocating.
    if let Some(until) = member.promise.quiet_until() {
        return Look::Later(until);
    }
    let voters: Vec<NodeId> = raft.membership_config.voter_ids().map(NodeId).collect();
    match voters.contains(&member.node) {
        true => Look::Voter { voters, candidate: raft.state == ServerState::Candidate },
        // Not initialised yet: it will be any moment.
        false if voters.is_empty() => Look::Later(now + LOOK_EVERY),
        false => Look::Nothing,
    }
}

/// Adds the peers that must hear that this replica leads. False if there are none.
fn add_followers(member: &Arc<Member>, followers: &mut Followers) -> bool {
    let raft = member.raft.borrow_watched();
    let (leader, committed) =
        (raft.vote.leader_id, raft.cluster_committed.as_ref().map_or(0, |id| id.index + 1));
    if leader.node_id != member.node.0 {
        return true;
    }
    if member.is_handing_over(leader.term) {
        // openraft knows whether the followers must be left free to vote.
        poke(member, member.replica.heartbeat());
        return true;
    }
    let beat = Beat { group: member.id, term: leader.term, committed };
    let peers = raft.membership_config.membership().nodes().map(|(node, _)| NodeId(*node));
    let mut any = false;
    for peer in peers.filter(|node| *node != member.node) {
        followers.entry(peer).or_default().push(Led { member: member.clone(), beat });
        any = true;
    }
    any
}

/// Stands for election if it is time to.
fn stand(host: &HostState, member: &Member, now: Moment, voters: &[NodeId], candidate: bool) {
    if voters == [member.node] {
        return stand_alone(member, now);
    }
    let mut up = 1;
    for peer in voters.iter().filter(|voter| **voter != member.node).map(|voter| host.peers.peer(*voter)) {
        up += usize::from(peer.is_up());
        peer.warm();
    }
    let is_due = now >= deadline(member, voters);
    if is_due && up * 2 > voters.len() && may_retry(member, now) {
        let pause = if candidate { member.timing.election_min } else { RETRY };
        set_retry(member, now + pause + RANK_STEP * rank(member, voters));
        tracing::debug!(group = %member.id, candidate, "standing for election");
        campaign(member, true);
    }
}

fn stand_alone(member: &Member, now: Moment) {
    if may_retry(member, now) {
        set_retry(member, now + member.timing.election_min);
        campaign(member, false);
    }
}

fn campaign(member: &Member, pre_vote: bool) {
    let ask = || poke(member, member.replica.elect(pre_vote));
    if member.promise.campaign(member.node, ask) {
        member.metrics.elections.inc();
    }
}

/// Hands a group's core something if it takes it at once. One that is stuck must not stop the clock of all others; it
/// is poked again at the next beat.
pub(crate) fn poke(member: &Member, what: impl Future<Output = ()>) {
    if tokio::task::unconstrained(what).now_or_never().is_none() {
        tracing::debug!(group = %member.id, "replica takes nothing now");
    }
}

fn may_retry(member: &Member, now: Moment) -> bool {
    let not_before = *member.campaign_not_before.lock().unwrap_or_else(PoisonError::into_inner);
    not_before.is_none_or(|at| now >= at)
}

fn set_retry(member: &Member, at: Moment) {
    *member.campaign_not_before.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
}

/// When this replica may stand: when the lease it knows of has run out, in the group's order of preference.
fn deadline(member: &Member, voters: &[NodeId]) -> Moment {
    let step = RANK_STEP * rank(member, voters);
    match member.promise.to_others(member.node) {
        Some(end) => end + LEASE_SLACK + step,
        None => member.started + step,
    }
}

/// Place of this node in the group's order of preference: rotated by the group, so that leaders spread.
fn rank(member: &Member, voters: &[NodeId]) -> u32 {
    let mut sorted = voters.to_vec();
    sorted.sort_unstable();
    let count = sorted.len().max(1);
    let at = sorted.iter().position(|voter| *voter == member.node).unwrap_or(0);
    ((at + count - member.id.0 as usize % count) % count) as u32
}

fn start_checkpoints(host: &Arc<HostState>, members: &[Arc<Member>], permits: &Arc<Semaphore>) {
    let pinning = host.wal.pinning();
    for member in members {
        let pins = pinning.contains(&member.id);
        let is_long = || member.log.bytes_since_checkpoint() >= host.checkpoint_log_bytes;
        // After a start the log may be long before anything of it is applied.
        let is_due = pins || (is_long() && member.has_unsaved());
        if !is_due {
            continue;
        }
        let Ok(permit) = permits.clone().try_acquire_owned() else { return };
        if member.checkpointing.try_lock().is_err() {
            continue;
        }
        let keep = if pins { 0 } else { host.checkpoint_log_bytes / 2 };
        let member = member.clone();
        tokio::spawn(async move {
            if let Err(error) = checkpoint(&member, keep).await {
                tracing::warn!(group = %member.id, %error, "checkpoint was not made");
            }
            drop(permit);
        });
    }
}

#[cfg(test)]
pub(crate) mod tests;
