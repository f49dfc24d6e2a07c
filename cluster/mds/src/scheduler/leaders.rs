//! Spreads leadership: a chunkserver that leads far more than its share hands some of it over, gently.

use super::{Operator, View};
use spline_types::ChunkserverId;
use std::collections::BTreeMap;
use std::time::Duration;

/// Most transfers in flight: each one stalls its copyset's writes for a round trip.
pub const TRANSFERS_MAX: usize = 4;
/// A chunkserver that came up more recently than this is not handed leadership: it may still be catching up.
pub const SETTLE: Duration = Duration::from_secs(10);

/// Leading this many copysets is still fair for a chunkserver whose share is `share`.
fn tolerated(share: f64) -> usize {
    (share * 1.2).floor() as usize + 2
}

/// Each up chunkserver's share of leadership: in proportion to the replicas it holds.
fn shares(view: &View) -> BTreeMap<ChunkserverId, f64> {
    let mut shares = BTreeMap::new();
    for copyset in view.copysets.iter().filter(|copyset| copyset.leader.is_some()) {
        let up: Vec<_> = copyset.members.iter().filter(|member| view.is_up(**member)).collect();
        for member in &up {
            *shares.entry(**member).or_insert(0.0) += 1.0 / up.len() as f64;
        }
    }
    shares
}

/// At most `room` transfers to start.
pub fn transfers(view: &View, room: usize) -> Vec<Operator> {
    let shares = shares(view);
    let mut leads: BTreeMap<ChunkserverId, usize> = shares.keys().map(|id| (*id, 0)).collect();
    for copyset in &view.copysets {
        let leader = view.transfers.get(&copyset.id).copied().or(copyset.leader);
        if let Some(leader) = leader {
            *leads.entry(leader).or_insert(0) += 1;
        }
    }
    let room = room.min(TRANSFERS_MAX.saturating_sub(view.transfers.len()));
    let mut operators = Vec::new();
    for copyset in &view.copysets {
        let Some(from) = copyset.leader else { continue };
        if operators.len() >= room {
            break;
        }
        let count = |id: &ChunkserverId| leads.get(id).copied().unwrap_or(0);
        let fair = tolerated(shares.get(&from).copied().unwrap_or(0.0));
        if copyset.replacing.is_some() || view.transfers.contains_key(&copyset.id) || count(&from) <= fair {
            continue;
        }
        // A full one may wait for space with every entry that needs some.
        let settled = |id: &ChunkserverId| {
            view.servers.get(id).is_some_and(|server| server.up_for >= SETTLE && !server.full)
        };
        let to = copyset
            .members
            .iter()
            .copied()
            .filter(|member| *member != from && view.is_up(*member) && settled(member))
            .min_by_key(|member| (count(member), *member));
        if let Some(to) = to
            && count(&to) + 2 <= count(&from)
        {
            *leads.entry(from).or_insert(0) -= 1;
            *leads.entry(to).or_insert(0) += 1;
            operators.push(Operator::Transfer { copyset: copyset.id, to });
        }
    }
    operators
}
