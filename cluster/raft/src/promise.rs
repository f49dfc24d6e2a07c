//! What a replica has promised: after it heard its leader, it gives nobody else a vote for the length of a lease.
//!
//! Asked and told by `member` (votes), `pulse` (own campaigns), `network::receive` (appends) and `network::beats`
//! (heartbeats). Leaders read under this promise, so it must hold whatever the order of events. openraft keeps such a
//! promise too, but only for messages that pass through its core; heartbeats do not (see `network::beats`).
//!
//! The rule that makes a heartbeat safe to accept: from the moment it is accepted until its lease has run out, no vote
//! for another candidate, nor for this node itself, becomes durable. So it is accepted only if, under one lock,
//! - the vote on disk is the leader's: no later vote was given;
//! - no request for a vote is in openraft's core: it was let in when an earlier promise had run out, and may be granted;
//! - no campaign of this node may be under way: none was asked for since an append of the leader was accepted that was
//!   handed to the core after it. (Accepting an append ends a campaign; the core takes its messages in order.)
//!
//! A leader that hands its leadership on has stopped reading under the promise before it says so, for good as far as its
//! term goes. A vote that is asked for in its name breaks the promise to it, however late the request comes, and the
//! promise to no other. openraft's core is told to grant such a vote whatever its own lease says, so that an append which
//! another leader sent meanwhile must not count as a promise: it is not acknowledged.
//! A restart forgets everything here: a replica that finds itself committed to a leader on disk
//! starts as if it had heard that leader just now. The leader itself may be elected again at any time: the lease is its
//! own.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Moment;
use crate::command::NodeId;
use crate::types::{LeaderId, Vote};

/// One replica's promise.
pub(crate) struct Promise(Mutex<State>);

impl Promise {
    /// At the start, with the vote found on disk.
    pub(crate) fn new(lease: Duration, durable: Option<Vote>) -> Promise {
        Promise(Mutex::new(State::new(lease, durable, Moment::now())))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is whole once it is made.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An append is about to be handed to the core. What is returned goes into [`Promise::accepted`].
    pub(crate) fn append_begins(&self) -> Begun {
        self.state().append_begins()
    }

    /// The core accepted an append of `leader` (`matched`: and its log goes on from ours) that was begun at `begun`.
    /// False if `leader` must not be told: the core may have given another one a forced vote since.
    pub(crate) fn accepted(&self, leader: LeaderId, matched: bool, begun: Begun) -> bool {
        self.state().accepted(leader, matched, begun, Moment::now())
    }

    /// A heartbeat of `leader`. True renews the promise. `durable` reads the vote on disk.
    pub(crate) fn beat(&self, leader: LeaderId, durable: impl FnOnce() -> Option<Vote>) -> bool {
        let now = Moment::now();
        let mut state = self.state();
        // Read under the lock: a vote that began and ended before it is on disk by now.
        let durable = durable();
        state.beat(leader, durable, now)
    }

    /// Whether `candidate` may not even be told that it would get a vote.
    pub(crate) fn withholds(&self, candidate: NodeId) -> bool {
        self.state().withholds(candidate, Moment::now())
    }

    /// True lets a request for a vote into the core; [`Promise::vote_ended`] must follow its answer, and only that.
    /// `handed_over` is the leader in whose name it is asked for; `forced` says that the core's own lease will not count.
    pub(crate) fn vote_begins(&self, candidate: NodeId, handed_over: Option<LeaderId>, forced: bool) -> bool {
        self.state().vote_begins(candidate, handed_over, forced, Moment::now())
    }

    /// `leader` said that it hands its leadership over, to this replica or to another: no vote is kept back for it any more.
    /// This node still does not stand for election of its own accord: the one that was chosen comes first.
    pub(crate) fn handed_over(&self, leader: LeaderId) {
        let mut state = self.state();
        // A message of an older leader may be late.
        if state.released.is_none_or(|newest| rank(newest) < rank(leader)) {
            state.released = Some(leader);
        }
    }

    /// The leader that was last heard to hand its leadership over.
    pub(crate) fn released(&self) -> Option<LeaderId> {
        self.state().released
    }

    /// The core has answered, and what it granted is on disk.
    pub(crate) fn vote_ended(&self, forced: bool) {
        self.state().vote_ended(forced);
    }

    /// Lets `ask` tell the core to stand for election, unless the promise forbids it. True if it was asked.
    pub(crate) fn campaign(&self, me: NodeId, ask: impl FnOnce()) -> bool {
        let mut state = self.state();
        let may = state.campaign(me, Moment::now());
        if may {
            // Under the lock: an append that is begun after it is behind it in the core's queue.
            ask();
        }
        may
    }

    /// Until when a leader heard in this run is not to be doubted, if that lies ahead.
    pub(crate) fn quiet_until(&self) -> Option<Moment> {
        let state = self.state();
        Some(state.until).filter(|until| state.heard && *until > Moment::now())
    }

    /// When the promise to another node ends or ended; `None` if none is known.
    pub(crate) fn to_others(&self, me: NodeId) -> Option<Moment> {
        let state = self.state();
        state.leader.filter(|leader| leader.node_id != me.0).map(|_| state.until)
    }
}

/// How many campaigns this replica has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Campaigns(u64);

/// What was so when an append was handed to the core.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun {
    campaigns: Campaigns,
    /// Forced votes that the core had answered.
    forced: u64,
}

