//! Chunkservers: registration, heartbeats, creating the copysets, and the schedulers' tick.
//!
//! Called by [`crate::service`] and, for the tick, by [`crate::Mds`]. Reports update soft state; what must outlive
//! this process (who exists, which group was ever led, which replica moves) is logged before it is acted on.
//! Must never know: generated types.
//!
//! Part: [`orders`] what a heartbeat is answered.

pub mod orders;

use crate::command::{Answer, Command, LeaderReport, Members};
use crate::context::{Context, unix_ms};
use crate::metrics::Levels;
use crate::placement::{Shape, Site, plan_copysets};
use crate::refusal::{Refusal, RefusalKind};
use crate::scheduler::view::server_state;
use crate::scheduler::{self, Limits, Operator, View};
use crate::state::MetaState;
use crate::state::record::Copyset;
use crate::topology::{Heartbeat, ReplicaReport, ServerState, Topology};
use orders::Orders;
use spline_types::{ChunkserverId, CopysetId, VolumeId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest address, zone and store uuid, bytes.
const TEXT_BYTES_MAX: usize = 255;
/// Most chunkservers of a cluster, gone ones included: the address book travels in every heartbeat reply.
const CHUNKSERVERS_MAX: usize = 10_000;
/// A leader transfer that has not happened after this long is taken for failed.
const TRANSFER_LIMIT: Duration = Duration::from_secs(10);

/// A leader transfer in flight: soft state, a lost one is simply planned again.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    from: ChunkserverId,
    to: ChunkserverId,
    since: Instant,
}

/// The operations on chunkservers and copysets.
#[derive(Clone)]
pub struct Cluster {
    context: Arc<Context>,
    /// Held while copysets are created, so that simultaneous heartbeats do not plan them twice.
    forming: Arc<tokio::sync::Mutex<()>>,
    transfers: Arc<Mutex<BTreeMap<CopysetId, Transfer>>>,
}

