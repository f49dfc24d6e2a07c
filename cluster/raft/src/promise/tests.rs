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
    let begun = state.campaigns;
    state.accepted(leader(5, 1), true, begun, start);
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
    assert!(!state.vote_begins(NodeId(2), None, start));
    assert!(state.vote_begins(NodeId(2), None, late));
    assert!(!state.beat(leader(5, 1), committed(leader(5, 1)), late), "it may be granted");
    state.votes -= 1;
    assert!(state.beat(leader(5, 1), committed(leader(5, 1)), late), "it was not granted");
    assert!(!state.vote_begins(NodeId(2), None, late));
    assert!(state.vote_begins(NodeId(2), Some(leader(5, 1)), late), "the leader hands over");
    assert!(!state.beat(leader(5, 1), committed(leader(5, 1)), late));
}

#[test]
fn a_handing_over_breaks_the_promise_to_that_leader_alone() {
    let start = Moment::now();
    let mut state = follower(start);
    // Late requests in the name of an earlier leader, of one of the same term, and of one not heard of.
    for other in [leader(4, 1), leader(5, 2), leader(6, 2)] {
        assert!(!state.vote_begins(NodeId(3), Some(other), start), "{other:?}");
        state.released = Some(other);
        assert!(!state.vote_begins(NodeId(3), None, start), "{other:?}");
    }
    assert!(state.clone().vote_begins(NodeId(3), Some(leader(5, 1)), start));
    state.released = Some(leader(5, 1));
    assert!(state.vote_begins(NodeId(3), None, start));
    assert!(!state.campaign(NodeId(3), start), "the one that was chosen comes first");
}

#[test]
fn a_campaign_ends_with_an_append_that_was_begun_after_it() {
    let start = Moment::now();
    let late = start + LEASE;
    let mut state = follower(start);
    assert!(!state.campaign(NodeId(3), start), "the promise runs");
    let before = state.campaigns;
    assert!(state.campaign(NodeId(3), late));
    state.accepted(leader(5, 1), true, before, late);
    assert!(!state.beat(leader(5, 1), committed(leader(5, 1)), late), "the core may have taken it before");
    let after = state.campaigns;
    state.accepted(leader(5, 1), false, after, late);
    assert!(!state.beat(leader(5, 1), committed(leader(5, 1)), late), "its log does not match");
    state.accepted(leader(5, 1), true, after, late);
    assert!(state.beat(leader(5, 1), committed(leader(5, 1)), late));
}

#[test]
fn a_late_answer_of_an_older_leader_changes_nothing() {
    let start = Moment::now();
    let mut state = follower(start);
    state.accepted(leader(6, 2), true, Campaigns(0), start);
    state.accepted(leader(5, 1), true, Campaigns(0), start);
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
    Append { leader: LeaderId, begun: Campaigns },
    Vote { candidate: LeaderId, handed_over: Option<LeaderId> },
    Campaign,
}

/// openraft's core as far as votes go, with no lease of its own: the promise must do without it.
struct Core {
    queue: VecDeque<Message>,
    vote: Vote,
    /// A round of pre-votes that may win at any time later.
    standing: bool,
    /// Answers that were given and have not been noticed yet, in any order.
    answered: Vec<Message>,
}

const ME: u64 = 3;

impl Core {
    /// Takes one message. Returns the node that got a vote on disk, if one did, and the leader that handed over to it.
    fn step(&mut self) -> Option<(u64, Option<LeaderId>)> {
        let message = self.queue.pop_front()?;
        match message {
            Message::Append { leader, .. } => {
                let vote = Vote { leader_id: leader, committed: true };
                let known = (rank(self.vote.leader_id), self.vote.committed);
                if (rank(leader), true) >= known {
                    (self.vote, self.standing) = (vote, false);
                    self.answered.push(message);
                }
                None
            }
            Message::Vote { candidate, handed_over } => {
                let granted = rank(candidate) > rank(self.vote.leader_id);
                if granted {
                    (self.vote, self.standing) = (Vote { leader_id: candidate, committed: false }, false);
                }
                self.answered.push(message);
                granted.then_some((candidate.node_id, handed_over))
            }
            Message::Campaign => {
                self.standing = true;
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

    /// After a beat of a leader was accepted, nobody else gets a vote on disk for the length of a lease, unless that leader
    /// hands over.
    #[test]
    fn a_promise_given_to_a_beat_is_kept(events in events()) {
        let mut now = Moment::now();
        let none = Vote { leader_id: leader(0, 0), committed: false };
        let mut state = State::new(LEASE, None, now);
        let mut core = Core { queue: VecDeque::new(), vote: none, standing: false, answered: Vec::new() };
        let mut given: Vec<(LeaderId, Moment)> = Vec::new();
        for event in events {
            let voted = match event {
                Event::Append(term, node) => {
                    core.queue.push_back(Message::Append { leader: leader(term, node), begun: state.campaigns });
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
                    if state.vote_begins(NodeId(node), handed_over, now) {
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
                Event::Core => core.step(),
                Event::Win => core.win(),
                Event::Notice(at) => {
                    if at < core.answered.len() {
                        match core.answered.remove(at) {
                            Message::Append { leader, begun } => state.accepted(leader, true, begun, now),
                            Message::Vote { .. } => state.votes -= 1,
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
                    let is_free = candidate == to.node_id || handed_over == Some(*to) || now >= *until;
                    prop_assert!(is_free, "{candidate} got a vote promised to {to:?}");
                }
            }
        }
    }
}
