//! The heartbeat: tells the metadata server what is here, carries out what it orders.
//!
//! Called by no one: it runs from start to shutdown. Must not know: generated types (see [`transport`]), chunk files.
//! The replicas serve without it: when no metadata server answers, nothing is created, moved or deleted, that is all.

pub mod transport;

use crate::command::Command;
use crate::copyset::{Copyset, ServerState, chunkserver_of, node_of};
use crate::copysets::Copysets;
use crate::metrics::Metrics;
use crate::state_machine::meta::replace_file;
use bytes::Bytes;
use spline_raft::{Group, NodeId, RaftError, Role};
use spline_types::{ChunkserverId, CopysetId, VolumeId};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use transport::MdsClient;

/// Bounds of the interval that the metadata server asks for.
const INTERVAL: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(10);
/// Heartbeats in a row that do not name a replica before it is removed: longer than a change of leader of the metadata
/// server takes, so that a reply of a server that knows less removes nothing.
const UNWANTED_BEATS: u32 = 30;
/// The address book as it was last told, for a start without a metadata server.
const BOOK: &str = "addresses.json";

/// What is told.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// This server.
    pub id: ChunkserverId,
    /// Where it is reached.
    pub address: String,
    /// Bytes that chunks may take.
    pub capacity: u64,
    /// Bytes that they take.
    pub used: u64,
    /// No more chunks fit.
    pub full: bool,
    /// Its replicas.
    pub copysets: Vec<CopysetReport>,
}

/// What is told of a replica.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CopysetReport {
    /// Which copyset.
    pub id: CopysetId,
    /// This replica leads.
    pub leader: bool,
    /// Raft's term.
    pub term: u64,
    /// Index of the last applied entry.
    pub applied: u64,
    /// Index of the last entry.
    pub log_end: u64,
    /// This replica has failed: it takes part in nothing until this process starts again.
    pub stopped: bool,
    /// Voters; by the leader alone, like what follows.
    pub members: Vec<ChunkserverId>,
    /// Members without vote.
    pub learners: Vec<ChunkserverId>,
    /// Bytes of chunks by volume.
    pub usage: Vec<(VolumeId, u64)>,
    /// Volumes that were asked to be reclaimed and are gone here.
    pub reclaimed: Vec<VolumeId>,
}

/// What is ordered.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Orders {
    /// Time to the next heartbeat.
    pub interval: Duration,
    /// Everyone's address.
    pub addresses: Vec<(ChunkserverId, String)>,
    /// Replicas that this server should hold.
    pub assignments: Vec<Assignment>,
    /// Changes to copysets that it leads.
    pub operators: Vec<Operator>,
    /// Deleted volumes to remove from copysets that it leads.
    pub reclaims: Vec<(CopysetId, VolumeId)>,
    /// Servers that can not take another chunk.
    pub full: HashSet<ChunkserverId>,
}

/// A replica that this server should hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Assignment {
    /// Of which copyset.
    pub id: CopysetId,
    /// Its members.
    pub members: Vec<ChunkserverId>,
    /// It never had a leader: the first member initialises the group.
    pub bootstrap: bool,
}

/// A change to a copyset, for its leader.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operator {
    /// Add a replica, wait until it has caught up, remove another.
    Replace {
        /// Of which copyset.
        copyset: CopysetId,
        /// Who comes.
        add: ChunkserverId,
        /// Who goes.
        remove: ChunkserverId,
    },
    /// Hand leadership on.
    Transfer {
        /// Of which copyset.
        copyset: CopysetId,
        /// To whom.
        to: ChunkserverId,
    },
}

/// The heartbeat of one chunkserver.
pub struct Heartbeat {
    /// This server.
    pub id: ChunkserverId,
    /// The address that others are told.
    pub address: SocketAddr,
    /// The data directory.
    pub data_dir: PathBuf,
    /// The replicas.
    pub copysets: Arc<Copysets>,
    /// Whom the copysets ask who is full.
    pub server: Arc<ServerState>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Ends it.
    pub stop: CancellationToken,
    /// Changes that run.
    pub tasks: TaskTracker,
}

/// What is remembered between heartbeats.
#[derive(Default)]
struct Memory {
    /// Copysets with a change under way; the server repeats its orders until it sees them done.
    busy: Arc<Mutex<HashSet<CopysetId>>>,
    /// Reclaims that were ordered, to be reported when done.
    reclaims: BTreeMap<CopysetId, BTreeSet<VolumeId>>,
    /// How many heartbeats in a row did not name a replica.
    unwanted: HashMap<CopysetId, u32>,
    book: Vec<(ChunkserverId, String)>,
    silent: bool,
}