impl Cluster {
    /// Over the shared context.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context, forming: Arc::default(), transfers: Arc::default() }
    }

    /// Gives a store its id, the same one each time, and the cluster's id.
    ///
    /// # Errors
    /// `Invalid` for texts that do not fit, `Precondition` for an election time that is not the cluster's, `NoSpace` for
    /// one chunkserver too many.
    pub async fn register(
        &self,
        store_uuid: &str,
        address: &str,
        zone: &str,
        election_max_ms: u64,
    ) -> Result<(ChunkserverId, String), Refusal> {
        check_address(address)?;
        if election_max_ms == 0 {
            return Err(Refusal::precondition(format!(
                "chunkserver does not tell its election_max_ms, upgrade it: address={address}"
            )));
        }
        check_text("store_uuid", store_uuid)?;
        check_text("zone", zone)?;
        let count = self.context.ledger.read(|state| {
            let known = state.chunkservers().any(|server| server.store_uuid == store_uuid);
            if known { 0 } else { state.chunkservers().count() }
        });
        if count.await? >= CHUNKSERVERS_MAX {
            return Err(Refusal::no_space(format!("too many chunkservers: limit={CHUNKSERVERS_MAX}")));
        }
        let command = Command::RegisterChunkserver {
            store_uuid: store_uuid.to_owned(),
            address: address.to_owned(),
            zone: zone.to_owned(),
            election_max_ms,
            now_ms: unix_ms(),
        };
        let id = match self.context.ledger.propose(command).await? {
            Answer::Chunkserver(id) => id,
            answer => {
                return Err(Refusal::internal(format!("registration had another answer: answer={answer:?}")));
            }
        };
        tracing::info!(%id, address, zone, "chunkserver registered");
        self.context.topology().seen(id, Instant::now());
        self.form_copysets().await;
        Ok((id, self.context.ledger.peek(|state| state.cluster().to_owned())))
    }

    /// Takes a report and answers what to do.
    ///
    /// # Errors
    /// `NotFound` for an unknown id and `Precondition` for one whose store was replaced: both must register.
    pub async fn heartbeat(
        &self,
        id: ChunkserverId,
        address: &str,
        heartbeat: Heartbeat,
    ) -> Result<Orders, Refusal> {
        check_address(address)?;
        let known = self.context.ledger.read(|state| {
            state.chunkserver(id).map(|server| (server.gone, server.address.as_deref() == Some(address)))
        });
        match known.await? {
            None => return Err(Refusal::not_found(format!("no such chunkserver, register first: id={id}"))),
            Some((true, _)) => {
                return Err(Refusal::precondition(format!(
                    "another store registered at this chunkserver's address, register again: id={id} address={address}"
                )));
            }
            Some((false, true)) => {}
            Some((false, false)) => {
                self.context
                    .ledger
                    .propose(Command::MoveChunkserver { chunkserver: id, address: address.to_owned() })
                    .await?;
                tracing::info!(%id, address, "chunkserver moved");
            }
        }
        let leading: Vec<ReplicaReport> =
            heartbeat.replicas.iter().filter(|replica| replica.leader).cloned().collect();
        self.context.topology().report(id, heartbeat, Instant::now());
        self.learn(&leading).await;
        self.form_copysets().await;
        Ok(self.orders(id))
    }

    /// Logs what leaders know and the state does not. A failure is not the reporter's: it will say it again.
    async fn learn(&self, leading: &[ReplicaReport]) {
        let commands = self.context.ledger.peek(|state| news(state, &self.context.topology(), leading));
        for command in commands {
            let name = command.name();
            if let Err(refusal) = self.context.ledger.propose(command).await {
                tracing::warn!(command = name, %refusal, "could not record what a leader reported");
            }
        }
    }

    fn orders(&self, id: ChunkserverId) -> Orders {
        let now = Instant::now();
        self.context.ledger.peek(|state| {
            let topology = self.context.topology();
            orders::orders(state, &topology, &self.transfers_in_flight(), id, &self.context.config, now)
        })
    }

    /// Creates the copysets once enough chunkservers are up.
    async fn form_copysets(&self) {
        if self.context.ledger.peek(MetaState::copyset_count) > 0 {
            return;
        }
        let _one_at_a_time = self.forming.lock().await;
        let now = Instant::now();
        let sites = self.context.ledger.peek(|state| match state.copyset_count() {
            0 => sites(state, &self.context.topology(), now),
            _ => Vec::new(),
        });
        let config = &self.context.config;
        if sites.len() < config.chunkservers_needed() {
            return;
        }
        let shape = Shape {
            copysets: config.copysets as usize,
            replicas: config.replicas as usize,
            scatter_width: config.scatter_width as usize,
        };
        let Some(plan) = plan_copysets(&sites, shape, &mut rand::rng()) else {
            tracing::warn!(
                chunkservers = sites.len(),
                replicas = config.replicas,
                "chunkservers lie in too few zones for copysets; give them distinct zones"
            );
            return;
        };
        let copysets: Vec<Members> = plan.into_iter().map(Members).collect();
        let count = copysets.len();
        match self.context.ledger.propose(Command::CreateCopysets { copysets }).await {
            Ok(_) => tracing::info!(count, chunkservers = sites.len(), "copysets created"),
            Err(refusal) if refusal.kind == RefusalKind::Conflict => {}
            Err(refusal) => tracing::warn!(%refusal, "could not create copysets"),
        }
    }

    /// Runs the schedulers once and starts what they planned; also sets the gauges.
    pub async fn tick(&self) {
        let now = Instant::now();
        self.end_transfers(now);
        let (view, levels) = self.context.ledger.peek(|state| {
            let sessions = self.context.leases().alive(now);
            let topology = self.context.topology();
            let view = View::of(state, &topology, self.transfers_in_flight(), now);
            let levels = levels(state, &topology, &view, sessions, now);
            (view, levels)
        });
        self.context.metrics.set(&levels);
        let config = &self.context.config;
        let limits =
            Limits { operators_max: config.operators_max as usize, rebuild_after: config.rebuild_after };
        for operator in scheduler::plan(&view, limits) {
            self.start(operator, &view, now).await;
        }
    }

    async fn start(&self, operator: Operator, view: &View, now: Instant) {
        let proposed = match operator {
            Operator::Transfer { copyset, to } => {
                let leader =
                    view.copysets.iter().find(|other| other.id == copyset).and_then(|found| found.leader);
                if let Some(from) = leader {
                    self.transfers().insert(copyset, Transfer { from, to, since: now });
                }
                self.context.metrics.operator("transfer");
                tracing::debug!(?operator, "leader transfer started");
                return;
            }
            Operator::Replace { copyset, add, remove } => {
                self.context.metrics.operator("replace");
                self.context.ledger.propose(Command::StartReplace { copyset, add, remove }).await
            }
            Operator::Abort { copyset, add } => {
                self.context.metrics.operator("abort");
                self.context.ledger.propose(Command::AbortReplace { copyset, add }).await
            }
        };
        match proposed {
            Ok(_) => tracing::info!(?operator, "operator started"),
            Err(refusal) => tracing::warn!(?operator, %refusal, "could not start an operator"),
        }
    }

    /// Forgets transfers that happened, failed, or lost their ground.
    fn end_transfers(&self, now: Instant) {
        let topology = self.context.topology();
        self.transfers().retain(|copyset, transfer| {
            let leader = topology.leader(*copyset, now).map(|leader| leader.chunkserver);
            leader == Some(transfer.from) && now.saturating_duration_since(transfer.since) < TRANSFER_LIMIT
        });
    }

    fn transfers(&self) -> MutexGuard<'_, BTreeMap<CopysetId, Transfer>> {
        self.transfers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn transfers_in_flight(&self) -> BTreeMap<CopysetId, ChunkserverId> {
        self.transfers().iter().map(|(copyset, transfer)| (*copyset, transfer.to)).collect()
    }
}

