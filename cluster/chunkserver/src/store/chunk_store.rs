//! The chunks of one copyset: files `<volume>-<index>` (hexadecimal) in one directory.
//!
//! Called by the state machine (writes, one at a time) and the copyset (reads, many at once). Must not know: the log.
//! A chunk without a file reads as zeros; a chunk file with nothing allocated goes back to the pool.

use super::chunk_file::{Chunk, Damaged, Merge};
use super::{Disk, Patience, StoreError};
use spline_types::limits::{CHUNK_BLOCK_BYTES, CHUNK_BYTES};
use spline_types::{ChunkId, ChunkIndex, ChunkRange, CopysetId, Extent, VolumeId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// Zeros are written this many bytes at a time; a multiple of the block size.
const ZEROS_STEP: u32 = 1 << 20;
static ZEROS: [u8; ZEROS_STEP as usize] = [0; ZEROS_STEP as usize];
const _: () = assert!(ZEROS_STEP.is_multiple_of(CHUNK_BLOCK_BYTES));

/// The chunks of one copyset.
pub struct ChunkStore {
    disk: Arc<Disk>,
    copyset: CopysetId,
    dir: PathBuf,
    /// Held while a file is opened, created or removed, so that a chunk is never open twice.
    names: Mutex<()>,
    index: Mutex<Index>,
}

#[derive(Default)]
struct Index {
    present: BTreeSet<ChunkId>,
    /// Named by the last checkpoint, so that a header must be there.
    recorded: BTreeSet<ChunkId>,
    dirty: HashMap<ChunkId, Arc<Chunk>>,
    names_changed: bool,
}

/// What was changed since the last checkpoint, captured by [`ChunkStore::unsynced`].
pub struct Unsynced {
    chunks: Vec<Arc<Chunk>>,
    dir: Option<PathBuf>,
    /// Every chunk that exists.
    pub present: Vec<ChunkId>,
}

impl Unsynced {
    /// Writes tables and headers, then makes everything durable. Blocks.
    ///
    /// # Errors
    /// If the disk fails; what was written may be lost.
    pub fn sync(&self) -> io::Result<()> {
        for chunk in &self.chunks {
            chunk.persist()?;
        }
        for chunk in &self.chunks {
            chunk.sync()?;
        }
        self.dir.as_ref().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    }
}

impl ChunkStore {
    /// Opens the chunks in `dir`, which is created if need be; `recorded` are those that the last checkpoint names.
    ///
    /// # Errors
    /// If the directory can not be read.
    pub fn open(disk: Arc<Disk>, copyset: CopysetId, dir: &Path, recorded: &[ChunkId]) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let present = list(dir)?;
        let recorded = recorded.iter().copied().collect();
        let index = Mutex::new(Index { present, recorded, ..Index::default() });
        Ok(Self { disk, copyset, dir: dir.to_owned(), names: Mutex::default(), index })
    }

    /// Whether the chunk has a file.
    pub fn has(&self, id: ChunkId) -> bool {
        self.index().present.contains(&id)
    }

    /// The chunks that have a file, and the number of chunks changed since the last checkpoint.
    pub fn counts(&self) -> (usize, usize) {
        let index = self.index();
        (index.present.len(), index.dirty.len())
    }

    /// All chunks that have a file.
    pub fn present(&self) -> Vec<ChunkId> {
        self.index().present.iter().copied().collect()
    }

    /// Bytes of chunk files by volume.
    pub fn usage(&self) -> Vec<(VolumeId, u64)> {
        let mut usage = BTreeMap::<VolumeId, u64>::new();
        for id in &self.index().present {
            *usage.entry(id.volume).or_default() += u64::from(CHUNK_BYTES);
        }
        usage.into_iter().collect()
    }

    /// Reads a range.
    ///
    /// # Errors
    /// As [`Chunk::read`].
    pub fn read(&self, id: ChunkId, range: ChunkRange, patience: Patience) -> Result<Vec<u8>, StoreError> {
        let Some(chunk) = self.get(id, patience)? else { return Ok(vec![0; range.length() as usize]) };
        let read = chunk.read(range, patience);
        if let Err(StoreError::Corrupt { block, .. }) = &read {
            self.disk.damaged.inc();
            tracing::error!(chunk = %id, block, copyset = %self.copyset, "block is damaged, it is not served from here");
        }
        read
    }

    /// Writes a damaged block again if `bytes` are what its checksum says; returns whether they are. Blocks.
    ///
    /// # Errors
    /// `Io`.
    pub fn mend(&self, id: ChunkId, block: u32, bytes: &[u8]) -> Result<bool, StoreError> {
        self.get(id, Patience::Blocking)?.map_or(Ok(false), |chunk| chunk.mend(block, bytes))
    }

    /// The allocation of a range.
    ///
    /// # Errors
    /// As [`Chunk::open`].
    pub fn extents(
        &self,
        id: ChunkId,
        range: ChunkRange,
        patience: Patience,
    ) -> Result<Vec<Extent>, StoreError> {
        Ok(match self.get(id, patience)? {
            Some(chunk) => chunk.extents(range),
            None => vec![Extent { length: u64::from(range.length()), hole: true, zero: true }],
        })
    }

    /// Writes `payload` at `range`; the chunk is created if need be.
    ///
    /// # Errors
    /// As [`Chunk::write`]; `NoSpace` if there is no file for a new chunk.
    pub fn write(
        &self,
        id: ChunkId,
        range: ChunkRange,
        payload: &[u8],
        merge: Merge,
        patience: Patience,
    ) -> Result<(), StoreError> {
        let chunk = self.get_or_create(id, patience)?;
        let damaged = chunk.write(range, payload, merge, patience)?;
        self.changed(&chunk, &damaged);
        Ok(())
    }

    /// Makes a range zeros and keeps its space; the chunk is created if need be.
    ///
    /// # Errors
    /// As [`ChunkStore::write`]. With `Inline` only ranges up to 1 MiB are done.
    pub fn write_zeroes(
        &self,
        id: ChunkId,
        range: ChunkRange,
        merge: Merge,
        patience: Patience,
    ) -> Result<(), StoreError> {
        if patience == Patience::Inline && range.length() > ZEROS_STEP {
            return Err(StoreError::WouldBlock);
        }
        let chunk = self.get_or_create(id, patience)?;
        let mut at = range.offset();
        while at < range.end() {
            let end = (at / ZEROS_STEP + 1) * ZEROS_STEP;
            let length = end.min(range.end()) - at;
            let Some(part) = ChunkRange::new(at, length) else { break };
            let damaged = chunk.write(part, &ZEROS[..length as usize], merge, patience)?;
            self.changed(&chunk, &damaged);
            at += length;
        }
        Ok(())
    }

    /// Makes a range zeros; a chunk with nothing left goes back to the pool, one that lives on keeps its space.
    ///
    /// # Errors
    /// As [`Chunk::discard`].
    pub fn discard(
        &self,
        id: ChunkId,
        range: ChunkRange,
        merge: Merge,
        patience: Patience,
    ) -> Result<(), StoreError> {
        if range == ChunkRange::whole() {
            return Ok(self.remove(id)?);
        }
        let Some(chunk) = self.get(id, patience)? else { return Ok(()) };
        let damaged = chunk.discard(range, merge, patience)?;
        self.changed(&chunk, &damaged);
        if chunk.is_empty() {
            self.remove(id)?;
        }
        Ok(())
    }

    /// Removes every chunk of a volume.
    ///
    /// # Errors
    /// If a file can not be moved to the pool.
    pub fn delete_volume(&self, volume: VolumeId) -> io::Result<()> {
        let ids: Vec<_> = self.index().present.iter().copied().filter(|id| id.volume == volume).collect();
        ids.into_iter().try_for_each(|id| self.remove(id))
    }

    /// Removes a chunk; its file goes back to the pool.
    ///
    /// # Errors
    /// If the file can not be moved.
    pub fn remove(&self, id: ChunkId) -> io::Result<()> {
        let _names = self.names.lock().expect("no panic under the lock");
        if !self.has(id) {
            return Ok(());
        }
        let path = self.path(id);
        match self.disk.find(self.key(id)) {
            Some(chunk) => chunk.remove(|| self.disk.pool.give_back(&path))?,
            None => self.disk.pool.give_back(&path)?,
        }
        self.disk.forget(self.key(id));
        let mut index = self.index();
        index.present.remove(&id);
        index.recorded.remove(&id);
        index.dirty.remove(&id);
        index.names_changed = true;
        Ok(())
    }

    /// Takes a complete chunk file from elsewhere in the data directory, in place of what the chunk had.
    ///
    /// # Errors
    /// If files can not be moved.
    pub fn adopt(&self, id: ChunkId, from: &Path) -> io::Result<()> {
        self.remove(id)?;
        let _names = self.names.lock().expect("no panic under the lock");
        fs::rename(from, self.path(id))?;
        let mut index = self.index();
        index.present.insert(id);
        index.recorded.insert(id);
        index.names_changed = true;
        Ok(())
    }

    /// Captures what a checkpoint must make durable. Cheap.
    pub fn unsynced(&self) -> Unsynced {
        let mut index = self.index();
        let chunks = index.dirty.drain().map(|(_, chunk)| chunk).collect();
        let dir = std::mem::take(&mut index.names_changed).then(|| self.dir.clone());
        Unsynced { chunks, dir, present: index.present.iter().copied().collect() }
    }

    /// Gives every file back; the store is not used afterwards.
    ///
    /// # Errors
    /// If a file can not be moved.
    pub fn destroy(&self) -> io::Result<()> {
        let removed = self.present().into_iter().try_for_each(|id| self.remove(id));
        self.disk.forget_copyset(self.copyset);
        removed
    }

    /// An open chunk; `None` if it has no file.
    ///
    /// # Errors
    /// `WouldBlock` with `Inline` if it is not open yet; `Io`.
    pub fn get(&self, id: ChunkId, patience: Patience) -> Result<Option<Arc<Chunk>>, StoreError> {
        if let Some(chunk) = self.disk.find(self.key(id)) {
            return Ok(Some(chunk));
        }
        if !self.has(id) {
            return Ok(None);
        }
        if patience == Patience::Inline {
            return Err(StoreError::WouldBlock);
        }
        let _names = self.names.lock().expect("no panic under the lock");
        self.open_named(id)
    }

    /// The disk that the chunks lie on.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    fn get_or_create(&self, id: ChunkId, patience: Patience) -> Result<Arc<Chunk>, StoreError> {
        if let Some(chunk) = self.get(id, patience)? {
            return Ok(chunk);
        }
        let _names = self.names.lock().expect("no panic under the lock");
        if let Some(chunk) = self.open_named(id)? {
            return Ok(chunk);
        }
        let file = self.disk.pool.take(&self.path(id), patience == Patience::Blocking)?;
        let chunk = Arc::new(Chunk::fresh(id, file));
        self.disk.insert(self.key(id), &chunk);
        let mut index = self.index();
        index.present.insert(id);
        index.names_changed = true;
        Ok(chunk)
    }

    /// With `names` held.
    fn open_named(&self, id: ChunkId) -> Result<Option<Arc<Chunk>>, StoreError> {
        if let Some(chunk) = self.disk.find(self.key(id)) {
            return Ok(Some(chunk));
        }
        let (present, recorded) = {
            let index = self.index();
            (index.present.contains(&id), index.recorded.contains(&id))
        };
        if !present {
            return Ok(None);
        }
        let file = OpenOptions::new().read(true).write(true).open(self.path(id))?;
        let chunk = Arc::new(Chunk::open(id, file, recorded)?);
        self.disk.insert(self.key(id), &chunk);
        Ok(Some(chunk))
    }

    fn changed(&self, chunk: &Arc<Chunk>, damaged: &[Damaged]) {
        for Damaged(block) in damaged {
            self.disk.damaged.inc();
            let (chunk, copyset) = (chunk.id(), self.copyset);
            tracing::error!(%chunk, block, %copyset, "part of a damaged block was written, the block stays damaged");
        }
        self.index().dirty.entry(chunk.id()).or_insert_with(|| Arc::clone(chunk));
    }

    fn key(&self, id: ChunkId) -> (CopysetId, ChunkId) {
        (self.copyset, id)
    }

    fn path(&self, id: ChunkId) -> PathBuf {
        self.dir.join(file_name(id))
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().expect("no panic under the lock")
    }
}

/// The name of a chunk's file.
pub fn file_name(id: ChunkId) -> String {
    format!("{:016x}-{:08x}", id.volume.get(), id.index.get())
}

/// The chunks that have a file in `dir`.
///
/// # Errors
/// If the directory can not be read.
pub fn list(dir: &Path) -> io::Result<BTreeSet<ChunkId>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let parsed = name.to_str().and_then(|name| {
            let (volume, index) = name.split_once('-')?;
            let volume = VolumeId::new(u64::from_str_radix(volume, 16).ok()?);
            Some(ChunkId { volume, index: ChunkIndex::new(u32::from_str_radix(index, 16).ok()?) })
        });
        match parsed {
            Some(id) => drop(found.insert(id)),
            None => tracing::warn!(path = %dir.join(name).display(), "not a chunk file, left alone"),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
