//! The three gRPC services of `mds.proto`: texts and numbers in, typed calls, texts and numbers out.
//!
//! Called by tonic. The generated types stop here. Every request is counted and timed; a refusal becomes a status by
//! [`crate::refusal`]. Must never know: how anything is decided.

use crate::cluster::orders::{self, Orders};
use crate::cluster::{Cluster, Health, health};
use crate::context::Context;
use crate::refusal::Refusal;
use crate::scheduler::Operator;
use crate::scheduler::view::server_state;
use crate::session::{Renewed, Sessions};
use crate::state::MetaState;
use crate::topology::{Heartbeat, ReplicaReport, Topology};
use crate::volume::{VolumeInfo, Volumes};
use spline_rpc::mds as pb;
use spline_types::{
    BlockSize, ChunkserverId, CopysetId, Epoch, OnUnavailable, SegmentIndex, VolumeId, VolumeName,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tonic::{Request, Response, Status};

/// Most bytes of one request: a heartbeat names the usage of every volume in every copyset that its sender leads.
const REQUEST_BYTES_MAX: usize = 64 << 20;

/// Serves all three services.
#[derive(Clone)]
pub struct Service {
    context: Arc<Context>,
    volumes: Volumes,
    sessions: Sessions,
    cluster: Cluster,
}

impl Service {
    /// Over the shared context; `cluster` is shared with the schedulers' tick.
    pub fn new(context: Arc<Context>, cluster: Cluster) -> Self {
        let volumes = Volumes::new(Arc::clone(&context));
        let sessions = Sessions::new(Arc::clone(&context));
        Self { context, volumes, sessions, cluster }
    }

    /// The routes of a tonic server.
    pub fn router(self) -> tonic::transport::server::Router {
        let volumes = pb::volumes_server::VolumesServer::new(self.clone());
        let sessions = pb::sessions_server::SessionsServer::new(self.clone());
        let cluster =
            pb::cluster_server::ClusterServer::new(self).max_decoding_message_size(REQUEST_BYTES_MAX);
        tonic::transport::Server::builder().add_service(volumes).add_service(sessions).add_service(cluster)
    }

    /// Counts, times, and turns a refusal into a status.
    async fn serve<T>(
        &self,
        method: &'static str,
        work: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<Response<T>, Status> {
        let start = Instant::now();
        let result = work.await;
        let code = result.as_ref().map_or_else(|refusal| refusal.kind.name(), |_| "ok");
        self.context.metrics.request(method, code, start.elapsed());
        result.map(Response::new).map_err(|refusal| {
            if refusal.kind == crate::refusal::RefusalKind::Internal {
                tracing::error!(method, %refusal, "request failed");
            } else {
                tracing::debug!(method, %refusal, "request refused");
            }
            Status::from(refusal)
        })
    }
}

#[tonic::async_trait]
impl pb::volumes_server::Volumes for Service {
    async fn create(
        &self,
        request: Request<pb::CreateVolumeRequest>,
    ) -> Result<Response<pb::Volume>, Status> {
        let asked = request.into_inner();
        self.serve("volumes.create", async {
            let block_size = match asked.block_size {
                0 => BlockSize::B4096,
                bytes => BlockSize::from_bytes(bytes).ok_or_else(|| {
                    Refusal::invalid(format!("block size must be 512 or 4096: block_size={bytes}"))
                })?,
            };
            let on_unavailable = match asked.on_unavailable.as_str() {
                "" => OnUnavailable::Wait,
                text => text.parse().map_err(Refusal::invalid)?,
            };
            let created =
                self.volumes.create(name(&asked.name)?, asked.size_bytes, block_size, on_unavailable).await?;
            Ok(volume(&created))
        })
        .await
    }

    async fn list(
        &self,
        _: Request<pb::ListVolumesRequest>,
    ) -> Result<Response<pb::ListVolumesReply>, Status> {
        self.serve("volumes.list", async {
            Ok(pb::ListVolumesReply { volumes: self.volumes.list().await?.iter().map(volume).collect() })
        })
        .await
    }

    async fn get(&self, request: Request<pb::GetVolumeRequest>) -> Result<Response<pb::Volume>, Status> {
        let asked = request.into_inner();
        self.serve("volumes.get", async { Ok(volume(&self.volumes.get(&name(&asked.name)?).await?)) }).await
    }

    async fn resize(
        &self,
        request: Request<pb::ResizeVolumeRequest>,
    ) -> Result<Response<pb::Volume>, Status> {
        let asked = request.into_inner();
        self.serve("volumes.resize", async {
            Ok(volume(&self.volumes.resize(&name(&asked.name)?, asked.size_bytes).await?))
        })
        .await
    }

    async fn rename(
        &self,
        request: Request<pb::RenameVolumeRequest>,
    ) -> Result<Response<pb::Volume>, Status> {
        let asked = request.into_inner();
        self.serve("volumes.rename", async {
            Ok(volume(&self.volumes.rename(&name(&asked.name)?, name(&asked.new_name)?).await?))
        })
        .await
    }

    async fn delete(
        &self,
        request: Request<pb::DeleteVolumeRequest>,
    ) -> Result<Response<pb::DeleteVolumeReply>, Status> {
        let asked = request.into_inner();
        self.serve("volumes.delete", async {
            self.volumes.delete(&name(&asked.name)?).await?;
            Ok(pb::DeleteVolumeReply {})
        })
        .await
    }
}

#[tonic::async_trait]
impl pb::sessions_server::Sessions for Service {
    async fn open(
        &self,
        request: Request<pb::OpenSessionRequest>,
    ) -> Result<Response<pb::OpenSessionReply>, Status> {
        let asked = request.into_inner();
        self.serve("sessions.open", async {
            let (resumes, known) = (asked.resumed_epoch.map(Epoch::new), asked.known_id.map(VolumeId::new));
            let volume_name = name(&asked.volume)?;
            let newest = asked.newest_epoch.map(Epoch::new);
            let opened =
                self.sessions.open(&volume_name, &asked.gateway, asked.force, resumes, known, newest).await?;
            let info = VolumeInfo {
                segments: opened.segments.len() as u32,
                lease_left: opened.lease,
                bytes_stored: 0,
                volume: opened.volume,
            };
            Ok(pb::OpenSessionReply {
                volume: Some(volume(&info)),
                epoch: opened.epoch.get(),
                lease_ms: millis(opened.lease),
                segments: opened.segments.iter().map(|(index, copysets)| segment(*index, copysets)).collect(),
                run_since: opened.run_since.get(),
            })
        })
        .await
    }

    async fn renew(
        &self,
        request: Request<pb::RenewSessionsRequest>,
    ) -> Result<Response<pb::RenewSessionsReply>, Status> {
        let asked = request.into_inner();
        self.serve("sessions.renew", async {
            let sessions: Vec<_> = asked
                .sessions
                .iter()
                .map(|session| (VolumeId::new(session.volume_id), Epoch::new(session.epoch)))
                .collect();
            let judged = self.sessions.renew(&asked.gateway, &sessions).await?;
            let renewed = sessions.iter().zip(judged).map(|((id, epoch), renewed)| {
                let of = pb::RenewedSession { volume_id: id.get(), epoch: epoch.get(), ..Default::default() };
                match renewed {
                    Renewed::Alive(size_bytes, name) => {
                        pb::RenewedSession { size_bytes, name: name.as_str().to_owned(), ..of }
                    }
                    Renewed::Lost => pb::RenewedSession { lost: true, ..of },
                }
            });
            let lease_ms = millis(self.context.config.lease);
            Ok(pb::RenewSessionsReply { lease_ms, sessions: renewed.collect() })
        })
        .await
    }

    async fn close(
        &self,
        request: Request<pb::CloseSessionRequest>,
    ) -> Result<Response<pb::CloseSessionReply>, Status> {
        let asked = request.into_inner();
        self.serve("sessions.close", async {
            self.sessions.close(VolumeId::new(asked.volume_id), Epoch::new(asked.epoch)).await?;
            Ok(pb::CloseSessionReply {})
        })
        .await
    }

    async fn allocate_segment(
        &self,
        request: Request<pb::AllocateSegmentRequest>,
    ) -> Result<Response<pb::Segment>, Status> {
        let asked = request.into_inner();
        self.serve("sessions.allocate_segment", async {
            let index = SegmentIndex::new(asked.index);
            let copysets = self
                .sessions
                .allocate(VolumeId::new(asked.volume_id), Epoch::new(asked.epoch), index)
                .await?;
            Ok(segment(index, &copysets))
        })
        .await
    }
}

#[tonic::async_trait]
impl pb::cluster_server::Cluster for Service {
    async fn register(
        &self,
        request: Request<pb::RegisterRequest>,
    ) -> Result<Response<pb::RegisterReply>, Status> {
        let asked = request.into_inner();
        self.serve("cluster.register", async {
            let (id, cluster_id) = self
                .cluster
                .register(&asked.store_uuid, &asked.address, &asked.zone, asked.election_max_ms)
                .await?;
            Ok(pb::RegisterReply { chunkserver_id: id.get(), cluster_id })
        })
        .await
    }

    async fn heartbeat(
        &self,
        request: Request<pb::HeartbeatRequest>,
    ) -> Result<Response<pb::HeartbeatReply>, Status> {
        let asked = request.into_inner();
        self.serve("cluster.heartbeat", async {
            let heartbeat = Heartbeat {
                capacity: asked.capacity_bytes,
                used: asked.used_bytes,
                full: asked.full,
                version: asked.version,
                replicas: asked.copysets.into_iter().map(replica_report).collect(),
            };
            let id = ChunkserverId::new(asked.chunkserver_id);
            let orders = self.cluster.heartbeat(id, &asked.address, heartbeat).await?;
            Ok(heartbeat_reply(orders))
        })
        .await
    }

    async fn routes(&self, request: Request<pb::RoutesRequest>) -> Result<Response<pb::RoutesReply>, Status> {
        let asked = request.into_inner();
        self.serve("cluster.routes", async {
            let now = Instant::now();
            self.context
                .ledger
                .read(|state| routes_reply(state, &self.context.topology(), &asked.copysets, now))
                .await
        })
        .await
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusReply>, Status> {
        self.serve("cluster.status", async {
            let now = Instant::now();
            self.context.ledger.read(|state| status_reply(state, &self.context.topology(), now)).await
        })
        .await
    }
}

fn name(text: &str) -> Result<VolumeName, Refusal> {
    text.parse().map_err(Refusal::invalid)
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

fn volume(info: &VolumeInfo) -> pb::Volume {
    let volume = &info.volume;
    pb::Volume {
        id: volume.id.get(),
        name: volume.name.to_string(),
        size_bytes: volume.size,
        block_size: volume.block_size.bytes(),
        created_unix_ms: volume.created_ms,
        on_unavailable: volume.on_unavailable.to_string(),
        segments_allocated: info.segments,
        bytes_stored: info.bytes_stored,
        session: volume.session.as_ref().map(|session| pb::Session {
            epoch: volume.epoch.get(),
            gateway: session.gateway.clone(),
            since_unix_ms: session.since_ms,
            lease_left_ms: millis(info.lease_left),
        }),
    }
}

fn segment(index: SegmentIndex, copysets: &[CopysetId]) -> pb::Segment {
    pb::Segment { index: index.get(), copysets: copysets.iter().map(|copyset| copyset.get()).collect() }
}

fn ids(raw: Vec<u32>) -> Vec<ChunkserverId> {
    raw.into_iter().map(ChunkserverId::new).collect()
}

fn raw(ids: &[ChunkserverId]) -> Vec<u32> {
    ids.iter().map(|id| id.get()).collect()
}

fn replica_report(report: pb::CopysetReport) -> ReplicaReport {
    ReplicaReport {
        copyset: CopysetId::new(report.id),
        leader: report.leader,
        term: report.term,
        applied: report.applied_index,
        members: ids(report.members),
        learners: ids(report.learners),
        usage: report.usage.iter().map(|usage| (VolumeId::new(usage.volume_id), usage.bytes)).collect(),
        reclaimed: report.reclaimed_volumes.into_iter().map(VolumeId::new).collect(),
        stopped: report.stopped,
    }
}

fn heartbeat_reply(orders: Orders) -> pb::HeartbeatReply {
    pb::HeartbeatReply {
        interval_ms: millis(orders.interval),
        chunkservers: orders.book.into_iter().map(address).collect(),
        assignments: orders
            .assignments
            .iter()
            .map(|assignment| pb::CopysetAssignment {
                id: assignment.copyset.get(),
                members: raw(&assignment.members),
                bootstrap: assignment.bootstrap,
            })
            .collect(),
        operators: orders.operators.into_iter().filter_map(operator).collect(),
        reclaims: orders
            .reclaims
            .into_iter()
            .map(|(copyset, volume)| pb::Reclaim { copyset: copyset.get(), volume_id: volume.get() })
            .collect(),
        full_chunkservers: raw(&orders.full),
    }
}

/// `None` for what the metadata server does by itself.
fn operator(operator: Operator) -> Option<pb::Operator> {
    let (copyset, change) = match operator {
        Operator::Replace { copyset, add, remove } => {
            let replace = pb::ReplacePeer { add: add.get(), remove: remove.get() };
            (copyset, pb::operator::Change::Replace(replace))
        }
        Operator::Transfer { copyset, to } => {
            (copyset, pb::operator::Change::Transfer(pb::TransferLeader { to: to.get() }))
        }
        Operator::Abort { .. } => return None,
    };
    Some(pb::Operator { copyset: copyset.get(), change: Some(change) })
}

fn address((id, address): (ChunkserverId, String)) -> pb::ChunkserverAddress {
    pb::ChunkserverAddress { id: id.get(), address }
}

/// Routes of the copysets asked for; of all if none is named. Unknown ones are left out.
fn routes_reply(state: &MetaState, topology: &Topology, wanted: &[u32], now: Instant) -> pb::RoutesReply {
    let route = |id: CopysetId, members: &[ChunkserverId]| pb::Route {
        copyset: id.get(),
        members: raw(members),
        leader: topology.leader(id, now).map_or(0, |leader| leader.chunkserver.get()),
    };
    let routes = match wanted {
        [] => state.copysets().map(|(id, copyset)| route(id, &copyset.members)).collect(),
        wanted => wanted
            .iter()
            .filter_map(|id| {
                let id = CopysetId::new(*id);
                Some(route(id, &state.copyset(id)?.members))
            })
            .collect(),
    };
    pb::RoutesReply { chunkservers: orders::book(state).into_iter().map(address).collect(), routes }
}

fn status_reply(state: &MetaState, topology: &Topology, now: Instant) -> pb::StatusReply {
    let mut replicas: HashMap<ChunkserverId, u32> = HashMap::new();
    let mut leads: HashMap<ChunkserverId, u32> = HashMap::new();
    for (id, copyset) in state.copysets() {
        for member in &copyset.members {
            *replicas.entry(*member).or_insert(0) += 1;
        }
        if let Some(leader) = topology.leader(id, now) {
            *leads.entry(leader.chunkserver).or_insert(0) += 1;
        }
    }
    let chunkservers = state.chunkservers().map(|server| {
        let report = topology.server(server.id).and_then(|known| known.report.clone()).unwrap_or_default();
        pb::ChunkserverStatus {
            id: server.id.get(),
            address: server.address.clone().unwrap_or_default(),
            zone: server.zone.clone(),
            state: server_state(server.gone, topology.is_up(server.id, now)).name().to_owned(),
            last_heartbeat_ms: millis(topology.silent_for(server.id, now)),
            capacity_bytes: report.capacity,
            used_bytes: report.used,
            full: report.full,
            copysets: replicas.get(&server.id).copied().unwrap_or(0),
            leaders: leads.get(&server.id).copied().unwrap_or(0),
            version: report.version,
        }
    });
    let copysets = state.copysets().map(|(id, copyset)| {
        let Health { state: word, reason } = health(state, topology, id, copyset, now);
        pb::CopysetStatus {
            id: id.get(),
            members: raw(&copyset.members),
            leader: topology.leader(id, now).map_or(0, |leader| leader.chunkserver.get()),
            term: topology.term(id),
            state: word.to_owned(),
            reason,
        }
    });
    pb::StatusReply {
        cluster_id: state.cluster().to_owned(),
        chunkservers: chunkservers.collect(),
        copysets: copysets.collect(),
        volumes: state.volume_count() as u32,
        version: spline_process::VERSION.to_owned(),
    }
}
