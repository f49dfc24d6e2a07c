//! What chunkservers say about themselves: soft state, in memory, lost with the process and told anew within a
//! heartbeat.
//!
//! Called by [`crate::cluster`]. Pure: time comes as an argument. Who is a chunkserver and who holds which copyset is
//! replicated state; who is up, who leads and how full each one is lies here.
//! Must never know: the log, the network, generated types.

use spline_types::{ChunkserverId, CopysetId, VolumeId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// One chunkserver's report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    /// Bytes that its data directory may use.
    pub capacity: u64,
    /// Bytes in use.
    pub used: u64,
    /// It can not take another chunk.
    pub full: bool,
    /// Its version.
    pub version: String,
    /// Its replicas.
    pub replicas: Vec<ReplicaReport>,
}

/// What a heartbeat says about one replica.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplicaReport {
    /// Of which copyset.
    pub copyset: CopysetId,
    /// It leads.
    pub leader: bool,
    /// Its raft term.
    pub term: u64,
    /// Its applied index.
    pub applied: u64,
    /// The raft voters, from leaders.
    pub members: Vec<ChunkserverId>,
    /// The raft learners, from leaders.
    pub learners: Vec<ChunkserverId>,
    /// Bytes by volume, from leaders.
    pub usage: Vec<(VolumeId, u64)>,
    /// Deleted volumes of which nothing is left in the copyset, from leaders.
    pub reclaimed: Vec<VolumeId>,
    /// It has failed and takes part in nothing.
    pub stopped: bool,
}

/// What is known of a chunkserver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Liveness {
    /// When it was last heard.
    pub last_seen: Instant,
    /// Since when it has been heard without a gap.
    pub up_since: Instant,
    /// Its last report; `None` if it only registered.
    pub report: Option<Heartbeat>,
}

/// What is known of a copyset's leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Who leads.
    pub chunkserver: ChunkserverId,
    /// In which term.
    pub term: u64,
    /// The learners it has.
    pub learners: Vec<ChunkserverId>,
}

/// Whether a chunkserver can be counted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServerState {
    /// Heard within the limit.
    Up,
    /// Silent for longer.
    Down,
    /// Its store was replaced.
    Gone,
}

impl ServerState {
    /// The word for people and metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Gone => "gone",
        }
    }
}

/// All soft state about chunkservers and copysets.
#[derive(Debug)]
pub struct Topology {
    started: Instant,
    down_after: Duration,
    servers: HashMap<ChunkserverId, Liveness>,
    leaders: HashMap<CopysetId, Leader>,
    usage: HashMap<CopysetId, BTreeMap<VolumeId, u64>>,
    /// Replicas that their chunkservers reported as stopped, by chunkserver.
    stopped: HashMap<ChunkserverId, BTreeSet<CopysetId>>,
}

impl Topology {
    /// Nothing heard yet; `started` is when listening began.
    pub fn new(down_after: Duration, started: Instant) -> Self {
        Self {
            started,
            down_after,
            servers: HashMap::new(),
            leaders: HashMap::new(),
            usage: HashMap::new(),
            stopped: HashMap::new(),
        }
    }

    /// A chunkserver was heard without a report: it registered.
    pub fn seen(&mut self, id: ChunkserverId, now: Instant) {
        let down_after = self.down_after;
        let server =
            self.servers.entry(id).or_insert(Liveness { last_seen: now, up_since: now, report: None });
        if now.saturating_duration_since(server.last_seen) >= down_after {
            server.up_since = now;
        }
        server.last_seen = now;
    }

    /// A chunkserver reported.
    pub fn report(&mut self, id: ChunkserverId, mut heartbeat: Heartbeat, now: Instant) {
        let mut stopped = BTreeSet::new();
        for replica in std::mem::take(&mut heartbeat.replicas) {
            if replica.stopped {
                stopped.insert(replica.copyset);
            }
            self.report_replica(id, replica);
        }
        self.stopped.insert(id, stopped);
        self.seen(id, now);
        if let Some(server) = self.servers.get_mut(&id) {
            server.report = Some(heartbeat);
        }
    }

    fn report_replica(&mut self, id: ChunkserverId, replica: ReplicaReport) {
        let known = self.leaders.get(&replica.copyset);
        if replica.leader {
            if known.is_some_and(|leader| leader.term > replica.term) {
                return;
            }
            self.usage.insert(replica.copyset, replica.usage.into_iter().collect());
            let leader = Leader { chunkserver: id, term: replica.term, learners: replica.learners };
            self.leaders.insert(replica.copyset, leader);
        } else if known.is_some_and(|leader| leader.chunkserver == id && leader.term <= replica.term) {
            self.leaders.remove(&replica.copyset);
        }
    }

    /// Whether a chunkserver said last that its replica of a copyset has stopped.
    pub fn has_stopped(&self, copyset: CopysetId, id: ChunkserverId) -> bool {
        self.stopped.get(&id).is_some_and(|stopped| stopped.contains(&copyset))
    }

