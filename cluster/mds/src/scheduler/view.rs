//! What the schedulers look at: replicated and soft state of one moment, joined.

use crate::state::MetaState;
use crate::state::record::Replacing;
use crate::topology::{ServerState, Topology};
use spline_types::{ChunkserverId, CopysetId};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The cluster at one moment.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// All chunkservers.
    pub servers: BTreeMap<ChunkserverId, ServerView>,
    /// All copysets, by id.
    pub copysets: Vec<CopysetView>,
    /// Leader transfers in flight: copyset and next leader.
    pub transfers: BTreeMap<CopysetId, ChunkserverId>,
}

/// A chunkserver at one moment.
#[derive(Clone, Debug)]
pub struct ServerView {
    /// Its failure zone.
    pub zone: String,
    /// Up, down or gone.
    pub state: ServerState,
    /// How long it has been silent.
    pub silent_for: Duration,
    /// How long it has been up.
    pub up_for: Duration,
    /// It can not take another chunk.
    pub full: bool,
}

/// A copyset at one moment.
#[derive(Clone, Debug)]
pub struct CopysetView {
    /// Which.
    pub id: CopysetId,
    /// The raft voters.
    pub members: Vec<ChunkserverId>,
    /// Who leads, if known and up.
    pub leader: Option<ChunkserverId>,
    /// The replacement under way.
    pub replacing: Option<Replacing>,
}

impl View {
    /// Joins replicated and soft state as of `now`.
    pub fn of(
        state: &MetaState,
        topology: &Topology,
        transfers: BTreeMap<CopysetId, ChunkserverId>,
        now: Instant,
    ) -> Self {
        let servers = state.chunkservers().map(|server| {
            let view = ServerView {
                zone: server.zone.clone(),
                state: server_state(server.gone, topology.is_up(server.id, now)),
                silent_for: topology.silent_for(server.id, now),
                up_for: topology.up_for(server.id, now),
                full: topology.is_full(server.id),
            };
            (server.id, view)
        });
        let copysets = state.copysets().map(|(id, copyset)| CopysetView {
            id,
            members: copyset.members.clone(),
            leader: topology.leader(id, now).map(|leader| leader.chunkserver),
            replacing: copyset.replacing,
        });
        Self { servers: servers.collect(), copysets: copysets.collect(), transfers }
    }

    /// Whether a chunkserver is up.
    pub fn is_up(&self, id: ChunkserverId) -> bool {
        self.servers.get(&id).is_some_and(|server| server.state == ServerState::Up)
    }

    /// Replicas by chunkserver, newcomers on their way included.
    pub fn replicas(&self) -> BTreeMap<ChunkserverId, usize> {
        let mut counts = BTreeMap::new();
        for copyset in &self.copysets {
            let newcomer = copyset.replacing.map(|replacing| replacing.add);
            let newcomer = newcomer.filter(|add| !copyset.members.contains(add));
            for holder in copyset.members.iter().copied().chain(newcomer) {
                *counts.entry(holder).or_insert(0) += 1;
            }
        }
        counts
    }
}

/// Up, down or gone.
pub const fn server_state(gone: bool, up: bool) -> ServerState {
    match (gone, up) {
        (true, _) => ServerState::Gone,
        (false, true) => ServerState::Up,
        (false, false) => ServerState::Down,
    }
}
