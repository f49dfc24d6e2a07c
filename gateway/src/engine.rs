//! What a session stands on: one trait, and one module per engine.
//!
//! Called by sessions. An engine knows where bytes are; it must not know links, sockets or guests.

use crate::buffer::BufferPool;
use crate::config::Config;
use crate::shared::SharedData;
use bytes::Bytes;
use cluster::Cluster;
use futures_util::future::BoxFuture;
use spline_link::Identity;
use spline_types::{
    BlockRequest, ChunkserverId, CopysetId, Epoch, Extent, Fault, Geometry, OnUnavailable, VolumeName,
};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::watch;

pub mod cluster;
pub mod file;

/// What an engine can do and how its answers are to be understood; fixed while it is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EngineTraits {
    /// Answered writes may still be lost by a power cut until a flush is answered.
    pub volatile_cache: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// Write-zeroes is quicker than writing zeros.
    pub fast_zero: bool,
    /// Seeks are dear.
    pub rotational: bool,
    /// Which volume it is, whatever its name.
    pub identity: Identity,
    /// Number of the session; 0 for engines without one.
    pub epoch: Epoch,
    /// Nobody else had a session from this one on; 0 for engines without sessions.
    pub run_since: Epoch,
    /// What requests do while the volume can not be reached.
    pub on_unavailable: OnUnavailable,
}

/// What may change while an engine is open; links watch it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Bytes of the volume; only grows.
    pub size: u64,
    /// A newer session exists (`one_writer`): every later request is refused with `Fenced`.
    pub lost: bool,
}

/// What an engine answers to a request that it carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EngineAnswer {
    /// Carried out; nothing to bring back.
    Done,
    /// The bytes of a read, in order; together exactly as long as the range.
    Data(Vec<Bytes>),
    /// The allocation of a range, in order from its start. May cover less than the range, never nothing of it.
    Extents(Vec<Extent>),
}

/// Why a volume could not be opened; the text is one line for a human.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such volume, or it may not be served here.
    #[error("{0}")]
    NotFound(String),
    /// Someone else has it.
    #[error("{0}")]
    Held(String),
    /// The name is another volume's than the one that nebd knows.
    #[error("{0}")]
    Replaced(String),
    /// It may be had later.
    #[error("{0}")]
    Unavailable(String),
    /// Something failed that should not.
    #[error("{0}")]
    Internal(String),
}

/// What serves the requests of one volume.
pub(crate) trait Engine: Send + Sync + 'static {
    /// A short lower-case name: `cluster`, `file`.
    fn name(&self) -> &'static str;

    /// Size and block size now.
    fn geometry(&self) -> Geometry;

    /// What it can do.
    fn traits(&self) -> EngineTraits;

    /// Makes sure that the session is still the newest; if it is not, [`Engine::standing`] says so afterwards. With `by_name`,
    /// also that the volume still has the name under which it was opened.
    ///
    /// # Errors
    /// `Unavailable` if nobody can tell, or if the volume was renamed.
    fn prove(&self, by_name: bool) -> BoxFuture<'_, Result<(), OpenError>>;

    /// Size and loss, to be watched.
    fn standing(&self) -> watch::Receiver<Standing>;

    /// Carries out one request that was checked against the geometry; `payload` is as long as the range of a
    /// write and empty otherwise. Starts when first polled. A future that is dropped may leave its work running:
    /// [`Engine::close`] waits for that.
    fn execute(
        &self,
        request: BlockRequest,
        payload: Bytes,
    ) -> BoxFuture<'static, Result<EngineAnswer, Fault>>;

    /// A quick way in for one link, if there is one. Called on the runtime that will poll it. What is begun in it and what is
    /// executed keep the same order where they meet.
    fn lane(&self) -> Option<Box<dyn Lane>> {
        None
    }

    /// Whether links have a lane.
    fn has_lane(&self) -> bool {
        false
    }

    /// Ends everything that runs and gives the volume back. Later requests fail with `Fenced`.
    fn close(&self) -> BoxFuture<'_, ()>;

    /// From now on the next process of this gateway may open the volume, which is served on meanwhile; answers what that one
    /// needs for it. [`Engine::keep`] undoes it, unless it may have been opened.
    ///
    /// # Errors
    /// Why it can not be passed on.
    fn pass(&self) -> BoxFuture<'_, Result<Passed, OpenError>> {
        let why = format!("this engine can not be passed on: engine={}", self.name());
        Box::pin(std::future::ready(Err(OpenError::Internal(why))))
    }

    /// The next process has not opened the volume and will not.
    fn keep(&self) {}

    /// Links are told to leave: what can not be carried out here any more fails with `Fenced`, and is withdrawn.
    fn leave(&self) {}

    /// Ends everything that runs, but gives nothing back: the next process has the volume. False if something may still run,
    /// or if the volume must be opened anew for another reason.
    fn release(&self) -> BoxFuture<'_, bool> {
        Box::pin(async move {
            self.close().await;
            true
        })
    }
}

