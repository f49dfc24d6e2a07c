//! The rule by cases, then a model: a replica's core with its queue, driven in any order, must keep every promise that
//! was given.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const LEASE: Duration = Duration::from_secs(10);

fn leader(term: u64, node_id: u64) -> LeaderId {
    LeaderId { term, node_id }
}

fn committed(leader: LeaderId) -> Option<Vote> {
    Some(Vote { leader_id: leader, committed: true })
}

/// A replica that follows `leader(5, 1)` since `start`.
fn follower(start: Moment) -> State {
    let mut state = State::new(LEASE, None, start);
    let begun = state.append_begins();
    assert!(state.accepted(leader(5, 1), true, begun, start));
    state
}

#[test]
fn a_beat_renews_the_promise_to_the_leader_on_disk_alone() {
    let start = Moment::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut state = follower(start);
    assert!(!state.beat(leader(5, 1), None, at(1)), "no vote on disk");
    assert!(!state.beat(leader(5, 1), committed(leader(6, 2)), at(1)), "a newer vote on disk");
    let candidate = Some(Vote { leader_id: leader(5, 1), committed: false });
    assert!(!state.beat(leader(5, 1), candidate, at(1)), "a vote for it, but it did not lead then");
    assert!(!state.beat(leader(6, 1), committed(leader(6, 1)), at(1)), "nothing of this term was accepted");
    assert!(state.withholds(NodeId(2), at(9)) && !state.withholds(NodeId(2), at(10)));
    assert!(state.beat(leader(5, 1), committed(leader(5, 1)), at(9)));
    assert!(state.withholds(NodeId(2), at(18)) && !state.withholds(NodeId(2), at(19)));
    assert!(!state.withholds(NodeId(1), at(10)), "the lease is the leader's own");
}

#[test]
fn no_beat_is_accepted_while_a_vote_is_in_the_core() {
    let start = Moment::now();
    let late = start + LEASE;
    let mut state = follower(start);
    assert!(!state.vote_begins(NodeId(2), None, false, start));
    assert!(state.vote_begins(NodeId(2), None, false, late));
    assert!(!state.beat(leader(5, 1), committed(leader(5, 1)), late), "it may be granted");
    state.vote_ended(false);
    assert!(state.beat(leader(5, 1), committed(leader(5, 1)), late), "it was not granted");
    assert!(!state.vote_begins(NodeId(2), None, false, late));
    assert!(state.vote_begins(NodeId(2), Some(leader(5, 1)), true, late), "the leader hands over");
    assert!(!state.beat(leader(5, 1), committed(leader(5, 1)), late));
}

#[test]
fn a_handing_over_breaks_the_promise_to_that_leader_alone() {
    let start = Moment::now();
    let mut state = follower(start);
    // Late requests in the name of an earlier leader, of one of the same term, and of one not heard of.
    for other in [leader(4, 1), leader(5, 2), leader(6, 2)] {
        assert!(!state.vote_begins(NodeId(3), Some(other), true, start), "{other:?}");
        state.released = Some(other);
        assert!(!state.vote_begins(NodeId(3), None, false, start), "{other:?}");
    }
    assert!(state.clone().vote_begins(NodeId(3), Some(leader(5, 1)), true, start));
    state.released = Some(leader(5, 1));
    assert!(state.vote_begins(NodeId(3), None, false, start));
    assert!(!state.campaign(NodeId(3), start), "the one that was chosen comes first");
}

#[test]
fn a_campaign_ends_with_an_append_that_was_begun_after_it() {
    let start = Moment::now();
    let late = start + LEASE;
    let mut state = follower(start);
    assert!(!state.campaign(NodeId(3), start), "the promise runs");
    let before = state.append_begins();
    assert!(state.campaign(NodeId(3), late));
    state.accepted(leader(5, 1), true, before, late);
    assert!(!state.beat(leader(5, 1), committed(leader(5, 1)), late), "the core may have taken it before");
    let after = state.append_begins();
    state.accepted(leader(5, 1), false, after, late);
    assert!(!state.beat(leader(5, 1), committed(leader(5, 1)), late), "its log does not match");
    state.accepted(leader(5, 1), true, after, late);
    assert!(state.beat(leader(5, 1), committed(leader(5, 1)), late));
}