impl Heartbeat {
    /// Beats until `stop`.
    pub async fn run(self, mut mds: MdsClient) {
        let mut memory = Memory::default();
        let mut interval = Duration::from_secs(1);
        loop {
            let report = self.report(&memory);
            tokio::select! {
                () = self.stop.cancelled() => return,
                answer = mds.heartbeat(report) => match answer {
                    Ok(orders) => {
                        if std::mem::take(&mut memory.silent) {
                            tracing::info!("metadata server answers again");
                        }
                        interval = orders.interval.clamp(*INTERVAL.start(), *INTERVAL.end());
                        self.carry_out(&mut memory, orders).await;
                    }
                    Err(error) => {
                        self.metrics.heartbeat_failures.inc();
                        if !std::mem::replace(&mut memory.silent, true) {
                            tracing::warn!(error, "metadata server does not answer, replicas serve on");
                        }
                    }
                },
            }
            self.relieve(&memory);
            self.step_aside(&memory);
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(interval) => {}
            }
        }
    }

    fn report(&self, memory: &Memory) -> Report {
        let disk = self.copysets.disk();
        let (pool, full) = (disk.pool.status(), disk.pool.full());
        let all = self.copysets.all();
        let copysets: Vec<_> =
            all.iter().map(|(id, copyset)| report_of(*id, copyset, memory.reclaims.get(id))).collect();
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.metrics.copysets.set(count(copysets.len()));
        self.metrics.leaders.set(count(copysets.iter().filter(|report| report.leader).count()));
        self.metrics.pool_files.set(i64::try_from(pool.free).unwrap_or(i64::MAX));
        self.metrics.chunk_files.set(i64::try_from(pool.used).unwrap_or(i64::MAX));
        self.metrics.open_chunks.set(count(disk.open_chunks()));
        self.metrics.full.set(i64::from(full));
        let used = pool.used * crate::store::layout::FILE_BYTES;
        Report {
            id: self.id,
            address: self.address.to_string(),
            capacity: pool.capacity,
            used,
            full,
            copysets,
        }
    }

    async fn carry_out(&self, memory: &mut Memory, orders: Orders) {
        self.server.full.store(Arc::new(orders.full));
        if orders.addresses != memory.book {
            let book = resolve(&orders.addresses);
            self.server.book.store(Arc::new(book.clone()));
            self.copysets.host().set_addresses(book);
            if let Err(error) = save_book(&self.data_dir, &orders.addresses) {
                tracing::warn!(%error, "could not keep the address book");
            }
            memory.book = orders.addresses;
        }
        for assignment in &orders.assignments {
            self.assign(memory, assignment).await;
        }
        self.remove_unwanted(memory, &orders.assignments);
        for operator in orders.operators {
            self.operate(memory, operator);
        }
        memory.reclaims.clear();
        for (copyset, volume) in orders.reclaims {
            memory.reclaims.entry(copyset).or_default().insert(volume);
            self.reclaim(memory, copyset, volume);
        }
    }

    async fn assign(&self, memory: &Memory, assignment: &Assignment) {
        let copyset = match self.copysets.create(assignment.id).await {
            Ok(copyset) => copyset,
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(copyset = %assignment.id, error, "assigned replica could not be created");
                return;
            }
        };
        let first = assignment.members.first() == Some(&self.id);
        if assignment.bootstrap && first && copyset.group().status().voters.is_empty() {
            let members: Vec<_> = assignment.members.iter().copied().map(node_of).collect();
            self.change(memory, assignment.id, "bootstrap", move |group: Group| async move {
                group.bootstrap(&members).await
            });
        }
    }

    /// A replica that was moved away is not told so by raft: it goes when the metadata server no longer names it.
    fn remove_unwanted(&self, memory: &mut Memory, assignments: &[Assignment]) {
        let wanted: HashSet<_> = assignments.iter().map(|assignment| assignment.id).collect();
        for (id, copyset) in self.copysets.all() {
            if wanted.contains(&id) || copyset.group().status().role == Role::Leader {
                memory.unwanted.remove(&id);
                continue;
            }
            let beats = memory.unwanted.entry(id).or_default();
            *beats += 1;
            if *beats >= UNWANTED_BEATS && memory.busy.lock().expect("no panic under the lock").insert(id) {
                let (copysets, busy) = (Arc::clone(&self.copysets), Arc::clone(&memory.busy));
                self.tasks.spawn(async move {
                    match copysets.remove(id).await {
                        Ok(()) => tracing::info!(copyset = %id, "replica removed, it is not assigned to this server"),
                        Err(error) => {
                            tracing::error!(copyset = %id, error = format!("{error:#}"), "could not remove a replica");
                        }
                    }
                    busy.lock().expect("no panic under the lock").remove(&id);
                });
            }
        }
    }

    fn operate(&self, memory: &Memory, operator: Operator) {
        match operator {
            Operator::Replace { copyset, add, remove } => {
                self.change(memory, copyset, "replace peer", move |group: Group| async move {
                    group.change_members(&[node_of(add)], &[node_of(remove)]).await
                });
            }
            Operator::Transfer { copyset, to } => {
                self.change(memory, copyset, "transfer leader", move |group: Group| async move {
                    group.transfer_leadership(node_of(to)).await
                });
            }
        }
    }

    fn reclaim(&self, memory: &Memory, id: CopysetId, volume: VolumeId) {
        let Some(copyset) = self.copysets.get(id) else { return };
        let gone = copyset.shared().fence.read().expect("no panic under the lock").is_deleted(volume);
        if gone || !memory.busy.lock().expect("no panic under the lock").insert(id) {
            return;
        }
        let busy = Arc::clone(&memory.busy);
        self.tasks.spawn(async move {
            if let Err(fault) = copyset.propose(Command::DeleteVolume(volume), Bytes::new()).await {
                tracing::info!(copyset = %id, %volume, %fault, "could not remove a deleted volume yet");
            }
            busy.lock().expect("no panic under the lock").remove(&id);
        });
    }

    /// Runs one change of a copyset's group at a time.
    fn change<F>(
        &self,
        memory: &Memory,
        id: CopysetId,
        what: &'static str,
        work: impl FnOnce(Group) -> F + Send + 'static,
    ) where
        F: Future<Output = Result<(), RaftError>> + Send + 'static,
    {
        let Some(copyset) = self.copysets.get(id) else { return };
        if !memory.busy.lock().expect("no panic under the lock").insert(id) {
            return;
        }
        let busy = Arc::clone(&memory.busy);
        self.tasks.spawn(async move {
            match work(copyset.group().clone()).await {
                Ok(()) => tracing::info!(copyset = %id, what, "copyset changed"),
                Err(error) => tracing::warn!(copyset = %id, what, %error, "copyset could not be changed yet"),
            }
            busy.lock().expect("no panic under the lock").remove(&id);
        });
    }

    /// A leader whose log waits for space would keep its clients waiting with it: one that has room is asked to lead.
    fn step_aside(&self, memory: &Memory) {
        let full = self.server.full.load_full();
        for (id, copyset) in self.copysets.all() {
            if !copyset.shared().starved.load(Ordering::Acquire) {
                continue;
            }
            if copyset.group().status().role == Role::Leader {
                let (me, full) = (self.id, Arc::clone(&full));
                self.change(memory, id, "step aside, the disk is full", move |_| async move {
                    copyset.hand_on_for_room(|id| id != me && !full.contains(&id)).await
                });
            }
        }
    }

    /// Too many chunks are open because they are dirty: the copyset with most of them is checkpointed.
    fn relieve(&self, memory: &Memory) {
        if !self.copysets.disk().crowded() {
            return;
        }
        let dirtiest =
            self.copysets.all().into_iter().max_by_key(|(_, copyset)| copyset.shared().store.counts().1);
        if let Some((id, _)) = dirtiest {
            self.change(
                memory,
                id,
                "checkpoint",
                move |group: Group| async move { group.checkpoint().await },
            );
        }
    }
}

