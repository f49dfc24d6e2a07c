//! All replicas of one data directory: the WAL, the connections to the peers, the clock, the groups.
//!
//! Called by the chunkserver and the MDS. Owns what the groups share; a group's own state is in `member`.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};
use openraft::{Config, Raft, SnapshotPolicy};
use prometheus_client::registry::Registry;
use spline_wire::{Frame, FrameSender};
use tokio::sync::oneshot;

use crate::codec::message::{ENTRIES_MAX, Request};
use crate::command::{GroupId, NodeId};
use crate::error::RaftError;
use crate::group::{Group, checkpoint};
use crate::log_store::LogStore;
use crate::member::{Member, Timing};
use crate::metrics::Metrics;
use crate::network::acks::Acks;
use crate::network::intake::Intake;
use crate::network::peers::Peers;
use crate::network::{Factory, beats, receive};
use crate::places::{self, Places};
use crate::promise::Promise;
use crate::pulse;
use crate::replica::Replica;
use crate::rounds::Flight;
use crate::snapshot::Throttle;
use crate::state_machine::StateMachine;
use crate::state_machine::adapter::Adapter;
use crate::types::TypeConfig;
use crate::wal::{Wal, WalConfig, WalDone};

/// A learner this many entries behind has caught up; the rest follows under the joint change.
const CAUGHT_UP_ENTRIES: u64 = 128;
/// Proposals and messages that may wait for one replica: the senders' windows keep far below it (`bounded`).
const QUEUE_MESSAGES: u64 = 8192;
/// Steps of apply that may wait, each a hundred bytes: far more than a log's limit lets commit.
const APPLIES_MAX: u64 = 1 << 18;

/// How long a core may take to end after its state machine has failed.
const CORE_LIMIT: Duration = Duration::from_secs(1);
/// How long a shutdown makes checkpoints at most: whoever waits for the end of a process does not wait much longer.
const CHECKPOINTS_LIMIT: Duration = Duration::from_secs(5);
/// Checkpoints that a shutdown makes at once: each syncs many files, and nothing else wants the disk.
const CHECKPOINTS_AT_ONCE: usize = 8;
/// A log past its checkpoint that is shorter than this is replayed sooner than a checkpoint is made.
const REPLAYED_SOON_BYTES: u64 = 64 << 10;

/// How a host runs. The three timings must be the same on all nodes of a group.
#[derive(Clone, Debug)]
pub struct RaftConfig {
    /// The data directory's raft folder: the WAL lies in it.
    pub dir: PathBuf,
    /// This node.
    pub node: NodeId,
    /// How often an idle leader speaks.
    pub heartbeat: Duration,
    /// The shortest election timeout.
    pub election_min: Duration,
    /// The longest election timeout, which is also the leader's lease.
    pub election_max: Duration,
    /// A group is checkpointed when its log since the last checkpoint is longer than this (bytes).
    pub checkpoint_log_bytes: u64,
    /// The write-ahead log.
    pub wal: WalConfig,
    /// Most bytes per second that snapshots of this host send; 0 is no limit.
    pub snapshot_bytes_per_second: u64,
}

impl RaftConfig {
    /// The defaults of a chunkserver for `node`, with the log in `dir`.
    pub fn new(dir: PathBuf, node: NodeId) -> RaftConfig {
        RaftConfig {
            dir,
            node,
            heartbeat: Duration::from_millis(400),
            election_min: Duration::from_millis(600),
            election_max: Duration::from_millis(1000),
            checkpoint_log_bytes: 64 << 20,
            wal: WalConfig::default(),
            snapshot_bytes_per_second: 256 << 20,
        }
    }
}

/// One per data directory. Clones share it; dropping the last one stops the clock, `shutdown` stops the groups.
#[derive(Clone)]
pub struct RaftHost(pub(crate) Arc<HostState>);

impl std::fmt::Debug for RaftHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftHost").field("node", &self.0.node).finish_non_exhaustive()
    }
}

pub(crate) struct HostState {
    pub(crate) node: NodeId,
    pub(crate) timing: Timing,
    pub(crate) checkpoint_log_bytes: u64,
    pub(crate) wal: Wal,
    pub(crate) peers: Arc<Peers>,
    /// Wakes the clock before its time: there is a group that it does not know.
    pub(crate) wake: Arc<tokio::sync::Notify>,
    intake: Arc<Intake>,
    pub(crate) places: Arc<Places>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) flight: Arc<Flight>,
    pub(crate) throttle: Arc<Throttle>,
    openraft: Arc<Config>,
    members: RwLock<HashMap<GroupId, Arc<Member>>>,
    /// One start or removal at a time.
    changing: tokio::sync::Mutex<()>,
}

