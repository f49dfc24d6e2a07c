//! Heartbeats: one message per peer for all groups that are led here, answered without waking a group.
//!
//! [`send`] is called by `pulse`, [`receive`] by `host`. openraft's own heartbeats cost a message, an answer and several
//! wake-ups per group and peer: a hundred idle groups would keep a core warm. They are still what a group falls back on
//! whose follower does not accept a beat: it has just started, lags, votes, campaigns, or knows another leader.
//!
//! What makes an accepted beat a promise that leases may rest on is `crate::promise`'s matter.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::peers::Peer;
use crate::clock::Moment;
use crate::codec::message::{BEATS_MAX, Beat, Reply, Request};
use crate::command::{GroupId, NodeId};
use crate::member::Member;
use crate::pulse::poke;
use crate::types::LeaderId;

/// A follower that accepted something so lately needs no heartbeat of openraft's although it refuses a beat: it lags a
/// little behind a stream of entries.
const HEARD_LATELY: Duration = Duration::from_millis(200);

/// A group that this node leads, and what its followers are told.
#[derive(Clone)]
pub(crate) struct Led {
    pub(crate) member: Arc<Member>,
    pub(crate) beat: Beat,
}

/// Tells `peer` that `me` leads all of `led`, and notes which groups it accepts. Waits at most `limit` for an answer.
pub(crate) async fn send(peer: Arc<Peer>, me: NodeId, led: Vec<Led>, limit: Duration) {
    // A peer that can not be reached could not be reached by another message either; the next beat tries again.
    let Ok(link) = peer.link().await else { return };
    for led in led.chunks(BEATS_MAX) {
        let beats = led.iter().map(|led| led.beat).collect();
        let begun = Moment::now();
        let lately = begun.before(HEARD_LATELY);
        let reply = link.call(GroupId(0), Request::Beats { leader: me, beats }, limit).await;
        let refused: HashSet<GroupId> = match reply {
            Ok(Reply::Heard { refused }) => refused.into_iter().collect(),
            // It does not know of beats.
            Ok(_) => led.iter().map(|led| led.beat.group).collect(),
            Err(_) => return,
        };
        for Led { member, beat } in led {
            let leader = LeaderId { term: beat.term, node_id: me.0 };
            if !refused.contains(&beat.group) {
                member.acks.note(peer.node(), leader, begun);
            } else if !member.acks.is_fresh(peer.node(), leader, lately) {
                member.metrics.beats_refused.inc();
                poke(member, member.replica.heartbeat());
            }
        }
    }
}

/// Answers the beats of `leader` for the groups among `members`.
pub(crate) fn receive(members: &HashMap<GroupId, Arc<Member>>, leader: NodeId, beats: &[Beat]) -> Reply {
    let is_heard = |beat: &Beat| {
        let leader = LeaderId { term: beat.term, node_id: leader.0 };
        members.get(&beat.group).is_some_and(|member| member.hears(leader, beat.committed))
    };
    Reply::Heard { refused: beats.iter().filter(|beat| !is_heard(beat)).map(|beat| beat.group).collect() }
}