/// The chunkservers that may hold the first copysets: up, and reachable at an address of their own.
fn sites(state: &MetaState, topology: &Topology, now: Instant) -> Vec<Site> {
    state
        .chunkservers()
        .filter(|server| !server.gone && server.address.is_some() && topology.is_up(server.id, now))
        .map(|server| Site { id: server.id, zone: server.zone.clone() })
        .collect()
}

/// The commands that record what leaders reported and the state does not know yet.
fn news(state: &MetaState, topology: &Topology, leading: &[ReplicaReport]) -> Vec<Command> {
    let mut reports = Vec::new();
    let mut reclaimed: BTreeMap<VolumeId, Vec<CopysetId>> = BTreeMap::new();
    for replica in leading.iter().filter(|replica| topology.term(replica.copyset) <= replica.term) {
        let report = LeaderReport {
            copyset: replica.copyset,
            term: replica.term,
            index: replica.applied,
            members: replica.members.clone(),
            learners: replica.learners.clone(),
        };
        if state.copyset(replica.copyset).is_some_and(|copyset| copyset.news_in(&report)) {
            reports.push(report);
        }
        for (volume, deletion) in state.deletions() {
            if deletion.remaining.contains_key(&replica.copyset.get()) && replica.reclaimed.contains(&volume)
            {
                reclaimed.entry(volume).or_default().push(replica.copyset);
            }
        }
    }
    let mut commands: Vec<Command> =
        reclaimed.into_iter().map(|(volume, copysets)| Command::Reclaimed { volume, copysets }).collect();
    if !reports.is_empty() {
        commands.push(Command::CopysetsReported { reports });
    }
    commands
}

/// How well a copyset is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// `healthy` (a leader, and every member takes part), `degraded` (a leader, but a member does not take part) or
    /// `unavailable` (no leader).
    pub state: &'static str,
    /// What is wrong, for people; empty if nothing is.
    pub reason: String,
}

/// How well a copyset is, by what was reported last.
pub fn health(
    state: &MetaState,
    topology: &Topology,
    id: CopysetId,
    copyset: &Copyset,
    now: Instant,
) -> Health {
    let mut wrong = Vec::new();
    let led = topology.leader(id, now).is_some();
    if !led {
        wrong.push("no leader".to_owned());
    }
    for member in &copyset.members {
        let server = state
            .chunkserver(*member)
            .map_or(ServerState::Gone, |server| server_state(server.gone, topology.is_up(server.id, now)));
        match server {
            ServerState::Up if topology.has_stopped(id, *member) => {
                wrong
                    .push(format!("replica on chunkserver {member} has stopped, see its log and restart it"));
            }
            ServerState::Up => {}
            away => wrong.push(format!("chunkserver {member} is {}", away.name())),
        }
    }
    let state = match (led, wrong.is_empty()) {
        (false, _) => "unavailable",
        (true, true) => "healthy",
        (true, false) => "degraded",
    };
    Health { state, reason: wrong.join("; ") }
}

fn levels(state: &MetaState, topology: &Topology, view: &View, sessions: usize, now: Instant) -> Levels {
    let servers_in =
        |wanted: ServerState| view.servers.values().filter(|server| server.state == wanted).count();
    let mut copysets: BTreeMap<&'static str, usize> = BTreeMap::new();
    for name in ["healthy", "degraded", "unavailable"] {
        copysets.insert(name, 0);
    }
    for (id, copyset) in state.copysets() {
        *copysets.entry(health(state, topology, id, copyset, now).state).or_insert(0) += 1;
    }
    let replacing = view.copysets.iter().filter(|copyset| copyset.replacing.is_some()).count();
    Levels {
        volumes: state.volume_count(),
        deletions: state.deletions().count(),
        sessions,
        operators: replacing + view.transfers.len(),
        chunkservers: [ServerState::Up, ServerState::Down, ServerState::Gone]
            .map(|wanted| (wanted.name(), servers_in(wanted)))
            .to_vec(),
        copysets: copysets.into_iter().collect(),
    }
}

fn check_text(what: &str, text: &str) -> Result<(), Refusal> {
    match text.len() {
        1..=TEXT_BYTES_MAX if !text.chars().any(char::is_control) => Ok(()),
        bytes => Err(Refusal::invalid(format!(
            "{what} must have 1 to {TEXT_BYTES_MAX} printable bytes: bytes={bytes}"
        ))),
    }
}

fn check_address(address: &str) -> Result<(), Refusal> {
    check_text("address", address)?;
    let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
    match port.and_then(|port| port.parse::<u16>().ok()) {
        Some(1..) => Ok(()),
        _ => Err(Refusal::invalid(format!("address must be host:port: address={address:?}"))),
    }
}
