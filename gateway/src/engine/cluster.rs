//! The cluster engine: a volume whose chunks are replicated by copysets.
//!
//! Called by sessions. Knows: the session with the metadata server, which segments are allocated. Must not know:
//! links, leaders, retries. Invariants: `one_writer` (a lost session fails everything), and IO goes on without the
//! metadata server: only new segments, opens and resizes wait.

mod lease;
mod succession;

use super::{Engine, EngineAnswer, EngineTraits, Legacy, OpenError, Passed, Standing, Wanted};
use crate::config::Config;
use crate::fanout::{self, Chunks, PartAnswer};
use crate::split::Part;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use lease::Leases;
use spline_client::{ClientConfig, ClusterClient, MetaError, OpenedSession, Span, SpanAnswer, VolumeClient};
use spline_link::Identity;
use spline_types::{
    BlockRequest, BlockSize, ChunkId, ChunkOp, ChunkserverId, CopysetId, Epoch, Fault, Geometry,
    SegmentIndex, VolumeId, VolumeName,
};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use succession::Succession;
use tokio::sync::{OnceCell, watch};
use tracing::{info, warn};

/// Time to give a session back; if the metadata server is away, the lease runs out instead.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// Time to connect to chunkservers before a session is taken over; requests connect by themselves as well.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);

/// The cluster as a source of engines.
pub(crate) struct Cluster {
    client: ClusterClient,
    /// The gateway's stable name.
    gateway: String,
    leases: Arc<Leases>,
}

impl Cluster {
    pub(crate) fn new(
        config: &Config,
        gateway: &str,
        registry: &mut prometheus_client::registry::Registry,
    ) -> Self {
        let client =
            ClusterClient::new(ClientConfig { mds: config.mds.clone(), ..ClientConfig::default() }, registry);
        let leases = Leases::start(client.clone(), gateway.to_owned());
        Self { client, gateway: gateway.to_owned(), leases }
    }

    pub(crate) async fn open(&self, name: &VolumeName, wanted: Wanted) -> Result<Arc<dyn Engine>, OpenError> {
        let known = wanted.known.map(volume_of).transpose()?;
        let Wanted { force, resumes, .. } = wanted;
        let opened = self.client.open_session(name, &self.gateway, force, resumes, known, None).await;
        self.engine(name, &opened.map_err(refused)?)
    }

    /// Opens the session that follows one of another process of this gateway, which serves it until it is told to leave:
    /// chunkservers hear of the new one with its first command. Connects to them already.
    pub(crate) async fn adopt(
        &self,
        name: &VolumeName,
        legacy: &Legacy,
    ) -> Result<Arc<dyn Engine>, OpenError> {
        let (known, epoch) = (volume_of(legacy.identity)?, legacy.epoch);
        let opened =
            self.client.open_session(name, &self.gateway, false, Some(epoch), Some(known), Some(epoch)).await;
        let opened = opened.map_err(refused)?;
        self.client.connect(&opened, CONNECT_LIMIT).await;
        self.engine(name, &opened)
    }

    /// Makes sure that a metadata server answers.
    pub(crate) async fn reach(&self) -> Result<(), OpenError> {
        self.client.renew(&self.gateway, &[]).await.map(drop).map_err(refused)
    }

    /// See [`ClusterClient::leaders`].
    pub(crate) fn leaders(&self, limit: usize) -> Vec<(CopysetId, ChunkserverId)> {
        self.client.leaders(limit)
    }

    /// See [`ClusterClient::believe`].
    pub(crate) fn believe(&self, leaders: &[(CopysetId, ChunkserverId)]) {
        self.client.believe(leaders);
    }

    fn engine(&self, name: &VolumeName, opened: &OpenedSession) -> Result<Arc<dyn Engine>, OpenError> {
        let identity = Identity::new(0, opened.volume.get())
            .ok_or_else(|| OpenError::Internal(format!("volume without an id: volume={name}")))?;
        let volume = Arc::new(Volume::new(name.clone(), self.client.clone(), opened, identity));
        self.leases.add(&volume, opened.lease);
        Ok(Arc::new(ClusterEngine { volume, leases: Arc::clone(&self.leases) }))
    }

    pub(crate) fn stop(&self) {
        self.leases.stop();
    }
}

fn volume_of(identity: Identity) -> Result<VolumeId, OpenError> {
    match identity.parts() {
        (0, id) => Ok(VolumeId::new(id)),
        _ => Err(OpenError::Internal(format!(
            "not the identity of a volume of a cluster: identity={identity}"
        ))),
    }
}

