//! The metadata server as the commands see it: plain data in and out. The only file here that knows generated types.
//!
//! Called by the commands. Must not know how results are printed.

use anyhow::{Context, bail};
use serde::Serialize;
use spline_rpc::mds as pb;
use spline_rpc::mds::cluster_client::ClusterClient;
use spline_rpc::mds::volumes_client::VolumesClient;
use spline_types::{ByteSize, OnUnavailable, VolumeName};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Time to reach one metadata server; the next of the list is tried then.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for one call, a leader's election included.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A volume, as `volume ls` and `volume info` show it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Volume {
    /// Never reused.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Size that guests see, bytes.
    pub size_bytes: u64,
    /// What guests are told to align to, bytes.
    pub block_size: u32,
    /// When it was created, milliseconds since 1970.
    pub created_unix_ms: u64,
    /// `wait` or `fail-after:SECONDS`.
    pub on_unavailable: String,
    /// Segments (1 GiB) that have a place.
    pub segments_allocated: u32,
    /// Bytes of one replica, as last reported.
    pub bytes_stored: u64,
    /// Who has it open.
    pub session: Option<Session>,
}

/// Who has a volume open.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Session {
    /// Its number; newer wins.
    pub epoch: u64,
    /// The gateway's id.
    pub gateway: String,
    /// Since when, milliseconds since 1970.
    pub since_unix_ms: u64,
    /// What is left of the lease, milliseconds.
    pub lease_left_ms: u64,
}

/// The cluster, as `cluster status` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ClusterStatus {
    /// Made when the metadata server was first started.
    pub cluster_id: String,
    /// Version of the metadata server.
    pub version: String,
    /// Number of volumes.
    pub volumes: u32,
    /// All that ever registered.
    pub chunkservers: Vec<Chunkserver>,
    /// All raft groups.
    pub copysets: Vec<Copyset>,
}

/// A chunkserver as the metadata server sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Chunkserver {
    /// Its id.
    pub id: u32,
    /// Where it serves data.
    pub address: String,
    /// Its failure domain.
    pub zone: String,
    /// `up`, `down` or `gone`.
    pub state: String,
    /// Milliseconds since it last reported.
    pub last_heartbeat_ms: u64,
    /// Bytes it may use.
    pub capacity_bytes: u64,
    /// Bytes it uses.
    pub used_bytes: u64,
    /// It can not take another chunk.
    pub full: bool,
    /// Replicas it holds.
    pub copysets: u32,
    /// Copysets it leads.
    pub leaders: u32,
    /// Its version.
    pub version: String,
}

/// A copyset as the metadata server sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Copyset {
    /// Its id.
    pub id: u32,
    /// Chunkservers that hold a replica.
    pub members: Vec<u32>,
    /// The leader; `None`: unknown.
    pub leader: Option<u32>,
    /// Its raft term.
    pub term: u64,
    /// `healthy`, `degraded` or `unavailable`.
    pub state: String,
    /// Why it is not healthy.
    pub reason: Option<String>,
}

/// A connection to the metadata server.
#[derive(Clone, Debug)]
pub struct MdsClient {
    channel: Channel,
    address: String,
}

