//! Rebuilds lost replicas: a member whose chunkserver is gone, or has been down for long, is replaced by one on a
//! chunkserver that is up, in a zone that no other member uses.

use super::{Limits, Operator, View};
use crate::topology::ServerState;
use spline_types::ChunkserverId;

/// Whether replicas on this chunkserver are taken for lost.
fn is_lost(view: &View, id: ChunkserverId, limits: Limits) -> bool {
    match view.servers.get(&id) {
        None => true,
        Some(server) => match server.state {
            ServerState::Up => false,
            ServerState::Gone => true,
            ServerState::Down => server.silent_for >= limits.rebuild_after,
        },
    }
}

/// At most `room` replacements to start. A copyset without a leader can not change its members and is left alone.
pub fn replacements(view: &View, limits: Limits, room: usize) -> Vec<Operator> {
    let mut load = view.replicas();
    let mut operators = Vec::new();
    for copyset in &view.copysets {
        if operators.len() >= room {
            break;
        }
        if copyset.leader.is_none() || copyset.replacing.is_some() || view.transfers.contains_key(&copyset.id)
        {
            continue;
        }
        let Some(remove) = copyset.members.iter().copied().find(|member| is_lost(view, *member, limits))
        else {
            continue;
        };
        let staying: Vec<ChunkserverId> =
            copyset.members.iter().copied().filter(|member| *member != remove).collect();
        let zone_is_free = |zone: &str| {
            !staying.iter().any(|member| view.servers.get(member).is_some_and(|server| server.zone == zone))
        };
        let newcomer = view
            .servers
            .iter()
            .filter(|(id, server)| {
                server.state == ServerState::Up
                    && !server.full
                    && !copyset.members.contains(id)
                    && zone_is_free(&server.zone)
            })
            .map(|(id, _)| *id)
            .min_by_key(|id| (load.get(id).copied().unwrap_or(0), *id));
        if let Some(add) = newcomer {
            *load.entry(add).or_insert(0) += 1;
            operators.push(Operator::Replace { copyset: copyset.id, add, remove });
        }
    }
    operators
}

/// Replacements to give up: the newcomer was lost before it became a member, or there is nothing left to remove.
pub fn aborts(view: &View, limits: Limits) -> Vec<Operator> {
    let lost = view.copysets.iter().filter_map(|copyset| {
        let replacing = copyset.replacing?;
        let joined = copyset.members.contains(&replacing.add);
        let pointless = is_lost(view, replacing.add, limits) || !copyset.members.contains(&replacing.remove);
        (!joined && pointless).then_some(Operator::Abort { copyset: copyset.id, add: replacing.add })
    });
    lost.collect()
}