fn report_of(id: CopysetId, copyset: &Copyset, reclaims: Option<&BTreeSet<VolumeId>>) -> CopysetReport {
    let status = copyset.group().status();
    let index = |position: Option<spline_raft::LogPosition>| position.map_or(0, |position| position.index);
    let mut report = CopysetReport {
        id,
        leader: status.role == Role::Leader,
        term: status.term,
        applied: index(status.applied),
        log_end: index(status.last_log),
        stopped: status.role == Role::Stopped,
        ..CopysetReport::default()
    };
    if report.leader {
        let ids = |nodes: Vec<NodeId>| nodes.into_iter().filter_map(chunkserver_of).collect();
        let shared = copyset.shared();
        let fence = shared.fence.read().expect("no panic under the lock");
        report.members = ids(status.voters);
        report.learners = ids(status.learners);
        report.usage = shared.store.usage();
        let asked = reclaims.into_iter().flatten().copied();
        report.reclaimed = asked.filter(|volume| fence.is_deleted(*volume)).collect();
    }
    report
}

/// The address book as raft wants it. Names are looked up; what can not be is left out and logged.
fn resolve(book: &[(ChunkserverId, String)]) -> HashMap<NodeId, SocketAddr> {
    let mut addresses = HashMap::new();
    for (id, address) in book {
        match address.to_socket_addrs().ok().and_then(|mut found| found.next()) {
            Some(found) => drop(addresses.insert(node_of(*id), found)),
            None => tracing::warn!(chunkserver = %id, address, "address can not be resolved"),
        }
    }
    addresses
}

fn save_book(dir: &Path, book: &[(ChunkserverId, String)]) -> std::io::Result<()> {
    let book: BTreeMap<u32, &str> = book.iter().map(|(id, address)| (id.get(), address.as_str())).collect();
    replace_file(dir, BOOK, &serde_json::to_vec(&book)?)
}

/// The address book of the last run; empty if there is none.
pub fn load_book(dir: &Path) -> HashMap<NodeId, SocketAddr> {
    let read = std::fs::read(dir.join(BOOK)).ok();
    let book = read.and_then(|bytes| serde_json::from_slice::<BTreeMap<u32, String>>(&bytes).ok());
    let book: Vec<_> =
        book.into_iter().flatten().map(|(id, address)| (ChunkserverId::new(id), address)).collect();
    resolve(&book)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_book_survives_a_restart() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert!(load_book(dir.path()).is_empty());
        let book = vec![(ChunkserverId::new(1), "127.0.0.1:6800".to_owned())];
        save_book(dir.path(), &book).expect("saves");
        assert_eq!(load_book(dir.path()), resolve(&book));
        assert_eq!(load_book(dir.path()).len(), 1);
    }
}
