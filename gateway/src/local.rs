//! A file by the file engine's lane, without a link: what the engine costs alone.
//!
//! Called by whoever puts a guest's device and the engine into one process, to measure what the split costs (`tests/bench`).
//! Must not know: sessions, links, limits of volumes.

use crate::buffer::BufferPool;
use crate::config::FileIo;
use crate::engine::file::Files;
use crate::engine::{Engine, Lane, OpenError, Wanted};
use crate::shared::{Regions, SharedData};
use spline_link::memory::SharedMemory;
use spline_link::ring::Piece;
use spline_link::{Identity, VolumeTraits};
use spline_types::{BlockRequest, Fault, Geometry};
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};

/// A file that is open, past the page cache where requests allow it.
pub struct LocalFile {
    engine: Arc<dyn Engine>,
    lane: Box<dyn Lane>,
    regions: Arc<Regions>,
}

impl LocalFile {
    /// Opens a file or block device, on the runtime that will poll it. Blocks.
    ///
    /// # Errors
    /// As a gateway's refusal of the volume; `Unavailable` where there is no io_uring.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let root = path.parent().unwrap_or(path).to_owned();
        let engine =
            Files::new(vec![root], FileIo::Direct, BufferPool::new()).open(path, Wanted::default())?;
        let lane =
            engine.lane().ok_or_else(|| OpenError::Unavailable("there is no io_uring here".to_owned()))?;
        Ok(Self { engine: Arc::new(engine), lane, regions: Arc::default() })
    }

    /// Size and block size.
    pub fn geometry(&self) -> Geometry {
        self.engine.geometry()
    }

    /// Which file it is.
    pub fn identity(&self) -> Identity {
        self.engine.traits().identity
    }

    /// What a guest may be told of it.
    pub fn traits(&self) -> VolumeTraits {
        let traits = self.engine.traits();
        VolumeTraits {
            read_only: traits.read_only,
            volatile_cache: traits.volatile_cache,
            fast_zero: traits.fast_zero,
            rotational: traits.rotational,
        }
    }

    /// The memory that pieces of later requests lie in, numbered from 0; false if those are too many regions.
    pub fn share(&mut self, memory: impl Iterator<Item = SharedMemory>) -> bool {
        let mut numbers = 0..;
        let regions = { memory }.try_fold(Regions::default(), |all, one| all.with(numbers.next()?, one));
        regions.map(|regions| self.regions = Arc::new(regions)).is_some()
    }

    /// Begins a read, write or flush that was checked against the geometry; false if its memory is not shared or aligned, or
    /// while something under way is in its place: it may be tried again when something has ended.
    pub fn begin(&mut self, ticket: u32, request: &BlockRequest, pieces: &[Piece]) -> bool {
        let data = SharedData::new(&self.regions, pieces);
        data.is_ok_and(|data| self.lane.begin(ticket, request, data).is_ok())
    }

    /// Starts what was begun, and appends what has ended, by ticket; ready if anything has.
    pub fn poll(&mut self, cx: &mut Context<'_>, ended: &mut Vec<(u32, Result<(), Fault>)>) -> Poll<()> {
        self.lane.poll(cx, ended)
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.lane.is_idle()
    }

    /// Gives the file back. Nothing is under way.
    pub async fn close(self) {
        drop(self.lane);
        self.engine.close().await;
    }
}
