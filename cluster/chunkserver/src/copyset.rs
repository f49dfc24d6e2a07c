//! One copyset's replica: takes chunk requests, proposes changes, reads under a lease.
//!
//! Called by the service for every chunk request, and by the heartbeat for reports. Must not know: frames, the metadata
//! server.
//! Invariants: `acked_is_durable` (a change is answered after its entry was applied), `fence_before_serve` (a read of a
//! newer epoch first makes that epoch durable through the log; a write carries it in its own entry), `bounded`.

use crate::command::{Command, decode_answer};
use crate::mend;
use crate::state_machine::Shared;
use crate::store::{Patience, Reservation, StoreError};
use crate::successor::Asked;
use arc_swap::ArcSwap;
use bytes::Bytes;
use spline_raft::{Group, GroupStatus, NodeId, ProposeError, RaftError, RaftHost, Role};
use spline_types::{ChunkCommand, ChunkOp, ChunkserverId, Extent, Fault, Invalid, Unavailable};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Requests that one copyset has in hand; more are refused as overloaded. Two volumes' worth.
const INFLIGHT_REQUESTS: usize = 2048;
/// Reads of more than this leave the runtime's thread: copying them out of the page cache takes too long there.
const INLINE_READ_BYTES: u32 = 128 << 10;
/// How often a read begins anew because its lease ran out under it, before it is refused.
const READ_TRIES: usize = 3;
/// Damaged blocks that one read has mended, before it is left to another replica.
const MENDS: usize = 64;

/// What all copysets of a server share.
pub struct ServerState {
    /// The raft host, which knows the peers that are connected.
    pub host: RaftHost,
    /// Bytes in hand, in blocks of 4 KiB; `bounded`.
    pub budget: Semaphore,
    /// Servers that can not take another chunk, as the metadata server last said.
    pub full: ArcSwap<HashSet<ChunkserverId>>,
    /// Where the peers are, as the metadata server last said.
    pub book: ArcSwap<HashMap<NodeId, SocketAddr>>,
}

impl ServerState {
    /// Bytes that all requests in hand may carry.
    pub const BUDGET_BYTES: usize = 256 << 20;
    const UNIT: usize = 4096;

    /// Nothing in hand, nobody full.
    pub fn new(host: RaftHost) -> Self {
        Self {
            host,
            budget: Semaphore::new(Self::BUDGET_BYTES / Self::UNIT),
            full: ArcSwap::default(),
            book: ArcSwap::default(),
        }
    }

    fn admit(&self, bytes: usize) -> Result<SemaphorePermit<'_>, Fault> {
        let units = u32::try_from(bytes.div_ceil(Self::UNIT).max(1)).unwrap_or(u32::MAX);
        self.budget.try_acquire_many(units).map_err(|_| Fault::Unavailable(Unavailable::Overloaded))
    }
}

/// What a request gave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A change was carried out.
    Done,
    /// The bytes of a read.
    Data(Bytes),
    /// The answer of a status.
    Extents(Vec<Extent>),
}

/// One replica.
pub struct Copyset {
    shared: Arc<Shared>,
    group: Group,
    server: Arc<ServerState>,
    inflight: Semaphore,
    /// Held while an epoch is logged, so that the reads of a new session do it once.
    fencing: tokio::sync::Mutex<()>,
    /// Who was asked to lead because a block is damaged here. Held while leadership is handed on.
    asked_for_data: tokio::sync::Mutex<Asked>,
    /// Who was asked to lead because the disk is full here. Held likewise.
    asked_for_room: tokio::sync::Mutex<Asked>,
}

impl Copyset {
    /// A replica over its running group.
    pub fn new(shared: Arc<Shared>, group: Group, server: Arc<ServerState>) -> Self {
        let (inflight, fencing) = (Semaphore::new(INFLIGHT_REQUESTS), tokio::sync::Mutex::new(()));
        let (asked_for_data, asked_for_room) = Default::default();
        Self { shared, group, server, inflight, fencing, asked_for_data, asked_for_room }
    }

    /// The raft group.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// The replicated state.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Who leads, if known.
    pub fn leader(&self) -> Option<ChunkserverId> {
        self.group.status().leader.and_then(chunkserver_of)
    }