/// What the next process of a gateway needs to serve a volume, beside its traits.
#[derive(Debug, Default)]
pub struct Passed {
    /// The file, of engines that have one: with it goes the lock, which must not be given back any more.
    pub file: Option<OwnedFd>,
}

/// What is known of a session that another process of this gateway serves, and that is to be gone on with.
#[derive(Debug)]
pub(crate) struct Legacy {
    pub(crate) epoch: Epoch,
    pub(crate) identity: Identity,
    pub(crate) read_only: bool,
    pub(crate) passed: Passed,
}

/// How a request that a lane was given has ended, by its ticket.
pub(crate) type Ended = (u32, Result<(), Fault>);

/// Carries out requests of one link whose data lies in shared memory, without a future, copy or allocation for each. It is
/// the link's alone. Dropped in the middle, it sees to it that memory stays mapped, and the engine does not close, until what
/// the kernel has of it has ended.
pub(crate) trait Lane: Send {
    /// Takes a request that was checked as for [`Engine::execute`]; the ticket comes back once, from [`Lane::poll`], which also
    /// starts it. `data` is where a read's bytes go and a write's come from, and empty for a flush.
    ///
    /// # Errors
    /// The data, if the request can not be served here: what it does, where its memory lies, what it would meet. Then it is
    /// [`Engine::execute`]'s.
    fn begin(&mut self, ticket: u32, request: &BlockRequest, data: SharedData) -> Result<(), SharedData>;

    /// Starts what was begun since the last call, all with one system call, and appends what has ended. Ready if anything
    /// has; else the waker is told when something may have. A lane that breaks takes nothing more; what the kernel may still carry
    /// out it ends when that has.
    fn poll(&mut self, cx: &mut Context<'_>, ended: &mut Vec<Ended>) -> Poll<()>;

    /// Nothing is under way.
    fn is_idle(&self) -> bool;
}

/// How a volume is to be opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Wanted {
    /// Nobody wants to write: a volume that can not be written will do.
    pub(crate) read_only: bool,
    /// Take it from another gateway whose lease is alive. A local file is never taken from who holds it.
    pub(crate) force: bool,
    /// The session that a nebd goes on with; what it was not answered there will be sent again.
    pub(crate) resumes: Option<Epoch>,
    /// The volume that a nebd knows by the name: no other may be opened for it.
    pub(crate) known: Option<Identity>,
}

/// The refusal for a name that is another volume's than the one that nebd knows.
pub(crate) fn replaced(name: impl std::fmt::Display, now: Identity, known: Identity) -> OpenError {
    OpenError::Replaced(format!(
        "another volume has the name now, what was not answered is not written: volume={name} identity={now} known={known}"
    ))
}