    /// What is known of a chunkserver; `None` if it was not heard since this process started.
    pub fn server(&self, id: ChunkserverId) -> Option<&Liveness> {
        self.servers.get(&id)
    }

    /// How long a chunkserver has been silent; one that was never heard, since listening began.
    pub fn silent_for(&self, id: ChunkserverId, now: Instant) -> Duration {
        let since = self.servers.get(&id).map_or(self.started, |server| server.last_seen);
        now.saturating_duration_since(since)
    }

    /// Whether a chunkserver was heard lately.
    pub fn is_up(&self, id: ChunkserverId, now: Instant) -> bool {
        self.servers.contains_key(&id) && self.silent_for(id, now) < self.down_after
    }

    /// How long a chunkserver has been up; zero if it is not.
    pub fn up_for(&self, id: ChunkserverId, now: Instant) -> Duration {
        match self.servers.get(&id) {
            Some(server) if self.is_up(id, now) => now.saturating_duration_since(server.up_since),
            _ => Duration::ZERO,
        }
    }

    /// Whether a chunkserver said that it can not take another chunk.
    pub fn is_full(&self, id: ChunkserverId) -> bool {
        self.servers.get(&id).and_then(|server| server.report.as_ref()).is_some_and(|report| report.full)
    }

    /// Bytes that a chunkserver may use; 0 if not known.
    pub fn capacity(&self, id: ChunkserverId) -> u64 {
        self.servers.get(&id).and_then(|server| server.report.as_ref()).map_or(0, |report| report.capacity)
    }

    /// The leader of a copyset, if it is known and up.
    pub fn leader(&self, copyset: CopysetId, now: Instant) -> Option<&Leader> {
        self.leaders.get(&copyset).filter(|leader| self.is_up(leader.chunkserver, now))
    }

    /// The last term in which a leader of the copyset was heard; 0 if none was.
    pub fn term(&self, copyset: CopysetId) -> u64 {
        self.leaders.get(&copyset).map_or(0, |leader| leader.term)
    }

    /// Bytes stored by volume, one replica's worth.
    pub fn bytes_by_volume(&self) -> HashMap<VolumeId, u64> {
        let mut sums = HashMap::new();
        for (volume, bytes) in self.usage.values().flatten() {
            *sums.entry(*volume).or_insert(0) += bytes;
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOWN_AFTER: Duration = Duration::from_secs(5);
    const COPYSET: CopysetId = CopysetId::new(1);

    fn id(raw: u32) -> ChunkserverId {
        ChunkserverId::new(raw)
    }

    fn heartbeat(leader: bool, term: u64, bytes: u64) -> Heartbeat {
        let usage = vec![(VolumeId::new(9), bytes)];
        let replica = ReplicaReport { copyset: COPYSET, leader, term, usage, ..ReplicaReport::default() };
        Heartbeat { replicas: vec![replica], ..Heartbeat::default() }
    }

    #[test]
    fn silence_makes_a_chunkserver_down_and_its_copysets_leaderless() {
        let start = Instant::now();
        let mut topology = Topology::new(DOWN_AFTER, start);
        assert!(!topology.is_up(id(1), start), "never heard");
        assert_eq!(topology.silent_for(id(1), start + DOWN_AFTER), DOWN_AFTER);
        topology.report(id(1), heartbeat(true, 1, 10), start);
        let late = start + DOWN_AFTER;
        let just_before = late - Duration::from_millis(1);
        assert!(topology.is_up(id(1), just_before) && topology.leader(COPYSET, just_before).is_some());
        assert!(!topology.is_up(id(1), late) && topology.leader(COPYSET, late).is_none());
        assert_eq!(topology.up_for(id(1), just_before), DOWN_AFTER - Duration::from_millis(1));
        topology.report(id(1), heartbeat(true, 1, 10), late);
        assert_eq!(topology.up_for(id(1), late), Duration::ZERO, "it was away in between");
    }

    #[test]
    fn the_newest_term_leads() {
        let now = Instant::now();
        let mut topology = Topology::new(DOWN_AFTER, now);
        let leader = |topology: &Topology| topology.leader(COPYSET, now).map(|leader| leader.chunkserver);
        topology.report(id(1), heartbeat(true, 3, 10), now);
        topology.report(id(2), heartbeat(true, 2, 99), now);
        assert_eq!(leader(&topology), Some(id(1)), "a deposed leader that does not know it yet");
        topology.report(id(2), heartbeat(true, 4, 20), now);
        assert_eq!(leader(&topology), Some(id(2)));
        topology.report(id(1), heartbeat(false, 4, 0), now);
        assert_eq!(leader(&topology), Some(id(2)), "a follower's report does not depose the leader");
        assert_eq!(topology.bytes_by_volume().get(&VolumeId::new(9)), Some(&20));
        topology.report(id(2), heartbeat(false, 5, 0), now);
        assert_eq!(leader(&topology), None);
    }
}
