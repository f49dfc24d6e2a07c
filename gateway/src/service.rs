//! The administration service (gRPC, `spline.gateway.v1`): what is open, closing a volume, and the planned upgrade.
//!
//! Called by operators through `spline`. The only module that sees generated types.

use crate::registry::Registry;
use crate::session::Session;
use crate::upgrade::{HandOver, UpgradeError, Upgraded};
use anyhow::Context;
use spline_rpc::gateway as pb;
use spline_rpc::gateway::gateway_server::{Gateway as GatewayService, GatewayServer};
use spline_types::VolumeName;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tracing::error;

/// Longest time for one call: closing waits for links to drain, an upgrade has parts with limits of their own.
const CALL_LIMIT: Duration = Duration::from_mins(20);

/// An address that is listened on and not served yet.
pub(crate) struct Admin {
    listener: TcpListener,
    address: SocketAddr,
}

impl Admin {
    /// Binds the administration address; port 0 takes a free one.
    pub(crate) fn bind(listen: SocketAddr) -> anyhow::Result<Self> {
        let listener =
            TcpListener::bind(listen).with_context(|| format!("can not listen: admin_listen={listen}"))?;
        Ok(Self::over(listener)?)
    }

    /// Over a socket that listens already.
    pub(crate) fn over(listener: TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// The socket, for another process to listen on as well.
    pub(crate) fn pass(&self) -> io::Result<OwnedFd> {
        Ok(self.listener.try_clone()?.into())
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until either is cancelled; answers what was asked until then.
    pub(crate) async fn serve(self, service: Service, over: [CancellationToken; 2]) {
        let listener = match tokio::net::TcpListener::from_std(self.listener) {
            Ok(listener) => listener,
            Err(error) => return error!(%error, "administration service does not run"),
        };
        let over = async move {
            let [one, other] = &over;
            tokio::select! {
                () = one.cancelled() => {}
                () = other.cancelled() => {}
            }
        };
        let served = tonic::transport::Server::builder()
            .timeout(CALL_LIMIT)
            .add_service(GatewayServer::new(service))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), over);
        if let Err(error) = served.await {
            error!(%error, "administration service has ended");
        }
    }
}

/// What answers.
pub(crate) struct Service {
    id: String,
    registry: Arc<Registry>,
    since: SystemTime,
    /// Of a gateway that can be replaced.
    hand_over: Option<Arc<HandOver>>,
}

impl Service {
    pub(crate) fn new(id: String, registry: Arc<Registry>, hand_over: Option<Arc<HandOver>>) -> Self {
        Self { id, registry, since: SystemTime::now(), hand_over }
    }
}

#[tonic::async_trait]
impl GatewayService for Service {
    async fn status(
        &self,
        _: Request<pb::GatewayStatusRequest>,
    ) -> Result<Response<pb::GatewayStatusReply>, Status> {
        let listed = self.registry.listed();
        let mut sessions: Vec<_> = listed.sessions.iter().map(|session| shown(session)).collect();
        sessions.sort_by(|a, b| a.volume.cmp(&b.volume));
        let mut busy: Vec<_> = listed.busy.iter().map(ToString::to_string).collect();
        busy.sort();
        Ok(Response::new(pb::GatewayStatusReply {
            id: self.id.clone(),
            version: spline_process::VERSION.to_owned(),
            since_unix_ms: unix_ms(self.since),
            sessions,
            busy,
            pid: std::process::id(),
            binary: self
                .hand_over
                .as_ref()
                .map(|it| it.launch.binary.display().to_string())
                .unwrap_or_default(),
        }))
    }

    async fn close_volume(
        &self,
        request: Request<pb::CloseVolumeRequest>,
    ) -> Result<Response<pb::CloseVolumeReply>, Status> {
        let name: VolumeName = request.into_inner().volume.parse().map_err(Status::invalid_argument)?;
        if self.registry.close_volume(&name).await {
            return Ok(Response::new(pb::CloseVolumeReply {}));
        }
        Err(Status::not_found(format!("volume is not open here: volume={name} gateway={}", self.id)))
    }

    async fn upgrade(
        &self,
        request: Request<pb::UpgradeRequest>,
    ) -> Result<Response<pb::UpgradeReply>, Status> {
        let Some(hand_over) = self.hand_over.clone() else {
            return Err(Status::failed_precondition(
                "this gateway is part of another process, which can not be upgraded; restart that",
            ));
        };
        let binary = request.into_inner().binary;
        let binary = (!binary.is_empty()).then(|| PathBuf::from(binary));
        // A task of its own: whoever asked may go away in the middle.
        let upgraded = tokio::spawn(async move { hand_over.run(binary).await });
        match upgraded.await {
            Ok(Ok(Upgraded { product, pid, sessions, links, pause, took })) => {
                Ok(Response::new(pb::UpgradeReply {
                    version: product,
                    pid,
                    sessions,
                    took_ms: took.as_millis() as u64,
                    links,
                    pause_us: pause.as_micros() as u64,
                }))
            }
            Ok(Err(error @ UpgradeError::Broken { .. })) => Err(Status::internal(error.to_string())),
            Ok(Err(error)) => Err(Status::failed_precondition(error.to_string())),
            Err(error) => Err(Status::internal(format!("upgrade has ended: error={error}"))),
        }
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

fn shown(session: &Session) -> pb::VolumeSession {
    let (inflight_requests, inflight_bytes) = session.admission.inflight();
    let state = match (session.is_lost(), session.in_doubt.load(Ordering::Acquire)) {
        (true, _) => "fenced",
        (false, true) => "reopening",
        (false, false) => "serving",
    };
    pb::VolumeSession {
        volume: session.name.to_string(),
        engine: session.engine.name().to_owned(),
        epoch: session.engine.traits().epoch.get(),
        size_bytes: session.engine.geometry().size,
        links: session.links() as u32,
        inflight_requests,
        inflight_bytes,
        state: state.to_owned(),
        since_unix_ms: unix_ms(session.since),
        read_only: session.engine.traits().read_only,
        ring_links: session.rings() as u32,
    }
}
