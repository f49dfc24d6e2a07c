//! Calls of the metadata servers over gRPC. Generated types stop here. Must never know what the answers are used for.
//!
//! The server that answered last is asked first; the others follow when it can not be reached.

use crate::client::ClientConfig;
use crate::meta::{MetaError, OpenedSession, Renewal, RenewedSession, RouteUpdate, SessionState};
use crate::metrics::Metrics;
use spline_rpc::mds as pb;
use spline_rpc::mds::cluster_client::ClusterClient;
use spline_rpc::mds::sessions_client::SessionsClient;
use spline_types::limits::SEGMENT_CHUNKS;
use spline_types::{
    BlockSize, ChunkserverId, CopysetId, Epoch, Geometry, OnUnavailable, SegmentIndex, VolumeId, VolumeName,
};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

/// Largest answer, bytes: the segments of a volume of 64 TiB take about 10 MB.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Longest wait for a connection: a server that is there answers sooner.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);

/// The metadata servers of a cluster.
pub(crate) struct Mds {
    servers: Vec<Server>,
    timeout: Duration,
    /// Which answered last.
    preferred: AtomicUsize,
    metrics: Arc<Metrics>,
}

struct Server {
    address: String,
    /// Made at the first call: that needs a running runtime.
    channel: OnceLock<Channel>,
}

impl Server {
    fn channel(&self) -> Result<Channel, String> {
        if let Some(channel) = self.channel.get() {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))
            .map_err(|error| format!("not an address, write host:port: {error}"))?;
        Ok(self.channel.get_or_init(|| endpoint.connect_timeout(CONNECT_LIMIT).connect_lazy()).clone())
    }
}

impl Mds {
    pub(super) fn new(config: &ClientConfig, metrics: Arc<Metrics>) -> Self {
        let server = |address: &String| Server { address: address.clone(), channel: OnceLock::new() };
        let servers = config.mds.iter().map(server).collect();
        Self { servers, timeout: config.mds_timeout, preferred: AtomicUsize::new(0), metrics }
    }

    pub(crate) async fn open(
        &self,
        volume: &VolumeName,
        gateway: &str,
        force: bool,
        resumes: Option<Epoch>,
        known: Option<VolumeId>,
        newest: Option<Epoch>,
    ) -> Result<OpenedSession, MetaError> {
        let request = pb::OpenSessionRequest {
            volume: volume.as_str().into(),
            gateway: gateway.into(),
            force,
            resumed_epoch: resumes.map(Epoch::get),
            known_id: known.map(VolumeId::get),
            newest_epoch: newest.map(Epoch::get),
        };
        let (address, reply) = self
            .ask("open", |channel| {
                let request = self.timed(request.clone());
                async move { sessions(channel).open(request).await }
            })
            .await?;
        opened(reply).map_err(|what| MetaError::BadReply { address: address.into(), what })
    }

    pub(crate) async fn renew(
        &self,
        gateway: &str,
        asked: &[(VolumeId, Epoch)],
    ) -> Result<Renewal, MetaError> {
        let refs = asked.iter().map(|&(volume, epoch)| session_ref(volume, epoch)).collect();
        let request = pb::RenewSessionsRequest { gateway: gateway.into(), sessions: refs };
        let (_, reply) = self
            .ask("renew", |channel| {
                let request = self.timed(request.clone());
                async move { sessions(channel).renew(request).await }
            })
            .await?;
        let sessions = reply.sessions.into_iter().map(|session| RenewedSession {
            volume: VolumeId::new(session.volume_id),
            epoch: Epoch::new(session.epoch),
            state: match session.lost {
                true => SessionState::Lost,
                false => SessionState::Alive { size: session.size_bytes, name: session.name },
            },
        });
        Ok(Renewal { lease: Duration::from_millis(reply.lease_ms), sessions: sessions.collect() })
    }

    pub(crate) async fn close(&self, volume: VolumeId, epoch: Epoch) -> Result<(), MetaError> {
        let request = pb::CloseSessionRequest { volume_id: volume.get(), epoch: epoch.get() };
        self.ask("close", |channel| {
            let request = self.timed(request);
            async move { sessions(channel).close(request).await }
        })
        .await?;
        Ok(())
    }

    pub(crate) async fn allocate(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        index: SegmentIndex,
    ) -> Result<Arc<[CopysetId]>, MetaError> {
        let request =
            pb::AllocateSegmentRequest { volume_id: volume.get(), epoch: epoch.get(), index: index.get() };
        let (address, reply) = self
            .ask("allocate", |channel| {
                let request = self.timed(request);
                async move { sessions(channel).allocate_segment(request).await }
            })
            .await?;
        match segment(reply) {
            Ok((seen, copysets)) if seen == index => Ok(copysets),
            Ok((seen, _)) => Err(format!("asked for segment={index}, got segment={seen}")),
            Err(what) => Err(what),
        }
        .map_err(|what| MetaError::BadReply { address: address.into(), what })
    }