fn refused(error: MetaError) -> OpenError {
    let text = error.to_string();
    match error {
        MetaError::NotFound { .. } => OpenError::NotFound(text),
        MetaError::Replaced { .. } => OpenError::Replaced(text),
        MetaError::Refused { fault: Fault::Fenced, .. } => OpenError::Held(text),
        MetaError::Refused { fault: Fault::Invalid(_), .. } => OpenError::NotFound(text),
        MetaError::Refused { fault: Fault::Unavailable(_), .. } | MetaError::Unreachable { .. } => {
            OpenError::Unavailable(text)
        }
        MetaError::Refused { .. } | MetaError::BadReply { .. } => OpenError::Internal(text),
    }
}

struct ClusterEngine {
    volume: Arc<Volume>,
    leases: Arc<Leases>,
}

/// One session with the cluster.
struct Volume {
    name: VolumeName,
    id: VolumeId,
    traits: EngineTraits,
    block_size: BlockSize,
    size: AtomicU64,
    /// Its name by now; `name` is the one under which it was opened.
    called: Mutex<Called>,
    standing: watch::Sender<Standing>,
    cluster: ClusterClient,
    client: VolumeClient,
    segments: RwLock<HashMap<SegmentIndex, Arc<[CopysetId]>>>,
    /// Segments that are being allocated: whoever comes meanwhile waits for the same answer.
    allocating: Mutex<HashMap<SegmentIndex, Arc<Allocation>>>,
    succession: Succession,
}

/// A volume's name as it was last told.
struct Called {
    name: String,
    /// The renewal that told it: an answer to an earlier one that comes later may be older.
    renewal: u64,
}

type Allocation = OnceCell<Arc<[CopysetId]>>;

impl Volume {
    fn new(name: VolumeName, cluster: ClusterClient, opened: &OpenedSession, identity: Identity) -> Self {
        let traits = EngineTraits {
            volatile_cache: false,
            read_only: false,
            fast_zero: true,
            rotational: false,
            identity,
            epoch: opened.epoch,
            run_since: opened.run_since,
            on_unavailable: opened.on_unavailable,
        };
        let size = opened.geometry.size;
        Self {
            called: Mutex::new(Called { name: name.as_str().to_owned(), renewal: 0 }),
            name,
            id: opened.volume,
            traits,
            block_size: opened.geometry.block_size,
            size: AtomicU64::new(size),
            standing: watch::Sender::new(Standing { size, lost: false }),
            client: cluster.session(opened),
            cluster,
            segments: RwLock::new(opened.segments.clone()),
            allocating: Mutex::default(),
            succession: Succession::default(),
        }
    }

    const fn epoch(&self) -> Epoch {
        self.traits.epoch
    }

    /// The volume has grown; never shrinks.
    fn resized(&self, size: u64) {
        if self.size.fetch_max(size, Ordering::AcqRel) < size {
            info!(volume = %self.name, size, "volume was resized");
            self.standing.send_modify(|now| now.size = now.size.max(size));
        }
    }

    /// The volume has this name, as the answer to `renewal` says.
    fn renamed(&self, name: &str, renewal: u64) {
        let mut called = self.called.lock().unwrap_or_else(PoisonError::into_inner);
        if renewal < called.renewal {
            return;
        }
        called.renewal = renewal;
        if called.name != name {
            info!(volume = %self.name, name, "volume was renamed");
            name.clone_into(&mut called.name);
        }
    }

    /// Refused if the volume has another name by now than the one under which it was opened: that may be another volume's.
    fn is_called_so(&self) -> Result<(), OpenError> {
        let called = self.called.lock().unwrap_or_else(PoisonError::into_inner);
        match called.name == self.name.as_str() {
            true => Ok(()),
            false => Err(OpenError::Unavailable(format!(
                "the volume that is served under this name was renamed, end its exports first: volume={} name={}",
                self.name, called.name
            ))),
        }
    }

    /// A renewal says that a newer session exists.
    fn outlived(&self) {
        if self.succession.has_heir() {
            return;
        }
        warn!(volume = %self.name, epoch = %self.epoch(), "session is lost to a newer one");
        self.lose();
    }

    /// A newer session serves, or may.
    fn lose(&self) {
        self.client.fence();
        self.standing.send_if_modified(|now| !std::mem::replace(&mut now.lost, true));
    }
}

