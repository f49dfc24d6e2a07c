//! Chunks that a snapshot under way relies on: they were found equal to the sender's, and so were not asked for.
//!
//! Called by the state machine before it changes a chunk, and by the snapshot. Must not know: the network.
//! Old entries of the log may still be applied while a snapshot arrives, and may change such a chunk to something that
//! the sender's never was. A copy is then set aside in `incoming/` first, as if it had been sent
//! (`replicas_identical`).

use super::Shared;
use super::snapshot::{INCOMING, PIECE_BLOCKS, PIECES};
use crate::store::chunk_store::file_name;
use crate::store::{Chunk, Patience, StoreError};
use spline_raft::LogPosition;
use spline_types::{ChunkId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

/// What the transfer under way relies on. Whoever changes a chunk, or looks whether one is equal, holds its lock.
#[derive(Debug, Default)]
pub struct Relied {
    /// Number of the transfer.
    transfer: u64,
    /// What its snapshot covers.
    position: Option<LogPosition>,
    /// Chunks in their place, with the digest that they must have.
    chunks: BTreeMap<ChunkId, u64>,
    /// Chunks of which a copy was set aside.
    kept: BTreeSet<ChunkId>,
}

/// What a transfer relied on in the end.
#[derive(Debug)]
pub struct Found {
    /// Chunks in their place, with the digest that they must have.
    pub in_place: Vec<(ChunkId, u64)>,
    /// Chunks in `incoming/`.
    pub kept: BTreeSet<ChunkId>,
}

/// A transfer's hold on its chunks; dropped, it lets go of them.
pub struct Reliance {
    shared: Arc<Shared>,
    transfer: u64,
}

impl Drop for Reliance {
    fn drop(&mut self) {
        let mut relied = self.shared.relied();
        if relied.transfer == self.transfer {
            *relied = Relied { transfer: self.transfer, ..Relied::default() };
        }
    }
}

impl Reliance {
    /// A new transfer begins, of a snapshot that covers the log up to `position`, whatever became of the last one.
    pub fn begin(shared: &Arc<Shared>, position: Option<LogPosition>) -> Self {
        let mut relied = shared.relied();
        let transfer = relied.transfer + 1;
        *relied = Relied { transfer, position, ..Relied::default() };
        drop(relied);
        Self { shared: Arc::clone(shared), transfer }
    }

    /// Whether the chunk here has this content; from now on it is relied on then. Blocks.
    ///
    /// # Errors
    /// If the chunk can not be opened, or another transfer has begun.
    pub fn rely_on(&self, id: ChunkId, digest: u64) -> Result<bool, StoreError> {
        let mut relied = self.shared.relied();
        let living = self.shared.store.get(id, Patience::Blocking)?;
        let equal = living.is_some_and(|chunk| chunk.summary(PIECE_BLOCKS).1 == digest);
        if relied.transfer != self.transfer {
            return Err(StoreError::Io(superseded()));
        }
        if equal {
            relied.chunks.insert(id, digest);
        }
        Ok(equal)
    }

    /// What was relied on, and is no more.
    ///
    /// # Errors
    /// If another transfer has begun, or the log has overtaken this one: nothing has guarded the chunks since.
    pub fn end(&self) -> io::Result<Found> {
        let mut relied = self.shared.relied();
        if relied.transfer != self.transfer {
            return Err(superseded());
        }
        Ok(Found {
            in_place: std::mem::take(&mut relied.chunks).into_iter().collect(),
            kept: std::mem::take(&mut relied.kept),
        })
    }
}

impl Relied {
    /// Entries up to `applied` are applied now. A snapshot that ends before is of no use any more (raft does not
    /// install it): its transfer, abandoned perhaps, lets go of its chunks.
    pub fn overtaken_at(&mut self, applied: LogPosition) {
        if self.position.is_some_and(|position| position.index < applied.index) {
            *self = Relied { transfer: self.transfer + 1, ..Relied::default() };
        }
    }

    /// Called before a chunk changes: sets a copy aside if it is relied on.
    ///
    /// # Errors
    /// `WouldBlock` with [`Patience::Inline`] if there is something to copy; `NoSpace`; `Io`.
    pub fn before_change(
        &mut self,
        shared: &Shared,
        id: ChunkId,
        patience: Patience,
    ) -> Result<(), StoreError> {
        match (self.chunks.contains_key(&id), patience) {
            (false, _) => Ok(()),
            (true, Patience::Inline) => Err(StoreError::WouldBlock),
            (true, Patience::Blocking) => self.set_aside(shared, id),
        }
    }

    /// As [`Relied::before_change`], for all chunks of a volume. Blocks.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub fn before_delete(&mut self, shared: &Shared, volume: VolumeId) -> Result<(), StoreError> {
        let ids: Vec<_> = self.chunks.keys().copied().filter(|id| id.volume == volume).collect();
        ids.into_iter().try_for_each(|id| self.set_aside(shared, id))
    }

    fn set_aside(&mut self, shared: &Shared, id: ChunkId) -> Result<(), StoreError> {
        if let Some(chunk) = shared.store.get(id, Patience::Blocking)? {
            let path = shared.dir.join(INCOMING).join(file_name(id));
            let copy = Chunk::fresh(id, shared.store.disk().pool.take(&path, true)?);
            let copied = fill(&chunk, &copy);
            if copied.is_err() {
                shared.store.disk().pool.give_back(&path)?;
            }
            copied?;
            self.kept.insert(id);
        }
        self.chunks.remove(&id);
        Ok(())
    }
}

fn superseded() -> io::Error {
    io::Error::other(
        "the snapshot does not hold any more, another transfer has begun or the log has overtaken it",
    )
}

/// Copies every block, durably.
fn fill(from: &Chunk, to: &Chunk) -> Result<(), StoreError> {
    for piece in 0..PIECES {
        let blocks = from.export(piece * PIECE_BLOCKS..(piece + 1) * PIECE_BLOCKS)?;
        let blocks: Vec<_> =
            blocks.iter().map(|(block, sum, bytes)| (*block, *sum, bytes.as_slice())).collect();
        to.import(&blocks)?;
    }
    // Data first: a header that is found after a crash vouches for it.
    to.sync()?;
    to.persist()?;
    Ok(to.sync()?)
}