    /// Carries out one request.
    ///
    /// # Errors
    /// `Invalid`; `Fenced`; `NoSpace`; `Unavailable`; `Corrupt` if the block is damaged here and probably elsewhere;
    /// `Internal` if the disk failed.
    pub async fn execute(&self, command: ChunkCommand, payload: Bytes) -> Result<Outcome, Fault> {
        let expected = if command.op == ChunkOp::Write { command.range.length() as usize } else { 0 };
        if payload.len() != expected {
            return Err(Fault::Invalid(Invalid::Flags));
        }
        let overloaded = |_| Fault::Unavailable(Unavailable::Overloaded);
        let _turn = self.inflight.try_acquire().map_err(overloaded)?;
        let carried = if matches!(command.op, ChunkOp::Read | ChunkOp::Peek) {
            command.range.length() as usize
        } else {
            expected
        };
        let _bytes = self.server.admit(carried)?;
        match command.op {
            ChunkOp::Read | ChunkOp::Status => self.read(command).await,
            // A peer judges it by its checksum.
            ChunkOp::Peek => self.read_here(command).await.map_err(|error| match error {
                StoreError::Corrupt { .. } => Fault::Corrupt,
                _ => Fault::Internal,
            }),
            ChunkOp::Write | ChunkOp::WriteZeroes | ChunkOp::Discard => self.change(command, payload).await,
        }
    }

    /// Proposes a change of the copyset's own, such as the deletion of a volume.
    ///
    /// # Errors
    /// As [`Copyset::execute`].
    pub async fn propose(&self, command: Command, payload: Bytes) -> Result<(), Fault> {
        let answer = self.group.propose(command.encode(payload)).await.map_err(fault_of)?;
        decode_answer(&answer)
    }

    async fn change(&self, command: ChunkCommand, payload: Bytes) -> Result<Outcome, Fault> {
        self.check_epoch(&command)?;
        let _room = if command.op == ChunkOp::Discard { None } else { self.reserve(&command)? };
        self.propose(Command::Chunk(command), payload).await.map(|()| Outcome::Done)
    }

    /// Space for the chunk that the command makes; `None` if the chunk exists. Asked before the command is logged: an
    /// entry once logged must be carried out by every replica.
    fn reserve(&self, command: &ChunkCommand) -> Result<Option<Reservation>, Fault> {
        let store = &self.shared.store;
        if store.has(command.chunk) {
            return Ok(None);
        }
        if self.has_full_member() {
            return Err(Fault::NoSpace);
        }
        store.disk().reserve(self.shared.copyset, command.chunk).map(Some).ok_or(Fault::NoSpace)
    }

    fn has_full_member(&self) -> bool {
        let full = self.server.full.load();
        if full.is_empty() {
            return false;
        }
        let GroupStatus { voters, learners, .. } = self.group.status();
        voters.into_iter().chain(learners).filter_map(chunkserver_of).any(|member| full.contains(&member))
    }

    async fn read(&self, command: ChunkCommand) -> Result<Outcome, Fault> {
        for _ in 0..READ_TRIES {
            let lease = self.group.read_lease().await.map_err(fault_of)?;
            self.check_epoch(&command)?;
            if self.known_epoch(&command) < command.fence.epoch {
                self.log_epoch(&command).await?;
                continue;
            }
            let outcome = self.read_mending(command).await;
            // A process that was stopped in between must not answer with what was true before.
            if lease.still_held() {
                return match outcome {
                    Ok(outcome) => Ok(outcome),
                    Err(error) => Err(self.read_failed(&command, error).await),
                };
            }
        }
        Err(Fault::Unavailable(Unavailable::Unreachable))
    }

    /// Reads what lies here; damaged blocks are mended from the peers.
    async fn read_mending(&self, command: ChunkCommand) -> Result<Outcome, StoreError> {
        let mut outcome = self.read_here(command).await;
        for _ in 0..MENDS {
            let Err(StoreError::Corrupt { chunk, block }) = outcome else { break };
            let GroupStatus { voters, leader, .. } = self.group.status();
            let peers = voters.into_iter().filter(|voter| Some(*voter) != leader);
            if !mend::mend(&self.shared, peers, &self.server.book.load(), chunk, block).await {
                break;
            }
            outcome = self.read_here(command).await;
        }
        outcome
    }

    async fn read_here(&self, command: ChunkCommand) -> Result<Outcome, StoreError> {
        if command.range.length() > INLINE_READ_BYTES {
            return self.read_blocking(command).await;
        }
        match self.read_once(&command, Patience::Inline) {
            Err(StoreError::WouldBlock) => self.read_blocking(command).await,
            outcome => outcome,
        }
    }

    fn read_once(&self, command: &ChunkCommand, patience: Patience) -> Result<Outcome, StoreError> {
        let ChunkCommand { chunk, range, .. } = *command;
        let store = &self.shared.store;
        match command.op {
            ChunkOp::Status => store.extents(chunk, range, patience).map(Outcome::Extents),
            _ => store.read(chunk, range, patience).map(|data| Outcome::Data(data.into())),
        }
    }

