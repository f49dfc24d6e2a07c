//! Calls to the metadata server. The one place of this crate where generated types are seen.
//!
//! Called by the heartbeat and at the first start. Must not know: what reports and orders mean.

use super::{Assignment, CopysetReport, Operator, Orders, Report};
use spline_rpc::mds::cluster_client::ClusterClient;
use spline_rpc::mds::{self as pb, operator::Change};
use spline_types::{ChunkserverId, CopysetId, VolumeId};
use std::time::Duration;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

/// Time for a connection: the next server is tried after it.
const CONNECT: Duration = Duration::from_secs(1);
/// Time for an answer: a little more than two heartbeats, so that a slow leader is not asked twice.
const ANSWER: Duration = Duration::from_millis(2500);

/// Why a directory got no id.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// It can not be part of this cluster as it is configured: this process should end.
    #[error("the metadata server does not take this chunkserver: {0}")]
    Refused(String),
    /// It may be had later.
    #[error("{0}")]
    Unavailable(String),
}

/// The metadata servers, of which one at a time is talked to.
pub struct MdsClient {
    addresses: Vec<String>,
    at: usize,
    client: Option<ClusterClient<Channel>>,
}

impl MdsClient {
    /// A client of the servers at `addresses` (`host:port`); connects when it is used.
    pub fn new(addresses: Vec<String>) -> Self {
        Self { addresses, at: 0, client: None }
    }

    /// Asks for the id of a formatted directory.
    ///
    /// # Errors
    /// Why no server gave one; the next call asks the next server.
    pub async fn register(
        &mut self,
        address: &str,
        zone: &str,
        store_uuid: &str,
        election_max_ms: u64,
    ) -> Result<(ChunkserverId, String), RegisterError> {
        let (address, zone, store_uuid) = (address.to_owned(), zone.to_owned(), store_uuid.to_owned());
        let request = pb::RegisterRequest { address, zone, store_uuid, election_max_ms };
        let mut refused = None;
        let reply = match self.client() {
            Ok(client) => client.register(request).await.map_err(|status| {
                if status.code() == Code::FailedPrecondition {
                    refused = Some(status.message().to_owned());
                }
                status.to_string()
            }),
            Err(error) => Err(error),
        };
        let reply = self.judge(reply).map_err(|error| match refused {
            Some(why) => RegisterError::Refused(why),
            None => RegisterError::Unavailable(error),
        })?;
        if reply.chunkserver_id == 0 {
            return Err(RegisterError::Unavailable("the metadata server gave id 0".into()));
        }
        Ok((ChunkserverId::new(reply.chunkserver_id), reply.cluster_id))
    }

    /// Reports and takes orders.
    ///
    /// # Errors
    /// Why no server answered; the next call asks the next server.
    pub async fn heartbeat(&mut self, report: Report) -> Result<Orders, String> {
        let request = request_of(report);
        let reply = match self.client() {
            Ok(client) => client.heartbeat(request).await.map_err(|status| status.to_string()),
            Err(error) => Err(error),
        };
        self.judge(reply).map(orders_of)
    }

    fn client(&mut self) -> Result<&mut ClusterClient<Channel>, String> {
        if self.client.is_none() {
            let address = self.addresses.get(self.at).ok_or("no metadata server is configured, set mds")?;
            let endpoint = Endpoint::from_shared(format!("http://{address}"));
            let endpoint =
                endpoint.map_err(|error| format!("not an address: value={address:?} error={error}"))?;
            let endpoint = endpoint.connect_timeout(CONNECT).timeout(ANSWER).tcp_nodelay(true);
            // Connects with the first call, whose failure is judged like any other.
            let channel = endpoint.connect_lazy();
            self.client = Some(ClusterClient::new(channel));
        }
        self.client.as_mut().ok_or_else(|| "not connected".into())
    }

    /// After a failure the next server is asked.
    fn judge<T>(&mut self, reply: Result<tonic::Response<T>, String>) -> Result<T, String> {
        reply.map(tonic::Response::into_inner).inspect_err(|_| {
            self.client = None;
            self.at = (self.at + 1) % self.addresses.len().max(1);
        })
    }
}

fn request_of(report: Report) -> pb::HeartbeatRequest {
    pb::HeartbeatRequest {
        chunkserver_id: report.id.get(),
        address: report.address,
        capacity_bytes: report.capacity,
        used_bytes: report.used,
        full: report.full,
        copysets: report.copysets.into_iter().map(copyset_of).collect(),
        reclaimed_volumes: Vec::new(),
        version: spline_process::VERSION.to_owned(),
    }
}

fn copyset_of(report: CopysetReport) -> pb::CopysetReport {
    let ids = |ids: Vec<ChunkserverId>| ids.into_iter().map(ChunkserverId::get).collect();
    pb::CopysetReport {
        id: report.id.get(),
        leader: report.leader,
        term: report.term,
        applied_index: report.applied,
        log_end_index: report.log_end,
        stopped: report.stopped,
        members: ids(report.members),
        learners: ids(report.learners),
        usage: (report.usage.into_iter())
            .map(|(volume, bytes)| pb::VolumeUsage { volume_id: volume.get(), bytes })
            .collect(),
        reclaimed_volumes: report.reclaimed.into_iter().map(VolumeId::get).collect(),
    }
}

fn orders_of(reply: pb::HeartbeatReply) -> Orders {
    let assignment = |a: pb::CopysetAssignment| Assignment {
        id: CopysetId::new(a.id),
        members: a.members.into_iter().map(ChunkserverId::new).collect(),
        bootstrap: a.bootstrap,
    };
    let operator = |operator: pb::Operator| {
        let copyset = CopysetId::new(operator.copyset);
        Some(match operator.change? {
            Change::Replace(pb::ReplacePeer { add, remove }) => {
                let (add, remove) = (ChunkserverId::new(add), ChunkserverId::new(remove));
                Operator::Replace { copyset, add, remove }
            }
            Change::Transfer(pb::TransferLeader { to }) => {
                Operator::Transfer { copyset, to: ChunkserverId::new(to) }
            }
        })
    };
    Orders {
        interval: Duration::from_millis(reply.interval_ms),
        addresses: reply.chunkservers.into_iter().map(|c| (ChunkserverId::new(c.id), c.address)).collect(),
        assignments: reply.assignments.into_iter().map(assignment).collect(),
        operators: reply.operators.into_iter().filter_map(operator).collect(),
        reclaims: (reply.reclaims.into_iter())
            .map(|r| (CopysetId::new(r.copyset), VolumeId::new(r.volume_id)))
            .collect(),
        full: reply.full_chunkservers.into_iter().map(ChunkserverId::new).collect(),
    }
}