impl HostState {
    pub(crate) fn members(&self) -> Vec<Arc<Member>> {
        self.members.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Checkpoints what would take long to replay.
    async fn checkpoint_all(&self, members: &[Arc<Member>]) {
        let is_due = |member: &&Arc<Member>| {
            let bytes = member.log.bytes_since_checkpoint();
            member.is_running() && member.has_unsaved() && bytes >= REPLAYED_SOON_BYTES
        };
        let due = stream::iter(members.iter().filter(is_due));
        let keep = self.checkpoint_log_bytes / 2;
        due.for_each_concurrent(CHECKPOINTS_AT_ONCE, |member| async move {
            if let Err(error) = checkpoint(member, keep).await {
                tracing::warn!(group = %member.id, %error, "checkpoint was not made");
            }
        })
        .await;
    }

    fn member(&self, id: GroupId) -> Option<Arc<Member>> {
        self.members.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }
}

/// What belongs to a running raft and is not in it.
pub(crate) struct Parts {
    log: LogStore,
    acks: Arc<Acks>,
    promise: Arc<Promise>,
    /// Ends with the state machine.
    machine: oneshot::Receiver<Infallible>,
}

impl HostState {
    /// Starts openraft over the group's log; nobody knows of it yet.
    pub(crate) async fn start_raft<S: StateMachine>(
        &self,
        id: GroupId,
        machine: S,
    ) -> Result<(Raft<TypeConfig, Adapter<S>>, Parts), RaftError> {
        let log = LogStore::open(self.wal.clone(), id)?;
        let (alive, machine_gone) = oneshot::channel();
        let started = Arc::new(AtomicBool::new(false));
        let adapter = Adapter::new(id, machine, log.clone(), started.clone(), self.metrics.clone(), alive)?;
        let acks = Arc::<Acks>::default();
        let (peers, throttle) = (self.peers.clone(), self.throttle.clone());
        let promise = Arc::new(Promise::new(self.timing.lease, log.vote()));
        let network = Factory { group: id, acks: acks.clone(), promise: promise.clone(), peers, throttle };
        let raft = Raft::new(self.node.0, self.openraft.clone(), network, log.clone(), adapter).await;
        let raft = raft.map_err(|fatal| RaftError::Stopped(fatal.to_string()))?;
        // Answered by the core once it has published what it recovered: the first status must show the members.
        raft.is_initialized().await.map_err(|fatal| RaftError::Stopped(fatal.to_string()))?;
        started.store(true, Ordering::Release);
        Ok((raft, Parts { log, acks, promise, machine: machine_gone }))
    }

