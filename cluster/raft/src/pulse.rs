//! The clock of all groups of a host: heartbeats, elections, silent connections, checkpoints.
//!
//! One task, started by `host`. openraft's own ticks are off: a hundred groups would wake a hundred timers sixteen
//! times a second, and their heartbeats would never share a system call.
//!
//! An election is asked for as soon as the leader's lease has run out (never earlier: the peers would refuse), first by
//! the group's preferred node, and only while a majority can be reached. Groups whose own last vote made this node
//! their leader ask at once after a start.

use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;

use crate::command::NodeId;
use crate::group::checkpoint;
use crate::host::HostState;
use crate::member::Member;

/// How often the clock looks at every group.
const BEAT: Duration = Duration::from_millis(50);
/// Head start of each voter over the next one in the group's order of preference.
const RANK_STEP: Duration = Duration::from_millis(60);
/// Slack after a lease, so that the peers' leases, which began a moment apart, have run out too.
const LEASE_SLACK: Duration = Duration::from_millis(10);
/// Pause between two pre-vote rounds of one group: they cost two messages and change nothing.
const RETRY: Duration = Duration::from_millis(150);
/// How often logs are measured for checkpoints.
const CHECKPOINT_EVERY: Duration = Duration::from_millis(500);
/// Checkpoints under way at once: each syncs many files.
const CHECKPOINTS_AT_ONCE: usize = 2;

/// Runs until the host is dropped.
pub(crate) async fn run(host: Weak<HostState>) {
    let mut next_heartbeat = Instant::now();
    let mut next_checkpoint = Instant::now() + CHECKPOINT_EVERY;
    let mut beat = tokio::time::interval(BEAT);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let permits = Arc::new(tokio::sync::Semaphore::new(CHECKPOINTS_AT_ONCE));
    loop {
        beat.tick().await;
        let Some(host) = host.upgrade() else { return };
        let members = host.members();
        let now = Instant::now();
        let heartbeat = now >= next_heartbeat;
        if heartbeat {
            next_heartbeat = now + host.timing.heartbeat;
            host.peers.cut_silent();
        }
        for member in &members {
            look_at(&host, member, now, heartbeat);
        }
        if now >= next_checkpoint {
            next_checkpoint = now + CHECKPOINT_EVERY;
            start_checkpoints(&host, &members, &permits);
        }
    }
}

/// What one look at a group's cached state says.
enum Look {
    Nothing,
    Beat,
    Voter { voters: Vec<NodeId>, candidate: bool },
}

fn look(member: &Member, heartbeat: bool) -> Look {
    let raft = member.raft.borrow_watched();
    if raft.running_state.is_err() {
        return Look::Nothing;
    }
    if raft.state == ServerState::Leader {
        return if heartbeat { Look::Beat } else { Look::Nothing };
    }
    // Nothing to do while the leader was heard lately, which is the common case: decided without allocating.
    if let heard @ 1.. = member.heard() {
        let silence = member.started.elapsed().saturating_sub(Duration::from_millis(heard));
        if silence < member.timing.lease {
            return Look::Nothing;
        }
    }
    let voters: Vec<NodeId> = raft.membership_config.voter_ids().map(NodeId).collect();
    if !voters.contains(&member.node) {
        return Look::Nothing;
    }
    Look::Voter { voters, candidate: raft.state == ServerState::Candidate }
}

fn look_at(host: &HostState, member: &Arc<Member>, now: Instant, heartbeat: bool) {
    match look(member, heartbeat) {
        Look::Nothing => {}
        Look::Beat => poke(member, member.replica.heartbeat()),
        Look::Voter { voters, .. } if voters == [member.node] => campaign(member, now, false),
        Look::Voter { voters, candidate } => {
            let mut up = 1;
            for peer in
                voters.iter().filter(|voter| **voter != member.node).map(|voter| host.peers.peer(*voter))
            {
                up += usize::from(peer.is_up());
                peer.warm();
            }
            let is_due = now >= deadline(member, &voters);
            if is_due && up * 2 > voters.len() && may_retry(member, now) {
                let pause = if candidate { member.timing.election_min } else { RETRY };
                set_retry(member, now + pause + RANK_STEP * rank(member, &voters));
                tracing::debug!(group = %member.id, candidate, "standing for election");
                campaign(member, now, true);
            }
        }
    }
}

fn campaign(member: &Member, now: Instant, pre_vote: bool) {
    if !pre_vote {
        if !may_retry(member, now) {
            return;
        }
        set_retry(member, now + member.timing.election_min);
    }
    member.metrics.elections.inc();
    poke(member, member.replica.elect(pre_vote));
}

/// Hands a group's core something if it takes it at once. One that is stuck must not stop the clock of all others; it
/// is poked again at the next beat.
fn poke(member: &Member, what: impl Future<Output = ()>) {
    if tokio::task::unconstrained(what).now_or_never().is_none() {
        tracing::debug!(group = %member.id, "replica takes nothing now");
    }
}

fn may_retry(member: &Member, now: Instant) -> bool {
    let not_before = *member.campaign_not_before.lock().unwrap_or_else(PoisonError::into_inner);
    not_before.is_none_or(|at| now >= at)
}

fn set_retry(member: &Member, at: Instant) {
    *member.campaign_not_before.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
}

/// When this replica may stand: when the lease it knows of has run out, in the group's order of preference.
fn deadline(member: &Member, voters: &[NodeId]) -> Instant {
    let step = RANK_STEP * rank(member, voters);
    match member.lease_of_others() {
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

fn start_checkpoints(host: &Arc<HostState>, members: &[Arc<Member>], permits: &Arc<tokio::sync::Semaphore>) {
    let pinning = host.wal.pinning();
    for member in members {
        let pins = pinning.contains(&member.id);
        if !pins && member.log.bytes_since_checkpoint() < host.checkpoint_log_bytes {
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
