//! The administration service (gRPC, `spline.gateway.v1`): what is open, and closing a volume.
//!
//! Called by operators through `spline`. The only module that sees generated types.

use crate::registry::Registry;
use crate::session::Session;
use anyhow::Context;
use spline_rpc::gateway as pb;
use spline_rpc::gateway::gateway_server::{Gateway as GatewayService, GatewayServer};
use spline_types::VolumeName;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tracing::error;

/// Longest time for one call: closing waits for links to drain.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// A bound, not yet served address.
pub(crate) struct Admin {
    listener: TcpListener,
    address: SocketAddr,
}

/// Binds the administration address; port 0 takes a free one.
pub(crate) fn bind(listen: SocketAddr) -> anyhow::Result<Admin> {
    let listener =
        TcpListener::bind(listen).with_context(|| format!("can not listen: admin_listen={listen}"))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok(Admin { listener, address })
}

impl Admin {
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `gone`.
    pub(crate) async fn serve(self, id: String, registry: Arc<Registry>, gone: CancellationToken) {
        let listener = match tokio::net::TcpListener::from_std(self.listener) {
            Ok(listener) => listener,
            Err(error) => return error!(%error, "administration service does not run"),
        };
        let service = Service { id, registry, since: SystemTime::now() };
        let served = tonic::transport::Server::builder()
            .timeout(CALL_LIMIT)
            .add_service(GatewayServer::new(service))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), gone.cancelled_owned());
        if let Err(error) = served.await {
            error!(%error, "administration service has ended");
        }
    }
}

struct Service {
    id: String,
    registry: Arc<Registry>,
    since: SystemTime,
}

#[tonic::async_trait]
impl GatewayService for Service {
    async fn status(
        &self,
        _: Request<pb::GatewayStatusRequest>,
    ) -> Result<Response<pb::GatewayStatusReply>, Status> {
        let since = self.since.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut sessions: Vec<_> = self.registry.sessions().iter().map(|session| shown(session)).collect();
        sessions.sort_by(|a, b| a.volume.cmp(&b.volume));
        Ok(Response::new(pb::GatewayStatusReply {
            id: self.id.clone(),
            version: spline_process::VERSION.to_owned(),
            since_unix_ms: since.as_millis() as u64,
            sessions,
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
}

fn shown(session: &Session) -> pb::VolumeSession {
    let (inflight_requests, inflight_bytes) = session.admission.inflight();
    pb::VolumeSession {
        volume: session.name.to_string(),
        engine: session.engine.name().to_owned(),
        epoch: session.engine.traits().epoch.get(),
        size_bytes: session.engine.geometry().size,
        links: session.links() as u32,
        inflight_requests,
        inflight_bytes,
        state: if session.is_lost() { "fenced" } else { "serving" }.to_owned(),
    }
}