impl Chunks for Volume {
    fn allocated(&self, segment: SegmentIndex) -> Option<Arc<[CopysetId]>> {
        self.segments.read().unwrap_or_else(PoisonError::into_inner).get(&segment).cloned()
    }

    async fn allocate(&self, segment: SegmentIndex) -> Result<Arc<[CopysetId]>, Fault> {
        let flight = {
            let mut allocating = self.allocating.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(allocating.entry(segment).or_default())
        };
        let ask = || async {
            let _asking = self.succession.ask().await?;
            self.client.allocate_segment(segment).await
        };
        let allocated = flight.get_or_try_init(ask).await.cloned();
        if let Ok(copysets) = &allocated {
            let mut segments = self.segments.write().unwrap_or_else(PoisonError::into_inner);
            segments.insert(segment, Arc::clone(copysets));
        }
        // After the insertion: whoever misses the flight finds the segment. After a failure the next one asks anew.
        self.allocating.lock().unwrap_or_else(PoisonError::into_inner).remove(&segment);
        allocated
    }

    async fn execute(
        &self,
        copyset: CopysetId,
        op: ChunkOp,
        part: Part,
        payload: Bytes,
    ) -> Result<PartAnswer, Fault> {
        let chunk = ChunkId { volume: self.id, index: part.chunk };
        let payload = if payload.is_empty() { Vec::new() } else { vec![payload] };
        let answer = self.client.execute(Span { copyset, chunk, op, range: part.range }, payload).await?;
        Ok(match answer {
            SpanAnswer::Written => PartAnswer::Written,
            SpanAnswer::Data(data) => PartAnswer::Data(data),
            SpanAnswer::Extents(extents) => PartAnswer::Extents(extents),
        })
    }
}

impl Engine for ClusterEngine {
    fn name(&self) -> &'static str {
        "cluster"
    }

    fn geometry(&self) -> Geometry {
        Geometry { size: self.volume.size.load(Ordering::Acquire), block_size: self.volume.block_size }
    }

    fn traits(&self) -> EngineTraits {
        self.volume.traits
    }

    fn prove(&self, by_name: bool) -> BoxFuture<'_, Result<(), OpenError>> {
        Box::pin(async move {
            self.leases.renew(std::slice::from_ref(&self.volume)).await.map_err(refused)?;
            if self.volume.succession.has_heir() {
                let name = &self.volume.name;
                return Err(OpenError::Unavailable(format!(
                    "the session is about to be opened anew, try again: volume={name}"
                )));
            }
            if by_name { self.volume.is_called_so() } else { Ok(()) }
        })
    }

    fn standing(&self) -> watch::Receiver<Standing> {
        self.volume.standing.subscribe()
    }

    fn execute(
        &self,
        request: BlockRequest,
        payload: Bytes,
    ) -> BoxFuture<'static, Result<EngineAnswer, Fault>> {
        let volume = Arc::clone(&self.volume);
        Box::pin(async move {
            let answer = fanout::execute(&*volume, request, payload).await;
            if answer == Err(Fault::Fenced) && !volume.succession.is_left() {
                volume.lose();
            }
            answer
        })
    }

    fn pass(&self) -> BoxFuture<'_, Result<Passed, OpenError>> {
        Box::pin(async move {
            self.volume.succession.pass().await;
            Ok(Passed::default())
        })
    }

    fn keep(&self) {
        self.volume.succession.keep();
    }

    fn leave(&self) {
        self.volume.succession.leave();
    }

    fn release(&self) -> BoxFuture<'_, bool> {
        self.volume.succession.leave();
        self.leases.remove(&self.volume);
        // What is still on its way is refused by whoever has heard of the next session, and harmless before.
        self.volume.client.fence();
        Box::pin(std::future::ready(true))
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let lost = self.volume.standing.borrow().lost;
            self.leases.remove(&self.volume);
            // Nothing of this session may be sent any more when the next one begins.
            self.volume.client.fence();
            if lost {
                return;
            }
            let closed = self.volume.cluster.close_session(self.volume.id, self.volume.epoch());
            match tokio::time::timeout(CLOSE_LIMIT, closed).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    warn!(volume = %self.volume.name, %error, "session is not given back, its lease will run out");
                }
                Err(_) => {
                    warn!(volume = %self.volume.name, "metadata server is away, the lease will run out")
                }
            }
        })
    }
}
