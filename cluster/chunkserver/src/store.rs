//! The store: chunks as files of one data directory.
//!
//! Called by the state machine and the copysets. Must never know: raft, the network, who asks.
//!
//! Modules in the order in which a write meets them: [`reservation`] (of new chunks, before the write is logged) →
//! [`chunk_store`] (the chunks of one copyset) → [`pool`] (where new
//! files come from) → [`chunk_file`] (one open chunk) → [`checksum`] → [`layout`] (its bytes).
//! Invariants: `bounded` (open files), `replicas_identical`.

pub mod checksum;
pub mod chunk_file;
pub mod chunk_store;
pub mod layout;
pub mod pool;
pub mod reservation;

pub use chunk_file::{Chunk, Damaged, Merge};
pub use chunk_store::{ChunkStore, Unsynced};
pub use pool::Pool;
pub use reservation::Reservation;

use prometheus_client::metrics::counter::Counter;
use reservation::Promised;
use spline_types::{ChunkId, CopysetId};
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Whether an operation may wait for the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Patience {
    /// On a thread of the runtime: whatever would wait for the disk fails with `WouldBlock`, having changed nothing.
    Inline,
    /// On a thread that may block.
    Blocking,
}

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Would have to wait for the disk; do it again with [`Patience::Blocking`].
    #[error("would have to wait for the disk")]
    WouldBlock,
    /// The disk has no room for it.
    #[error("no space left for chunks, free or add disk space")]
    NoSpace,
    /// The data does not match its checksum.
    #[error("block does not match its checksum chunk={chunk} block={block}")]
    Corrupt {
        /// Of which chunk.
        chunk: ChunkId,
        /// The block.
        block: u32,
    },
    /// The disk failed.
    #[error("disk failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            _ => Self::Io(error),
        }
    }
}

/// What the copysets of one data directory share: the pool and the open chunk files.
pub struct Disk {
    /// Where new chunk files come from.
    pub pool: Arc<Pool>,
    /// Blocks found that do not match their checksum.
    pub damaged: Counter,
    open: Mutex<HashMap<(CopysetId, ChunkId), Arc<Chunk>>>,
    /// Open chunks to keep; more are open only while all of them are dirty or in use.
    limit: usize,
    tick: AtomicU64,
    promised: Promised,
}

impl Disk {
    /// A disk over `pool` that keeps `limit` chunks open.
    pub fn new(pool: Arc<Pool>, limit: usize, damaged: Counter) -> Arc<Self> {
        let (open, tick) = (Mutex::default(), AtomicU64::new(0));
        Arc::new(Self { pool, damaged, open, limit: limit.max(16), tick, promised: Promised::default() })
    }

    /// Chunks open now.
    pub fn open_chunks(&self) -> usize {
        self.open.lock().expect("no panic under the lock").len()
    }

    /// Whether more are open than there should be: only a checkpoint lets dirty ones go.
    pub fn crowded(&self) -> bool {
        self.open_chunks() > self.limit
    }

    fn find(&self, key: (CopysetId, ChunkId)) -> Option<Arc<Chunk>> {
        let open = self.open.lock().expect("no panic under the lock");
        let chunk = open.get(&key)?;
        chunk.touch(self.tick.fetch_add(1, Ordering::Relaxed));
        Some(Arc::clone(chunk))
    }

    fn insert(&self, key: (CopysetId, ChunkId), chunk: &Arc<Chunk>) {
        chunk.touch(self.tick.fetch_add(1, Ordering::Relaxed));
        let mut open = self.open.lock().expect("no panic under the lock");
        open.insert(key, Arc::clone(chunk));
        if open.len() <= self.limit {
            return;
        }
        // Dirty chunks are held by their copyset, so a chunk that only this map holds is clean and unused.
        let mut idle: Vec<_> = open
            .iter()
            .filter(|(_, chunk)| Arc::strong_count(chunk) == 1)
            .map(|(key, chunk)| (chunk.used.load(Ordering::Relaxed), *key))
            .collect();
        idle.sort_unstable();
        for (_, key) in idle.into_iter().take(self.limit / 8) {
            open.remove(&key);
        }
    }

    fn forget(&self, key: (CopysetId, ChunkId)) {
        self.open.lock().expect("no panic under the lock").remove(&key);
    }

    fn forget_copyset(&self, copyset: CopysetId) {
        self.open.lock().expect("no panic under the lock").retain(|(owner, _), _| *owner != copyset);
    }
}