/// Where engines come from.
pub(crate) trait Opener: Send + Sync + 'static {
    /// Opens a volume; for reading only if it can not be written and nobody wants to. `Replaced` if it is not the known one.
    fn open<'a>(
        &'a self,
        name: &'a VolumeName,
        wanted: Wanted,
    ) -> BoxFuture<'a, Result<Arc<dyn Engine>, OpenError>>;

    /// Opens a volume that another process of this gateway serves still, for when that one leaves. `Held` if somebody else
    /// took it meanwhile.
    fn adopt<'a>(
        &'a self,
        name: &'a VolumeName,
        _legacy: Legacy,
    ) -> BoxFuture<'a, Result<Arc<dyn Engine>, OpenError>> {
        let why = format!("this gateway can not take volumes over: volume={name}");
        Box::pin(std::future::ready(Err(OpenError::Internal(why))))
    }

    /// Makes sure that what volumes are opened with can be reached.
    fn reach(&self) -> BoxFuture<'_, Result<(), OpenError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Who is believed to lead copysets, at most `limit` of them; hints for the next process of this gateway.
    fn leaders(&self, _limit: usize) -> Vec<(CopysetId, ChunkserverId)> {
        Vec::new()
    }

    /// Believes what the process before believed.
    fn believe(&self, _leaders: &[(CopysetId, ChunkserverId)]) {}

    /// Ends what runs for all engines. Every volume has been closed.
    fn stop(&self);
}

fn serves_files_only(name: &VolumeName) -> OpenError {
    OpenError::NotFound(format!(
        "this gateway serves files only: volume={name}; set mds in its config to serve the cluster"
    ))
}

/// Opens volumes by name: `file:/abs/path` by the file engine, every other name by the cluster.
pub(crate) struct Engines {
    cluster: Option<Cluster>,
    files: Arc<file::Files>,
    sizes: file::Sizes,
}

impl Engines {
    /// `id` is the gateway's stable name.
    pub(crate) fn new(
        config: &Config,
        id: &str,
        buffers: BufferPool,
        registry: &mut prometheus_client::registry::Registry,
    ) -> Self {
        let cluster = (!config.mds.is_empty()).then(|| Cluster::new(config, id, registry));
        Self {
            cluster,
            files: Arc::new(file::Files::new(config.file_roots.clone(), config.file_io, buffers)),
            sizes: file::Sizes::default(),
        }
    }
}

impl Opener for Engines {
    fn open<'a>(
        &'a self,
        name: &'a VolumeName,
        wanted: Wanted,
    ) -> BoxFuture<'a, Result<Arc<dyn Engine>, OpenError>> {
        Box::pin(async move {
            if let Some(path) = name.as_str().strip_prefix("file:") {
                let (files, path) = (Arc::clone(&self.files), PathBuf::from(path));
                let opened = tokio::task::spawn_blocking(move || files.open(&path, wanted)).await;
                let opened =
                    opened.map_err(|error| OpenError::Internal(format!("open failed: error={error}")))?;
                let engine = opened?;
                self.sizes.watch(&engine);
                return Ok(Arc::new(engine) as Arc<dyn Engine>);
            }
            match &self.cluster {
                Some(cluster) => cluster.open(name, wanted).await,
                None => Err(serves_files_only(name)),
            }
        })
    }

    fn adopt<'a>(
        &'a self,
        name: &'a VolumeName,
        legacy: Legacy,
    ) -> BoxFuture<'a, Result<Arc<dyn Engine>, OpenError>> {
        Box::pin(async move {
            if let Some(path) = name.as_str().strip_prefix("file:") {
                let (files, path) = (Arc::clone(&self.files), PathBuf::from(path));
                let adopted = tokio::task::spawn_blocking(move || files.adopt(&path, legacy)).await;
                let engine =
                    adopted.map_err(|error| OpenError::Internal(format!("open failed: error={error}")))??;
                self.sizes.watch(&engine);
                return Ok(Arc::new(engine) as Arc<dyn Engine>);
            }
            match &self.cluster {
                Some(cluster) => cluster.adopt(name, &legacy).await,
                None => Err(serves_files_only(name)),
            }
        })
    }

    fn reach(&self) -> BoxFuture<'_, Result<(), OpenError>> {
        Box::pin(async move {
            match &self.cluster {
                Some(cluster) => cluster.reach().await,
                None => Ok(()),
            }
        })
    }

    fn leaders(&self, limit: usize) -> Vec<(CopysetId, ChunkserverId)> {
        self.cluster.as_ref().map_or_else(Vec::new, |cluster| cluster.leaders(limit))
    }

    fn believe(&self, leaders: &[(CopysetId, ChunkserverId)]) {
        if let Some(cluster) = &self.cluster {
            cluster.believe(leaders);
        }
    }

    fn stop(&self) {
        if let Some(cluster) = &self.cluster {
            cluster.stop();
        }
    }
}
