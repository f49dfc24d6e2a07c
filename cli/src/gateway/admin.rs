//! A gateway's administration service as the commands see it: plain data in and out. The only file here that knows its generated
//! types.
//!
//! Called by the commands. Must not know how results are printed.

use anyhow::{Context, bail};
use serde::Serialize;
use spline_rpc::gateway as pb;
use spline_rpc::gateway::gateway_client::GatewayClient;
use std::path::Path;
use std::time::Duration;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// Time to reach the gateway, which is on this host.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A gateway, as `gateway status` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct GatewayStatus {
    /// The name under which it opens sessions.
    pub id: String,
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// What an upgrade would start; empty: it can not be upgraded.
    pub binary: String,
    /// When it was started, milliseconds since 1970.
    pub since_unix_ms: u64,
    /// The volumes that it serves, by name.
    pub sessions: Vec<VolumeSession>,
    /// Names of those that are being opened or closed.
    pub busy: Vec<String>,
}

/// One volume that a gateway serves.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct VolumeSession {
    /// Its name.
    pub volume: String,
    /// `cluster` or `file`.
    pub engine: String,
    /// Number of the session; 0 for files.
    pub epoch: u64,
    /// Bytes of the volume.
    pub size_bytes: u64,
    /// Connections of nebds.
    pub links: u32,
    /// Those that use shared memory.
    pub ring_links: u32,
    /// Requests that were taken and not answered yet.
    pub inflight_requests: u64,
    /// Their data, bytes.
    pub inflight_bytes: u64,
    /// `serving`; `fenced` if a newer session has the volume; `reopening` after an upgrade that was given up, until a metadata
    /// server has renewed the session.
    pub state: String,
    /// Writes are refused.
    pub read_only: bool,
    /// When the session was opened, milliseconds since 1970.
    pub since_unix_ms: u64,
}

/// What came of an upgrade.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Upgraded {
    /// Version of the new process.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Sessions that it has taken over.
    pub sessions: u32,
    /// From the command to the end of the old process's work, milliseconds.
    pub took_ms: u64,
    /// Links that go on as they were; nebds of the others have connected anew.
    pub links: u32,
    /// Longest time in which nobody took requests from one of them, microseconds.
    pub pause_us: u64,
}

/// A connection to the service.
#[derive(Clone, Debug)]
pub struct Admin {
    client: GatewayClient<Channel>,
    address: String,
}

impl Admin {
    /// Connects to `address` (`host:port`).
    ///
    /// # Errors
    /// If nobody answers there.
    pub async fn connect(address: &str) -> anyhow::Result<Self> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .with_context(|| format!("not an address of a gateway: value={address:?}; write host:port"))?;
        let channel = endpoint.connect_timeout(CONNECT_TIMEOUT).connect().await.with_context(|| {
            format!("gateway does not answer, does it run? set --admin to its admin_listen: admin={address}")
        })?;
        Ok(Self { client: GatewayClient::new(channel), address: address.to_owned() })
    }

    /// What it is and what it serves.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn status(&self) -> anyhow::Result<GatewayStatus> {
        let reply = self.explain(self.client.clone().status(pb::GatewayStatusRequest {}).await)?;
        Ok(GatewayStatus {
            id: reply.id,
            version: reply.version,
            pid: reply.pid,
            binary: reply.binary,
            since_unix_ms: reply.since_unix_ms,
            sessions: reply.sessions.into_iter().map(session).collect(),
            busy: reply.busy,
        })
    }

    /// Replaces it; waits until the new process serves.
    ///
    /// # Errors
    /// Why it was not replaced, in the gateway's words.
    pub async fn upgrade(&self, binary: Option<&Path>) -> anyhow::Result<Upgraded> {
        let binary = match binary.map(|path| path.to_str()) {
            None => String::new(),
            Some(Some(path)) => path.to_owned(),
            Some(None) => bail!("path of the new binary is not valid UTF-8"),
        };
        let reply = self.explain(self.client.clone().upgrade(pb::UpgradeRequest { binary }).await)?;
        let pb::UpgradeReply { version, pid, sessions, took_ms, links, pause_us } = reply;
        Ok(Upgraded { version, pid, sessions, took_ms, links, pause_us })
    }

    fn explain<T>(&self, result: Result<tonic::Response<T>, Status>) -> anyhow::Result<T> {
        match result {
            Ok(response) => Ok(response.into_inner()),
            Err(status) if status.message().is_empty() => bail!("{} admin={}", status.code(), self.address),
            Err(status) => bail!("{}", status.message()),
        }
    }
}

fn session(pb: pb::VolumeSession) -> VolumeSession {
    VolumeSession {
        volume: pb.volume,
        engine: pb.engine,
        epoch: pb.epoch,
        size_bytes: pb.size_bytes,
        links: pb.links,
        ring_links: pb.ring_links,
        inflight_requests: pb.inflight_requests,
        inflight_bytes: pb.inflight_bytes,
        state: pb.state,
        read_only: pb.read_only,
        since_unix_ms: pb.since_unix_ms,
    }
}