#[test]
fn an_append_that_a_forced_vote_may_follow_in_the_core_is_not_acknowledged() {
    let start = Moment::now();
    let late = start + LEASE;
    let mut state = follower(start);
    // Leader (6, 2) sends an append while a vote in the name of (5, 1) is on its way into the core.
    let before = state.append_begins();
    assert!(state.vote_begins(NodeId(3), Some(leader(5, 1)), true, start));
    let during = state.append_begins();
    assert!(!state.clone().accepted(leader(6, 2), true, before, late));
    state.vote_ended(true);
    assert!(!state.clone().accepted(leader(6, 2), true, before, late));
    assert!(!state.clone().accepted(leader(6, 2), true, during, late));
    let after = state.append_begins();
    assert!(state.accepted(leader(6, 2), true, after, late), "the core has taken it after the vote");
}

#[test]
fn a_late_answer_of_an_older_leader_changes_nothing() {
    let start = Moment::now();
    let mut state = follower(start);
    let begun = state.append_begins();
    state.accepted(leader(6, 2), true, begun, start);
    assert!(!state.accepted(leader(5, 1), true, begun, start));
    assert!(state.withholds(NodeId(1), start));
    assert!(state.beat(leader(6, 2), committed(leader(6, 2)), start));
}

#[test]
fn a_replica_that_starts_keeps_what_it_may_have_promised() {
    let start = Moment::now();
    let mut state = State::new(LEASE, committed(leader(5, 1)), start);
    assert!(state.withholds(NodeId(2), start) && !state.withholds(NodeId(1), start));
    assert!(!state.withholds(NodeId(2), start + LEASE));
    assert!(!state.beat(leader(5, 1), committed(leader(5, 1)), start), "nothing was accepted in this run");
    let candidate = State::new(LEASE, Some(Vote { leader_id: leader(5, 1), committed: false }), start);
    assert!(!candidate.withholds(NodeId(2), start));
    assert!(!State::new(LEASE, None, start).withholds(NodeId(2), start));
}

/// What the core's queue holds.
#[derive(Clone, Copy, Debug)]
enum Message {
    Append {
        leader: LeaderId,
        begun: Begun,
        at: Moment,
    },
    /// Forced if a leader hands over.
    Vote {
        candidate: LeaderId,
        handed_over: Option<LeaderId>,
    },
    Campaign,
}

/// openraft's core as far as votes go. Its lease is renewed by appends alone, and does not count for forced votes.
struct Core {
    queue: VecDeque<Message>,
    vote: Vote,
    lease_until: Moment,
    /// A round of pre-votes that may win at any time later.
    standing: bool,
    /// Answers that were given and have not been noticed yet, in any order.
    answered: Vec<Message>,
}

const ME: u64 = 3;

impl Core {
    /// Takes one message. Returns the node that got a vote on disk, if one did, and the leader that handed over to it.
    fn step(&mut self, now: Moment) -> Option<(u64, Option<LeaderId>)> {
        let message = self.queue.pop_front()?;
        match message {
            Message::Append { leader, .. } => {
                let vote = Vote { leader_id: leader, committed: true };
                let known = (rank(self.vote.leader_id), self.vote.committed);
                if (rank(leader), true) >= known {
                    (self.vote, self.standing, self.lease_until) = (vote, false, now + LEASE);
                    self.answered.push(message);
                }
                None
            }
            Message::Vote { candidate, handed_over } => {
                let is_free = handed_over.is_some() || !self.vote.committed || now >= self.lease_until;
                let granted = is_free && rank(candidate) > rank(self.vote.leader_id);
                if granted {
                    (self.vote, self.standing) = (Vote { leader_id: candidate, committed: false }, false);
                }
                self.answered.push(message);
                granted.then_some((candidate.node_id, handed_over))
            }
            Message::Campaign => {
                self.standing |= !self.vote.committed || now >= self.lease_until;
                None
            }
        }
    }