#[derive(Clone, Debug)]
struct State {
    lease: Duration,
    /// The newest leader heard, or found on disk.
    leader: Option<LeaderId>,
    /// Until when nobody else gets a vote.
    until: Moment,
    /// A leader was heard in this run.
    heard: bool,
    /// The core follows `leader`, and no campaign was asked for since.
    follows: bool,
    campaigns: Campaigns,
    /// The leader that was last heard to hand its leadership over.
    released: Option<LeaderId>,
    /// Requests for votes that the core has not answered.
    votes: u64,
    /// Forced votes that were let into the core, and how many of them it has answered.
    forced: u64,
    forced_answered: u64,
}

impl State {
    fn new(lease: Duration, durable: Option<Vote>, now: Moment) -> State {
        let leader = durable.filter(|vote| vote.committed).map(|vote| vote.leader_id);
        let campaigns = Campaigns::default();
        State {
            lease,
            leader,
            until: now + lease,
            heard: false,
            follows: false,
            campaigns,
            released: None,
            votes: 0,
            forced: 0,
            forced_answered: 0,
        }
    }

    fn append_begins(&self) -> Begun {
        Begun { campaigns: self.campaigns, forced: self.forced_answered }
    }

    fn accepted(&mut self, leader: LeaderId, matched: bool, begun: Begun, now: Moment) -> bool {
        let is_safe = self.forced == begun.forced;
        // The answer to an older leader's message may be late: the promise to the newer one stands.
        if self.leader.is_some_and(|newest| rank(newest) > rank(leader)) {
            return false;
        }
        if self.leader != Some(leader) {
            self.follows = false;
        }
        self.leader = Some(leader);
        self.heard = true;
        self.until = self.until.max(now + self.lease);
        self.follows |= matched && begun.campaigns == self.campaigns;
        is_safe
    }

    fn beat(&mut self, leader: LeaderId, durable: Option<Vote>, now: Moment) -> bool {
        let is_ours = self.leader == Some(leader) && self.follows && self.votes == 0;
        let is_durable = durable.is_some_and(|vote| vote.committed && vote.leader_id == leader);
        if is_ours && is_durable {
            self.until = self.until.max(now + self.lease);
        }
        is_ours && is_durable
    }

    fn withholds(&self, candidate: NodeId, now: Moment) -> bool {
        now < self.until && self.leader.is_some_and(|leader| leader.node_id != candidate.0)
    }

    fn vote_begins(
        &mut self,
        candidate: NodeId,
        handed_over: Option<LeaderId>,
        forced: bool,
        now: Moment,
    ) -> bool {
        let is_free = self.leader.is_some() && [handed_over, self.released].contains(&self.leader);
        if !is_free && self.withholds(candidate, now) {
            return false;
        }
        self.votes += 1;
        self.forced += u64::from(forced);
        true
    }

    fn vote_ended(&mut self, forced: bool) {
        self.votes -= 1;
        self.forced_answered += u64::from(forced);
    }

    fn campaign(&mut self, me: NodeId, now: Moment) -> bool {
        if self.withholds(me, now) {
            return false;
        }
        self.follows = false;
        self.campaigns.0 += 1;
        true
    }
}

/// Leaders in the order in which votes compare.
fn rank(leader: LeaderId) -> (u64, u64) {
    (leader.term, leader.node_id)
}

#[cfg(test)]
mod tests;