    async fn read_blocking(&self, command: ChunkCommand) -> Result<Outcome, StoreError> {
        let shared = Arc::clone(&self.shared);
        let ChunkCommand { chunk, range, op, .. } = command;
        let work = move || match op {
            ChunkOp::Status => shared.store.extents(chunk, range, Patience::Blocking).map(Outcome::Extents),
            _ => shared.store.read(chunk, range, Patience::Blocking).map(|data| Outcome::Data(data.into())),
        };
        let joined = tokio::task::spawn_blocking(work).await;
        joined.unwrap_or_else(|error| Err(StoreError::Io(std::io::Error::other(error))))
    }

    /// The fault of a failed read. A damaged block is not served from here: a replica that was not asked lately is
    /// asked to lead, and only if there is none left to ask is the data given up as damaged.
    async fn read_failed(&self, command: &ChunkCommand, error: StoreError) -> Fault {
        if !matches!(error, StoreError::Corrupt { .. }) {
            tracing::error!(copyset = %self.shared.copyset, chunk = %command.chunk, %error, "could not read a chunk");
            return Fault::Internal;
        }
        let mut asked = self.asked_for_data.lock().await;
        // Reads that failed together: the first of them has handed leadership on.
        if self.group.status().role != Role::Leader {
            return Fault::Unavailable(Unavailable::NotLeader);
        }
        let Some(next) = asked.next_new(self.successors(), Instant::now()) else { return Fault::Corrupt };
        let copyset = self.shared.copyset;
        match self.group.transfer_leadership(next).await {
            Ok(()) => {
                tracing::warn!(%copyset, to = %next, "leadership handed on, a block is damaged here");
            }
            Err(error) => {
                tracing::warn!(%copyset, to = %next, %error, "a block is damaged here and leadership stays");
            }
        }
        Fault::Unavailable(Unavailable::NotLeader)
    }

    /// Hands leadership to a replica that `has_room`, if there is one.
    ///
    /// # Errors
    /// As [`Group::transfer_leadership`].
    pub async fn hand_on_for_room(&self, has_room: impl Fn(ChunkserverId) -> bool) -> Result<(), RaftError> {
        let mut asked = self.asked_for_room.lock().await;
        let successors =
            self.successors().into_iter().filter(|node| chunkserver_of(*node).is_some_and(&has_room));
        match asked.next(successors, Instant::now()) {
            Some(next) => self.group.transfer_leadership(next).await,
            None => Ok(()),
        }
    }

    /// Voters that this leader can reach: one that is dead would leave the copyset without a leader for a while.
    fn successors(&self) -> Vec<NodeId> {
        let GroupStatus { mut voters, leader, .. } = self.group.status();
        voters.retain(|voter| Some(*voter) != leader && self.server.host.is_connected(*voter));
        voters
    }

    async fn log_epoch(&self, command: &ChunkCommand) -> Result<(), Fault> {
        let _alone = self.fencing.lock().await;
        if self.known_epoch(command) >= command.fence.epoch {
            return Ok(());
        }
        let (volume, epoch) = (command.chunk.volume, command.fence.epoch);
        self.propose(Command::Fence { volume, epoch }, Bytes::new()).await
    }

    fn known_epoch(&self, command: &ChunkCommand) -> spline_types::Epoch {
        self.shared.fence.read().expect("no panic under the lock").epoch(command.chunk.volume)
    }

    fn check_epoch(&self, command: &ChunkCommand) -> Result<(), Fault> {
        let fence = self.shared.fence.read().expect("no panic under the lock");
        fence.check_epoch(command.chunk.volume, command.fence.epoch)
    }
}

/// The chunkserver that a raft node is: the numbers are the same.
pub fn chunkserver_of(node: NodeId) -> Option<ChunkserverId> {
    u32::try_from(node.0).ok().map(ChunkserverId::new)
}

/// The raft node that a chunkserver is.
pub fn node_of(id: ChunkserverId) -> NodeId {
    NodeId(u64::from(id.get()))
}

fn fault_of(error: ProposeError) -> Fault {
    match error {
        ProposeError::NotLeader { .. } => Fault::Unavailable(Unavailable::NotLeader),
        ProposeError::Overloaded => Fault::Unavailable(Unavailable::Overloaded),
        ProposeError::LogFull => Fault::NoSpace,
        // It may still be carried out: the client must treat the attempt as such.
        ProposeError::Unknown | ProposeError::Stopped => Fault::Unavailable(Unavailable::Unreachable),
    }
}