    pub(super) async fn routes(&self, copysets: &[CopysetId]) -> Result<RouteUpdate, MetaError> {
        let request = pb::RoutesRequest { copysets: copysets.iter().map(|id| id.get()).collect() };
        let (_, reply) = self
            .ask("routes", |channel| {
                let request = self.timed(request.clone());
                let client = ClusterClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
                async move { { client }.routes(request).await }
            })
            .await?;
        let mut update = RouteUpdate::default();
        for server in reply.chunkservers {
            match resolve(&server.address).await {
                Some(address) => {
                    update.addresses.insert(ChunkserverId::new(server.id), address);
                }
                None => {
                    tracing::warn!(chunkserver = server.id, address = %server.address, "can not resolve a chunkserver's address");
                }
            }
        }
        for route in reply.routes {
            let leader = (route.leader != 0).then(|| ChunkserverId::new(route.leader));
            let members = route.members.into_iter().map(ChunkserverId::new).collect();
            update.copysets.insert(CopysetId::new(route.copyset), (members, leader));
        }
        Ok(update)
    }

    fn timed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    /// Asks the servers in turn until one can be reached; also names the one that answered.
    async fn ask<T, F>(&self, call: &'static str, ask: impl Fn(Channel) -> F) -> Result<(&str, T), MetaError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let first = self.preferred.load(Ordering::Relaxed);
        let mut tried = Vec::new();
        for place in (0..self.servers.len()).map(|turn| (first + turn) % self.servers.len()) {
            let server = &self.servers[place];
            let asked = match server.channel() {
                // The deadline that travels with the request does not bind a server that is silent.
                Ok(channel) => tokio::time::timeout(self.timeout, ask(channel))
                    .await
                    .unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time"))),
                Err(why) => Err(Status::unavailable(why)),
            };
            let status = match asked {
                Ok(response) => {
                    self.metrics.mds_called(call, "ok");
                    self.preferred.store(place, Ordering::Relaxed);
                    return Ok((&server.address, response.into_inner()));
                }
                Err(status) => status,
            };
            if !unreachable(&status) {
                self.metrics.mds_called(call, "refused");
                self.preferred.store(place, Ordering::Relaxed);
                return Err(refused(&server.address, &status));
            }
            self.metrics.mds_called(call, "unreachable");
            tried.push(format!("{}: {}", server.address, cause(&status)));
        }
        if tried.is_empty() {
            tried.push("no address is configured".into());
        }
        Err(MetaError::Unreachable { tried: tried.join("; ") })
    }
}

fn sessions(channel: Channel) -> SessionsClient<Channel> {
    SessionsClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX)
}

const fn session_ref(volume: VolumeId, epoch: Epoch) -> pb::SessionRef {
    pb::SessionRef { volume_id: volume.get(), epoch: epoch.get() }
}

/// Whether another server may do better: this one is gone, slow, or not the leader of its group. A status with a
/// source was made on this side, of a connection that broke; its code may be any.
fn unreachable(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted)
        || std::error::Error::source(status).is_some()
}

fn refused(address: &str, status: &Status) -> MetaError {
    let (address, message) = (address.to_owned(), status.message().to_owned());
    match status.code() {
        Code::NotFound => MetaError::NotFound { address, message },
        Code::AlreadyExists => MetaError::Replaced { address, message },
        code => MetaError::Refused { address, fault: spline_rpc::fault::fault_of(code), message },
    }
}

/// The innermost cause says what happened ("connection refused"); the outer ones say "transport error".
fn cause(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut next = std::error::Error::source(status);
    while let Some(error) = next {
        text = error.to_string();
        next = error.source();
    }
    text
}

async fn resolve(address: &str) -> Option<SocketAddr> {
    match address.parse() {
        Ok(address) => Some(address),
        Err(_) => tokio::net::lookup_host(address).await.ok()?.next(),
    }
}

fn opened(reply: pb::OpenSessionReply) -> Result<OpenedSession, String> {
    let volume = reply.volume.ok_or("no volume in the answer")?;
    let block_size = BlockSize::from_bytes(volume.block_size)
        .ok_or_else(|| format!("unknown block size: block_size={}", volume.block_size))?;
    let on_unavailable = match volume.on_unavailable.as_str() {
        "" => OnUnavailable::default(),
        text => text.parse()?,
    };
    // A server that does not know of runs would not have judged a resume either.
    if reply.run_since == 0 || reply.run_since > reply.epoch {
        return Err(format!(
            "run of sessions does not fit: run_since={} epoch={}",
            reply.run_since, reply.epoch
        ));
    }
    let segments: Result<HashMap<_, _>, String> = reply.segments.into_iter().map(segment).collect();
    Ok(OpenedSession {
        volume: VolumeId::new(volume.id),
        geometry: Geometry { size: volume.size_bytes, block_size },
        epoch: Epoch::new(reply.epoch),
        run_since: Epoch::new(reply.run_since),
        on_unavailable,
        lease: Duration::from_millis(reply.lease_ms),
        segments: segments?,
    })
}

fn segment(segment: pb::Segment) -> Result<(SegmentIndex, Arc<[CopysetId]>), String> {
    let pb::Segment { index, copysets } = segment;
    match copysets.len() {
        n if n == SEGMENT_CHUNKS as usize => {
            Ok((SegmentIndex::new(index), copysets.into_iter().map(CopysetId::new).collect()))
        }
        n => Err(format!("wrong number of copysets: segment={index} copysets={n} expected={SEGMENT_CHUNKS}")),
    }
}

#[cfg(test)]
mod tests;
