//! What a heartbeat is answered: the address book, the replicas to hold, the operators and deletions to carry out.
//!
//! Called by [`super::Cluster`]. Pure. Must never know: generated types, the log.

use crate::config::Config;
use crate::scheduler::Operator;
use crate::state::MetaState;
use crate::topology::Topology;
use spline_types::{ChunkserverId, CopysetId, VolumeId};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Heartbeat interval while a chunkserver waits for its copysets or for their leaders.
pub const BUSY_INTERVAL: Duration = Duration::from_millis(100);
/// How long after a chunkserver came up its copysets may make it report so often: past it they will not be led soon.
const BUSY_LIMIT: Duration = Duration::from_secs(30);
/// Most reclaims of one reply; the rest follow with the next.
const RECLAIMS_MAX: usize = 1000;

/// A replica to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Of which copyset.
    pub copyset: CopysetId,
    /// Who holds replicas, a newcomer last.
    pub members: Vec<ChunkserverId>,
    /// The group was never led: its first member initialises it.
    pub bootstrap: bool,
}

/// The answer to a heartbeat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// When to report again.
    pub interval: Duration,
    /// Every chunkserver with an address of its own.
    pub book: Vec<(ChunkserverId, String)>,
    /// Every replica that the chunkserver should hold.
    pub assignments: Vec<Assignment>,
    /// Replacements and transfers in copysets that it leads.
    pub operators: Vec<Operator>,
    /// Deleted volumes to remove from copysets that it leads.
    pub reclaims: Vec<(CopysetId, VolumeId)>,
    /// Chunkservers that can not take another chunk.
    pub full: Vec<ChunkserverId>,
}

/// What chunkserver `id` is to do. `transfers`: leader transfers in flight, copyset and next leader.
pub fn orders(
    state: &MetaState,
    topology: &Topology,
    transfers: &BTreeMap<CopysetId, ChunkserverId>,
    id: ChunkserverId,
    config: &Config,
    now: Instant,
) -> Orders {
    let mut orders = Orders {
        interval: config.heartbeat,
        book: book(state),
        full: state.chunkservers().map(|server| server.id).filter(|id| topology.is_full(*id)).collect(),
        ..Orders::default()
    };
    let mut waiting = state.copyset_count() == 0;
    for (copyset, row) in state.copysets() {
        if row.holders().any(|holder| holder == id) {
            let bootstrap = !row.led;
            orders.assignments.push(Assignment { copyset, members: row.holders().collect(), bootstrap });
            waiting |= topology.leader(copyset, now).is_none();
        }
        if topology.leader(copyset, now).is_none_or(|leader| leader.chunkserver != id) {
            continue;
        }
        if let Some(replacing) = row.replacing {
            let (add, remove) = (replacing.add, replacing.remove);
            orders.operators.push(Operator::Replace { copyset, add, remove });
        } else if let Some(to) = transfers.get(&copyset) {
            orders.operators.push(Operator::Transfer { copyset, to: *to });
        }
        let deleted = state.deletions().filter(|(_, left)| left.remaining.contains_key(&copyset.get()));
        let room = RECLAIMS_MAX - orders.reclaims.len();
        orders.reclaims.extend(deleted.map(|(volume, _)| (copyset, volume)).take(room));
    }
    if waiting && topology.up_for(id, now) < BUSY_LIMIT {
        orders.interval = BUSY_INTERVAL.min(config.heartbeat);
    }
    orders
}

/// Who is where. A store that lost its address is left out: whoever answers there is not it.
pub fn book(state: &MetaState) -> Vec<(ChunkserverId, String)> {
    state
        .chunkservers()
        .filter(|server| !server.gone)
        .filter_map(|server| Some((server.id, server.address.clone()?)))
        .collect()
}