    /// The pre-votes are in: this node votes for itself.
    fn win(&mut self) -> Option<(u64, Option<LeaderId>)> {
        let won = std::mem::take(&mut self.standing);
        if won {
            self.vote = Vote { leader_id: leader(self.vote.leader_id.term + 1, ME), committed: false };
        }
        won.then_some((ME, None))
    }
}

#[derive(Clone, Debug)]
enum Event {
    Append(u64, u64),
    Beat(u64, u64),
    AskVote(u64, u64, Option<(u64, u64)>),
    Campaign,
    Core,
    Win,
    Notice(usize),
    Wait(u64),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let leaders = || (1..4u64, 1..3u64);
    let event = prop_oneof![
        leaders().prop_map(|(term, node)| Event::Append(term, node)),
        leaders().prop_map(|(term, node)| Event::Beat(term, node)),
        leaders().prop_map(|(term, node)| Event::Beat(term, node)),
        (1..5u64, 1..3u64, proptest::option::of(leaders()))
            .prop_map(|(term, node, by)| Event::AskVote(term, node, by)),
        Just(Event::Campaign),
        Just(Event::Core),
        Just(Event::Core),
        Just(Event::Win),
        (0..3usize).prop_map(Event::Notice),
        (1..12u64).prop_map(Event::Wait),
    ];
    prop::collection::vec(event, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// After a beat or an append of a leader was accepted, nobody else gets a vote on disk for the length of a lease, unless that leader
    /// hands over.
    #[test]
    fn a_promise_is_kept(events in events()) {
        let mut now = Moment::now();
        let none = Vote { leader_id: leader(0, 0), committed: false };
        let mut state = State::new(LEASE, None, now);
        let mut core = Core { queue: VecDeque::new(), vote: none, lease_until: now, standing: false, answered: Vec::new() };
        // There is a newer leader only if a majority has let the older one's lease run out.
        let mut newest = (0, 0);
        let mut given: Vec<(LeaderId, Moment)> = Vec::new();
        for event in events {
            let voted = match event {
                Event::Append(term, node) => {
                    newest = newest.max((term, node));
                    core.queue.push_back(Message::Append { leader: leader(term, node), begun: state.append_begins(), at: now });
                    None
                }
                Event::Beat(term, node) => {
                    if state.beat(leader(term, node), Some(core.vote), now) {
                        prop_assert_eq!(core.vote, Vote { leader_id: leader(term, node), committed: true });
                        given.push((leader(term, node), now + LEASE));
                    }
                    None
                }
                Event::AskVote(term, node, by) => {
                    let handed_over = by.map(|(term, node)| leader(term, node));
                    if state.vote_begins(NodeId(node), handed_over, by.is_some(), now) {
                        core.queue.push_back(Message::Vote { candidate: leader(term, node), handed_over });
                    }
                    None
                }
                Event::Campaign => {
                    if state.campaign(NodeId(ME), now) {
                        core.queue.push_back(Message::Campaign);
                    }
                    None
                }
                Event::Core => core.step(now),
                Event::Win => core.win(),
                Event::Notice(at) => {
                    if at < core.answered.len() {
                        match core.answered.remove(at) {
                            Message::Append { leader, begun, at } => {
                                if state.accepted(leader, true, begun, now) {
                                    given.push((leader, at + LEASE));
                                }
                            }
                            Message::Vote { handed_over, .. } => state.vote_ended(handed_over.is_some()),
                            Message::Campaign => {}
                        }
                    }
                    None
                }
                Event::Wait(seconds) => {
                    now = now + Duration::from_secs(seconds);
                    None
                }
            };
            if let Some((candidate, handed_over)) = voted {
                for (to, until) in &given {
                    let is_over = now >= *until || rank(*to) < newest;
                    let is_free = candidate == to.node_id || handed_over == Some(*to) || is_over;
                    prop_assert!(is_free, "{candidate} got a vote promised to {to:?}");
                }
            }
        }
    }
}