    /// Makes a running replica known to the peers and to the clock, and watches over its end.
    pub(crate) fn enter(&self, id: GroupId, replica: Arc<dyn Replica>, parts: Parts) -> Group {
        let Parts { log, acks, promise, machine } = parts;
        let core = replica.gone();
        let member = Arc::new(Member::new(self, id, replica, log, acks, promise));
        tokio::spawn(watch(Arc::downgrade(&member), core, machine));
        self.members.write().unwrap_or_else(PoisonError::into_inner).insert(id, member.clone());
        self.wake.notify_one();
        Group { member, wal: self.wal.clone(), places: self.places.clone() }
    }
}

/// Waits until a replica has lost its core or its state machine, and makes an end of the rest.
async fn watch(
    member: Weak<Member>,
    mut core: BoxFuture<'static, ()>,
    machine: oneshot::Receiver<Infallible>,
) {
    let core_is_gone = tokio::select! {
        () = &mut core => true,
        _ = machine => false,
    };
    let Some(member) = member.upgrade().filter(|member| member.falls_silent()) else { return };
    if !core_is_gone {
        // Of a state machine that failed the core is told: it ends by itself and says why.
        drop(tokio::time::timeout(CORE_LIMIT, core).await);
    }
    member.ended().await;
}

fn openraft_config(config: &RaftConfig) -> Result<Config, RaftError> {
    let millis = |duration: Duration| duration.as_millis() as u64;
    let config = Config {
        cluster_name: "spline".to_owned(),
        heartbeat_interval: millis(config.heartbeat),
        election_timeout_min: millis(config.election_min),
        election_timeout_max: millis(config.election_max),
        max_payload_entries: ENTRIES_MAX,
        replication_lag_threshold: CAUGHT_UP_ENTRIES,
        // Checkpoints and purges are `pulse`'s and `group::checkpoint`'s decision.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        // The clock is `pulse`'s.
        enable_tick: false,
        enable_elect: true,
        enable_pre_vote: Some(true),
        // A restarted leader must be elected anew: entries it had sent but not yet synced could otherwise get a
        // second meaning under the same term.
        enable_leader_restore: Some(false),
        broadcast_submitted_on_append: Some(true),
        api_channel_size: Some(QUEUE_MESSAGES),
        notification_channel_size: Some(QUEUE_MESSAGES),
        // A core that waits here answers nobody: commits must fit in while apply waits for disk space.
        state_machine_channel_size: Some(APPLIES_MAX),
        ..Config::default()
    };
    config.validate().map_err(|e| RaftError::Refused(format!("raft timings do not fit together: {e}")))
}

impl RaftHost {
    /// Opens the WAL of `config.dir` and recovers it.
    ///
    /// # Errors
    /// `Io` with the WAL's reason; `Refused` if the timings contradict each other.
    #[expect(
        clippy::unused_async,
        reason = "needs a runtime for its clock; callers must not rely on it being quick"
    )]
    pub async fn open(config: RaftConfig, metrics: &mut Registry) -> Result<RaftHost, RaftError> {
        let openraft = Arc::new(openraft_config(&config)?);
        let timing = Timing {
            heartbeat: config.heartbeat,
            election_min: config.election_min,
            lease: config.election_max,
        };
        // Recovery reads the whole log; nothing else runs on this host yet, but other hosts of the process may.
        let wal = Wal::open(&config.dir, config.wal.clone(), metrics);
        let (wal, _recovered) = wal.map_err(std::io::Error::other)?;
        let metrics = Arc::new(Metrics::register(metrics));
        let share = places::share(config.wal.queue_bytes);
        let state = Arc::new(HostState {
            node: config.node,
            timing,
            checkpoint_log_bytes: config.checkpoint_log_bytes,
            wal,
            peers: Arc::new(Peers::new(metrics.clone())),
            wake: Arc::default(),
            intake: Intake::new(share),
            places: Arc::new(Places::new(share)),
            metrics,
            throttle: Arc::new(Throttle::new(config.snapshot_bytes_per_second)),
            openraft,
            flight: Arc::default(),
            members: RwLock::default(),
            changing: tokio::sync::Mutex::new(()),
        });
        tokio::spawn(pulse::run(Arc::downgrade(&state)));
        Ok(RaftHost(state))
    }

    /// Starts this host's replica of a group.
    ///
    /// # Errors
    /// `AlreadyStarted`; `Io` if its log can not be read.
    pub async fn start_group<S: StateMachine>(&self, id: GroupId, machine: S) -> Result<Group, RaftError> {
        let host = &self.0;
        let _one = host.changing.lock().await;
        if host.member(id).is_some() {
            return Err(RaftError::AlreadyStarted(id.0));
        }
        let (raft, parts) = host.start_raft(id, machine).await?;
        Ok(host.enter(id, Arc::new(raft), parts))
    }

    /// Stops the replica and forgets its log. What its state machine stored is the user's to delete.
    ///
    /// # Errors
    /// `Io` if forgetting could not be made durable.
    pub async fn remove_group(&self, id: GroupId) -> Result<(), RaftError> {
        let host = &self.0;
        let _one = host.changing.lock().await;
        let member = host.members.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some(member) = member {
            member.stop().await;
        }
        let (done, outcome) = WalDone::oneshot();
        host.wal.remove_group(id, done);
        outcome.await.map_err(|_| RaftError::Stopped("write-ahead log is closed".to_owned()))??;
        Ok(())
    }

    /// Replaces the address book of the peers. A peer that is not in it can not be reached.
    pub fn set_addresses(&self, book: HashMap<NodeId, SocketAddr>) {
        self.0.peers.set_addresses(book);
    }

    /// Whether there is a connection to the peer now. A peer that does not answer loses it within seconds.
    pub fn is_connected(&self, node: NodeId) -> bool {
        self.0.peers.peer(node).is_up()
    }

    /// Takes a `RaftRequest` frame from the process's wire listener; the reply goes to `replies`. Never waits for a
    /// group.
    #[expect(clippy::unused_async, reason = "the caller must allow for back-pressure here")]
    pub async fn handle(&self, frame: Frame, replies: &FrameSender) {
        let number = frame.request;
        match Request::from_frame(frame) {
            Ok((_, Request::Beats { leader, beats })) => {
                let reply = {
                    let members = self.0.members.read().unwrap_or_else(PoisonError::into_inner);
                    beats::receive(&members, leader, &beats)
                };
                // A full queue means that the peer does not read; it gets no promise then.
                let _ = replies.try_send(reply.into_frame(number));
            }
            Ok((id, request)) => match self.0.member(id) {
                Some(member) => {
                    receive::dispatch(member, request, number, replies.clone(), &self.0.intake);
                }
                None => {
                    receive::refuse(number, format!("raft group is not on this host group={id}"), replies)
                }
            },
            Err(error) => {
                tracing::warn!(%error, "raft request is not readable");
                receive::refuse(number, error.to_string(), replies);
            }
        }
    }

    /// Waits until the WAL has failed, and says why. Its groups have stopped then, for good: the process must end.
    pub async fn failed(&self) -> String {
        self.0.wal.failed().await
    }

    /// Lets go of all groups, checkpoints them for a bounded time so that the next start replays little, stops them, writes
    /// out and closes the WAL. The peers are refused from the beginning, and what is led here sends no heartbeat any more:
    /// they elect others meanwhile.
    pub async fn shutdown(&self) {
        let host = &self.0;
        let _one = host.changing.lock().await;
        let members: Vec<Arc<Member>> = host
            .members
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .drain()
            .map(|(_, member)| member)
            .collect();
        if tokio::time::timeout(CHECKPOINTS_LIMIT, host.checkpoint_all(&members)).await.is_err() {
            tracing::warn!(limit = ?CHECKPOINTS_LIMIT, "checkpoints take too long, the next start replays the rest");
        }
        futures_util::future::join_all(members.iter().map(|member| member.stop())).await;
        host.peers.close();
        let wal = host.wal.clone();
        // A panic in there has been reported by itself.
        drop(tokio::task::spawn_blocking(move || wal.close()).await);
    }
}