impl MdsClient {
    /// Connects to the first of `addresses` (`host:port`) that answers.
    ///
    /// # Errors
    /// If none answers; the message says which were tried.
    pub async fn connect(addresses: &[String]) -> anyhow::Result<Self> {
        for address in addresses {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))
                .with_context(|| {
                    format!("not an address of a metadata server: value={address:?}; write host:port")
                })?
                .connect_timeout(CONNECT_TIMEOUT)
                .timeout(CALL_TIMEOUT);
            match endpoint.connect().await {
                Ok(channel) => return Ok(Self { channel, address: address.clone() }),
                Err(error) => tracing::debug!(%address, %error, "metadata server does not answer"),
            }
        }
        bail!(
            "no metadata server answers, is one running? set --mds or SPLINE_MDS to its address: tried={}",
            addresses.join(",")
        )
    }

    /// Creates a volume.
    ///
    /// # Errors
    /// The server's words, or that it does not answer; so for every call below.
    pub async fn create(
        &self,
        name: &VolumeName,
        size: ByteSize,
        block_size: u32,
        on_unavailable: OnUnavailable,
    ) -> anyhow::Result<Volume> {
        let request = pb::CreateVolumeRequest {
            name: name.to_string(),
            size_bytes: size.0,
            block_size,
            on_unavailable: on_unavailable.to_string(),
        };
        self.volume_of(self.volumes().create(request).await)
    }

    /// All volumes.
    pub async fn list(&self) -> anyhow::Result<Vec<Volume>> {
        let reply = self.explain(self.volumes().list(pb::ListVolumesRequest {}).await)?;
        Ok(reply.volumes.into_iter().map(volume).collect())
    }

    /// One volume.
    pub async fn get(&self, name: &VolumeName) -> anyhow::Result<Volume> {
        self.volume_of(self.volumes().get(pb::GetVolumeRequest { name: name.to_string() }).await)
    }

    /// One volume, or `None` if there is none of that name.
    pub async fn find(&self, name: &VolumeName) -> anyhow::Result<Option<Volume>> {
        match self.volumes().get(pb::GetVolumeRequest { name: name.to_string() }).await {
            Err(status) if status.code() == Code::NotFound => Ok(None),
            result => self.volume_of(result).map(Some),
        }
    }

    /// Grows a volume.
    pub async fn resize(&self, name: &VolumeName, size: ByteSize) -> anyhow::Result<Volume> {
        let request = pb::ResizeVolumeRequest { name: name.to_string(), size_bytes: size.0 };
        self.volume_of(self.volumes().resize(request).await)
    }

    /// Gives a volume another name.
    pub async fn rename(&self, name: &VolumeName, new_name: &VolumeName) -> anyhow::Result<Volume> {
        let request = pb::RenameVolumeRequest { name: name.to_string(), new_name: new_name.to_string() };
        self.volume_of(self.volumes().rename(request).await)
    }

    /// Deletes a volume.
    pub async fn delete(&self, name: &VolumeName) -> anyhow::Result<()> {
        let request = pb::DeleteVolumeRequest { name: name.to_string() };
        self.explain(self.volumes().delete(request).await).map(drop)
    }

    /// Chunkservers and copysets.
    pub async fn status(&self) -> anyhow::Result<ClusterStatus> {
        let reply =
            self.explain(ClusterClient::new(self.channel.clone()).status(pb::StatusRequest {}).await)?;
        Ok(ClusterStatus {
            cluster_id: reply.cluster_id,
            version: reply.version,
            volumes: reply.volumes,
            chunkservers: reply.chunkservers.into_iter().map(chunkserver).collect(),
            copysets: reply.copysets.into_iter().map(copyset).collect(),
        })
    }

    fn volumes(&self) -> VolumesClient<Channel> {
        VolumesClient::new(self.channel.clone())
    }

    fn volume_of(&self, result: Result<tonic::Response<pb::Volume>, Status>) -> anyhow::Result<Volume> {
        self.explain(result).map(volume)
    }

    fn explain<T>(&self, result: Result<tonic::Response<T>, Status>) -> anyhow::Result<T> {
        match result {
            Ok(response) => Ok(response.into_inner()),
            Err(status)
                if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled) =>
            {
                bail!("metadata server can not answer now: {} mds={}", status.message(), self.address)
            }
            Err(status) if status.message().is_empty() => bail!("{} mds={}", status.code(), self.address),
            Err(status) => bail!("{}", status.message()),
        }
    }
}

fn volume(pb: pb::Volume) -> Volume {
    Volume {
        id: pb.id,
        name: pb.name,
        size_bytes: pb.size_bytes,
        block_size: pb.block_size,
        created_unix_ms: pb.created_unix_ms,
        on_unavailable: pb.on_unavailable,
        segments_allocated: pb.segments_allocated,
        bytes_stored: pb.bytes_stored,
        session: pb.session.map(|s| Session {
            epoch: s.epoch,
            gateway: s.gateway,
            since_unix_ms: s.since_unix_ms,
            lease_left_ms: s.lease_left_ms,
        }),
    }
}

fn chunkserver(pb: pb::ChunkserverStatus) -> Chunkserver {
    Chunkserver {
        id: pb.id,
        address: pb.address,
        zone: pb.zone,
        state: pb.state,
        last_heartbeat_ms: pb.last_heartbeat_ms,
        capacity_bytes: pb.capacity_bytes,
        used_bytes: pb.used_bytes,
        full: pb.full,
        copysets: pb.copysets,
        leaders: pb.leaders,
        version: pb.version,
    }
}

fn copyset(pb: pb::CopysetStatus) -> Copyset {
    let leader = (pb.leader != 0).then_some(pb.leader);
    let reason = Some(pb.reason).filter(|reason| !reason.is_empty());
    Copyset { id: pb.id, members: pb.members, leader, term: pb.term, state: pb.state, reason }
}
