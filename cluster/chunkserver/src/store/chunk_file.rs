//! One open chunk file with its bitmap and checksum table in memory.
//!
//! Called by [`super::chunk_store`]. Must not know: which copyset it belongs to, what a log is.
//!
//! Writes go to the page cache; bitmap and table change in memory and reach the file in [`Chunk::persist`], at a
//! checkpoint. After a crash the file is therefore a mixture: any block written since the last checkpoint may be old,
//! new or torn, with an old or a new checksum. The log from that checkpoint on is applied again and ends in the same
//! bytes whatever the mixture was, because each byte's last writer is applied again; a byte without one is as the
//! checkpoint left it. Only the merge of a part into a block (read-modify-write) looks at old bytes, and there a
//! checksum that does not match is no news while [`Merge::Replaying`]; afterwards it means damage: the block is then
//! marked [`checksum::DAMAGED`], for good until it is written whole, so that no reader is ever given its other bytes.
//!
//! Reads take no lock while they read: they note the checksums, read, compare. A write that came between shows as a
//! mismatch, and the read is done again with writers held off.
//! Invariants: `replicas_identical`.

use super::checksum::{self, ZERO_BLOCK};
use super::layout::{Bitmap, DATA_AT, Header, SLOT_BYTES, Slot, TABLE_AT, TABLE_BYTES};
use super::{Patience, StoreError};
use rustix::buffer::spare_capacity;
use rustix::io::{Errno, ReadWriteFlags, pread, preadv2, pwritev};
use spline_types::limits::{CHUNK_BLOCK_BYTES, CHUNK_BLOCKS};
use spline_types::{ChunkId, ChunkRange, Extent};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

const BLOCK: usize = CHUNK_BLOCK_BYTES as usize;
/// Most bytes of one system call's write. The kernel keeps what is written together as one folio of its page cache, and
/// ext4 looks at every block of a folio to write one of them: after writes of 1 MiB a block costs several times as much.
const PIECE_BYTES: usize = 128 << 10;

/// What a checksum mismatch means while a part is merged into a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Merge {
    /// Nothing yet: the log from the last checkpoint on is being applied again.
    Replaying,
    /// Damage.
    Verified,
}

/// What the file holds, as last written by this process.
struct State {
    header: Header,
    table: Box<[u32]>,
    /// The slot that holds the newest header; the next one goes to the other.
    slot: u64,
    /// The file went back to the pool: it may hold another chunk by now.
    removed: bool,
}

/// An open chunk file.
pub struct Chunk {
    id: ChunkId,
    file: File,
    state: RwLock<State>,
    /// When it was last used, in the cache's ticks.
    pub used: AtomicU64,
}

/// A block that was merged although its old content is damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Damaged(pub u32);

impl Chunk {
    /// A chunk on a file fresh from the pool: all zeros, no header yet.
    pub fn fresh(id: ChunkId, file: File) -> Self {
        let header = Header { id, generation: 0, bitmap: Bitmap::default() };
        Self::of(id, file, header, vec![0; CHUNK_BLOCKS as usize].into(), 1)
    }

    /// Opens a chunk file that was in use before. `recorded` says that a checkpoint names it, so that a header was
    /// once written whole.
    ///
    /// # Errors
    /// `Io`. A header that is lost is no error: every block then counts as allocated, so that blocks which were
    /// written still match their checksums and all others are refused as damaged.
    pub fn open(id: ChunkId, file: File, recorded: bool) -> Result<Self, StoreError> {
        let mut head = vec![0; DATA_AT as usize];
        file.read_exact_at(&mut head, 0)?;
        let (slots, table) = head.split_at(TABLE_AT as usize);
        let table = table.chunks_exact(4).map(|sum| u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]));
        let mut best: Option<(u64, Header)> = None;
        let mut bad = None;
        for (number, slot) in (0u64..).zip(slots.chunks_exact(SLOT_BYTES as usize)) {
            match Header::decode(slot) {
                Slot::Valid(header) if header.id != id => {
                    bad = Some(format!("header of chunk={}", header.id))
                }
                Slot::Valid(header)
                    if best.as_ref().is_none_or(|(_, b)| b.generation < header.generation) =>
                {
                    best = Some((number, header));
                }
                Slot::Valid(_) | Slot::Blank => {}
                Slot::Bad(why) => bad = Some(why),
            }
        }
        match best {
            Some((slot, header)) => Ok(Self::of(id, file, header, table.collect(), slot)),
            // Two blank slots are a file fresh from the pool, also where a checkpoint names the chunk: it may have
            // been discarded and written again since. One bad slot alone is a first header that was torn.
            None => match bad {
                Some(why) if recorded => {
                    tracing::error!(chunk = %id, why, "chunk file has no sound header, blocks without data are refused");
                    let header = Header { id, generation: 0, bitmap: Bitmap::full() };
                    Ok(Self::of(id, file, header, table.collect(), 1))
                }
                _ => Ok(Self::fresh(id, file)),
            },
        }
    }

    fn of(id: ChunkId, file: File, header: Header, table: Box<[u32]>, slot: u64) -> Self {
        debug_assert_eq!(table.len() * 4, TABLE_BYTES);
        let state = RwLock::new(State { header, table, slot, removed: false });
        Self { id, file, state, used: AtomicU64::new(0) }
    }

    /// Which chunk.
    pub fn id(&self) -> ChunkId {
        self.id
    }

    /// Reads a range. Blocks that are not allocated read as zeros.
    ///
    /// # Errors
    /// `Corrupt` if a block does not match its checksum or the disk can not read it; `WouldBlock` with
    /// [`Patience::Inline`] if the disk is needed.
    pub fn read(&self, range: ChunkRange, patience: Patience) -> Result<Vec<u8>, StoreError> {
        let blocks = blocks_of(range);
        // Without the lock: the common case is that nobody writes these blocks meanwhile.
        let (bitmap, sums) = {
            let state = self.shared();
            if state.removed {
                return Ok(vec![0; range.length() as usize]);
            }
            (state.header.bitmap.runs(blocks.clone()).collect::<Vec<_>>(), state.table_of(&blocks).to_vec())
        };
        if let Ok(data) = self.read_runs(&bitmap, &blocks, &sums, patience)? {
            return Ok(cut(data, range, &blocks));
        }
        if patience == Patience::Inline {
            return Err(StoreError::WouldBlock);
        }
        let state = self.shared();
        if state.removed {
            return Ok(vec![0; range.length() as usize]);
        }
        let runs: Vec<_> = state.header.bitmap.runs(blocks.clone()).collect();
        match self.read_runs(&runs, &blocks, state.table_of(&blocks), patience)? {
            Ok(data) => Ok(cut(data, range, &blocks)),
            Err(block) => Err(StoreError::Corrupt { chunk: self.id, block }),
        }
    }

    /// Reads whole blocks and compares checksums; the inner error is the first block that does not match.
    fn read_runs(
        &self,
        runs: &[(u32, u32, bool)],
        blocks: &Range<u32>,
        sums: &[u32],
        patience: Patience,
    ) -> Result<Result<Vec<u8>, u32>, StoreError> {
        // In one piece, as most large reads are, it can be read without filling the memory with zeros first.
        let whole = match (runs, patience) {
            ([(_, _, true)], Patience::Blocking) => self.pread_fresh(blocks),
            _ => None,
        };
        let is_read = whole.is_some();
        let mut data = whole.unwrap_or_else(|| vec![0; blocks.len() * BLOCK]);
        for &(from, to, allocated) in runs {
            if !allocated {
                continue;
            }
            let part =
                &mut data[(from - blocks.start) as usize * BLOCK..(to - blocks.start) as usize * BLOCK];
            // The disk can not give these bytes: the same to the caller as bytes that are wrong.
            if !is_read
                && let Some(block) =
                    first_unreadable(from, part, |into, block| self.pread(into, block, patience))?
            {
                tracing::error!(chunk = %self.id, block, "the disk can not read a block");
                return Ok(Err(block));
            }
            for (block, bytes) in (from..to).zip(part.chunks_exact(BLOCK)) {
                if checksum::of_block(self.id, block, bytes) != sums[(block - blocks.start) as usize] {
                    return Ok(Err(block));
                }
            }
        }
        Ok(Ok(data))
    }

    /// Writes `payload` at `range`, which is as long. Returns the blocks that it had to merge into damaged ones.
    ///
    /// # Errors
    /// `WouldBlock` before anything is changed; `NoSpace` and `Io` leave the range undefined until it is applied again.
    pub fn write(
        &self,
        range: ChunkRange,
        payload: &[u8],
        merge: Merge,
        patience: Patience,
    ) -> Result<Vec<Damaged>, StoreError> {
        debug_assert_eq!(payload.len(), range.length() as usize);
        if range.length() == 0 {
            return Ok(Vec::new());
        }
        let mut state = self.exclusive();
        let blocks = blocks_of(range);
        let (first, last) = (blocks.start, blocks.end - 1);
        let head_skip = range.offset() as usize % BLOCK;
        let tail_bytes = range.end() as usize % BLOCK;
        let mut damaged = Vec::new();
        // At most the first and the last block are written in part; what lies between is written as it came.
        let mut head = None;
        let mut tail = None;
        let mut middle = payload;
        if head_skip != 0 || (first == last && tail_bytes != 0) {
            let length = middle.len().min(BLOCK - head_skip);
            let (part, rest) = middle.split_at(length);
            head = Some(self.merged(&state, first, head_skip, part, merge, patience)?);
            middle = rest;
        }
        if tail_bytes != 0 && !middle.is_empty() {
            let (rest, part) = middle.split_at(middle.len() - tail_bytes);
            tail = Some(self.merged(&state, last, 0, part, merge, patience)?);
            middle = rest;
        }
        let slices = [
            IoSlice::new(head.as_ref().map_or(&[], |(block, _)| block.as_slice())),
            IoSlice::new(middle),
            IoSlice::new(tail.as_ref().map_or(&[], |(block, _)| block.as_slice())),
        ];
        self.pwrite_all(slices, DATA_AT + u64::from(first) * BLOCK as u64)?;

        let from = first + u32::from(head.is_some());
        for (block, bytes) in (from..).zip(middle.chunks_exact(BLOCK)) {
            state.put(block, checksum::of_block(self.id, block, bytes));
        }
        for (block, merged) in [(first, head), (last, tail)] {
            let Some((bytes, sound)) = merged else { continue };
            if sound {
                state.put(block, checksum::of_block(self.id, block, &bytes));
            } else {
                state.put(block, checksum::DAMAGED);
                damaged.push(Damaged(block));
            }
        }
        Ok(damaged)
    }

    /// Makes a range zeros: whole blocks count as never written, parts of blocks are overwritten. Returns damaged blocks
    /// as [`Chunk::write`] does.
    ///
    /// The file keeps its space: a later write of the range is logged before it is applied, and must not find then that
    /// others took the space. For this reason nothing is asked of the filesystem, not even to zero the range: some do
    /// that by a hole that they fill again. What is read is governed by the bitmap.
    ///
    /// # Errors
    /// As [`Chunk::write`].
    pub fn discard(
        &self,
        range: ChunkRange,
        merge: Merge,
        patience: Patience,
    ) -> Result<Vec<Damaged>, StoreError> {
        let whole = range.offset().div_ceil(CHUNK_BLOCK_BYTES)..range.end() / CHUNK_BLOCK_BYTES;
        let edges = if whole.start >= whole.end {
            [split_at_block(range), None]
        } else {
            let (from, to) = (whole.start * CHUNK_BLOCK_BYTES, whole.end * CHUNK_BLOCK_BYTES);
            let head = ChunkRange::new(range.offset(), from - range.offset());
            [head.map(|part| (part, None)), ChunkRange::new(to, range.end() - to).map(|part| (part, None))]
        };
        let mut damaged = Vec::new();
        for part in edges.into_iter().flatten().flat_map(|(a, b)| [Some(a), b]).flatten() {
            if part.length() > 0 && self.shared().header.bitmap.get(part.offset() / CHUNK_BLOCK_BYTES) {
                damaged.extend(self.write(part, &ZERO_BLOCK[..part.length() as usize], merge, patience)?);
            }
        }
        let mut state = self.exclusive();
        let runs: Vec<_> = state.header.bitmap.runs(whole.start..whole.end.max(whole.start)).collect();
        for (from, to, _) in runs.into_iter().filter(|(_, _, allocated)| *allocated) {
            for block in from..to {
                state.header.bitmap.set(block, false);
                state.table[block as usize] = 0;
            }
        }
        Ok(damaged)
    }

    /// The allocation of a range, in extents that cover it exactly.
    pub fn extents(&self, range: ChunkRange) -> Vec<Extent> {
        let mut list = Vec::new();
        let state = self.shared();
        for (from, to, allocated) in state.header.bitmap.runs(blocks_of(range)) {
            let start = (from * CHUNK_BLOCK_BYTES).max(range.offset());
            let end = (to * CHUNK_BLOCK_BYTES).min(range.end());
            let length = u64::from(end - start);
            Extent::push_merged(&mut list, Extent { length, hole: !allocated, zero: !allocated });
        }
        list
    }

    /// Whether no block is allocated.
    pub fn is_empty(&self) -> bool {
        self.shared().header.bitmap.is_empty()
    }

    /// The file goes back to the pool: nothing may be written to it any more. `give_back` runs while writers and
    /// checkpoints are held off.
    pub fn remove<T>(&self, give_back: impl FnOnce() -> T) -> T {
        let mut state = self.exclusive();
        state.removed = true;
        state.header.bitmap = Bitmap::default();
        give_back()
    }

    /// Writes table and header, the header to the older slot. Not yet durable: see [`Chunk::sync`]. Returns the
    /// generation written, or `None` if the file went back to the pool.
    ///
    /// # Errors
    /// If writing fails.
    pub fn persist(&self) -> io::Result<Option<u64>> {
        let mut state = self.exclusive();
        if state.removed {
            return Ok(None);
        }
        let table: Vec<u8> = state.table.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        self.file.write_all_at(&table, TABLE_AT)?;
        let slot = 1 - state.slot;
        state.header.generation += 1;
        self.file.write_all_at(&state.header.encode(), slot * SLOT_BYTES)?;
        state.slot = slot;
        Ok(Some(state.header.generation))
    }

    /// Makes durable what was written so far.
    ///
    /// # Errors
    /// If the disk fails; what was written is then lost, and trying again would not show it.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Generation, digest of the content, and which pieces of `piece` blocks have anything allocated.
    pub fn summary(&self, piece: u32) -> (u64, u64, u32) {
        let state = self.shared();
        let mut pieces = 0;
        for number in 0..CHUNK_BLOCKS / piece {
            let blocks = number * piece..(number + 1) * piece;
            if state.header.bitmap.runs(blocks).any(|(_, _, allocated)| allocated) {
                pieces |= 1 << number;
            }
        }
        (state.header.generation, checksum::digest(&state.header.bitmap, &state.table), pieces)
    }

    /// The allocated blocks of `blocks` with their checksums, exactly as they lie here: a block that is damaged is
    /// passed on with the checksum that tells so.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn export(&self, blocks: Range<u32>) -> Result<Vec<(u32, u32, Vec<u8>)>, StoreError> {
        let state = self.shared();
        let mut out = Vec::new();
        if state.removed {
            return Ok(out);
        }
        for (from, to, allocated) in state.header.bitmap.runs(blocks) {
            for block in (from..to).filter(|_| allocated) {
                let mut bytes = vec![0; BLOCK];
                match self.pread(&mut bytes, block, Patience::Blocking) {
                    Ok(()) => out.push((block, state.table[block as usize], bytes)),
                    Err(StoreError::Io(error)) => {
                        tracing::error!(chunk = %self.id, block, %error, "the disk can not read a block");
                        out.push((block, checksum::DAMAGED, ZERO_BLOCK.to_vec()));
                    }
                    Err(other) => return Err(other),
                }
            }
        }
        Ok(out)
    }

    /// Takes over blocks that [`Chunk::export`] gave on another replica.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn import(&self, blocks: &[(u32, u32, &[u8])]) -> Result<(), StoreError> {
        let mut state = self.exclusive();
        for &(block, sum, bytes) in blocks {
            self.file.write_all_at(bytes, DATA_AT + u64::from(block) * BLOCK as u64)?;
            state.put(block, sum);
        }
        Ok(())
    }

    /// Writes a damaged block again, durably, if `bytes` are what its checksum says. Returns whether they are. Blocks.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn mend(&self, block: u32, bytes: &[u8]) -> Result<bool, StoreError> {
        let state = self.exclusive();
        let fits = !state.removed
            && bytes.len() == BLOCK
            && state.header.bitmap.get(block)
            && checksum::of_block(self.id, block, bytes) == state.table[block as usize];
        if fits {
            self.file.write_all_at(bytes, DATA_AT + u64::from(block) * BLOCK as u64)?;
        }
        drop(state);
        if fits {
            self.sync()?;
        }
        Ok(fits)
    }

    /// A block with `part` laid over it at `skip`, and whether its other bytes are sound.
    fn merged(
        &self,
        state: &State,
        block: u32,
        skip: usize,
        part: &[u8],
        merge: Merge,
        patience: Patience,
    ) -> Result<(Vec<u8>, bool), StoreError> {
        let mut bytes = ZERO_BLOCK.to_vec();
        let mut sound = true;
        if state.header.bitmap.get(block) {
            let lost = first_unreadable(block, &mut bytes, |into, block| self.pread(into, block, patience))?;
            let kept = state.table[block as usize];
            if lost.is_some() {
                tracing::error!(chunk = %self.id, block, "the disk can not read a block that is written in part");
                bytes.fill(0);
                sound = false;
            } else if checksum::of_block(self.id, block, &bytes) != kept {
                sound = merge == Merge::Replaying && kept != checksum::DAMAGED;
            }
        }
        bytes[skip..skip + part.len()].copy_from_slice(part);
        Ok((bytes, sound))
    }

    /// Whole blocks into new memory; `None` if the disk does not give them all, and somebody must look closer.
    fn pread_fresh(&self, blocks: &Range<u32>) -> Option<Vec<u8>> {
        let bytes = blocks.len() * BLOCK;
        let mut data = Vec::with_capacity(bytes);
        let at = DATA_AT + u64::from(blocks.start) * BLOCK as u64;
        while data.len() < bytes {
            let from = at + data.len() as u64;
            match pread(&self.file, spare_capacity(&mut data), from) {
                Ok(0) => return None,
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return None,
            }
        }
        data.truncate(bytes);
        Some(data)
    }

    fn pread(&self, mut into: &mut [u8], block: u32, patience: Patience) -> Result<(), StoreError> {
        let mut at = DATA_AT + u64::from(block) * BLOCK as u64;
        if patience == Patience::Blocking {
            return Ok(self.file.read_exact_at(into, at)?);
        }
        while !into.is_empty() {
            match preadv2(&self.file, &mut [IoSliceMut::new(into)], at, ReadWriteFlags::NOWAIT) {
                Ok(0) | Err(Errno::AGAIN | Errno::OPNOTSUPP) => return Err(StoreError::WouldBlock),
                Ok(count) => {
                    into = &mut into[count..];
                    at += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(())
    }

    fn pwrite_all(&self, mut slices: [IoSlice<'_>; 3], mut at: u64) -> Result<(), StoreError> {
        let mut left = &mut slices[..];
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            match pwritev(&self.file, &prefix(left, PIECE_BYTES), at) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(count) => {
                    at += count as u64;
                    IoSlice::advance_slices(&mut left, count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::NOSPC | Errno::DQUOT) => return Err(StoreError::NoSpace),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(())
    }

    fn shared(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().expect("no panic under the lock")
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().expect("no panic under the lock")
    }

    /// Notes a use, for the cache.
    pub fn touch(&self, tick: u64) {
        self.used.store(tick, Ordering::Relaxed);
    }
}

impl State {
    fn put(&mut self, block: u32, sum: u32) {
        self.header.bitmap.set(block, true);
        self.table[block as usize] = sum;
    }

    fn table_of(&self, blocks: &Range<u32>) -> &[u32] {
        &self.table[blocks.start as usize..blocks.end as usize]
    }
}

/// The first `limit` bytes of what is to be written.
fn prefix<'a>(slices: &'a [IoSlice<'_>], mut limit: usize) -> [IoSlice<'a>; 3] {
    let mut out = [IoSlice::new(&[]); 3];
    for (into, slice) in out.iter_mut().zip(slices) {
        *into = IoSlice::new(&slice[..slice.len().min(limit)]);
        limit -= into.len();
    }
    out
}

/// Reads whole blocks from `first` on into `part` by `read`. Returns the first block that the disk can not read, for
/// which the run is read again block by block.
///
/// # Errors
/// Those of `read`, except a sector that can not be read.
fn first_unreadable(
    first: u32,
    part: &mut [u8],
    mut read: impl FnMut(&mut [u8], u32) -> Result<(), StoreError>,
) -> Result<Option<u32>, StoreError> {
    let mut is_readable = |into: &mut [u8], block| match read(into, block) {
        Err(StoreError::Io(error)) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(false),
        other => other.map(|()| true),
    };
    if is_readable(part, first)? {
        return Ok(None);
    }
    for (block, bytes) in (first..).zip(part.chunks_exact_mut(BLOCK)) {
        if !is_readable(bytes, block)? {
            return Ok(Some(block));
        }
    }
    Ok(None)
}

/// The blocks that a range touches.
fn blocks_of(range: ChunkRange) -> Range<u32> {
    let start = range.offset() / CHUNK_BLOCK_BYTES;
    start..range.end().div_ceil(CHUNK_BLOCK_BYTES).max(start)
}

/// A range without a whole block, cut where a block begins.
fn split_at_block(range: ChunkRange) -> Option<(ChunkRange, Option<ChunkRange>)> {
    let edge = (range.offset() / CHUNK_BLOCK_BYTES + 1) * CHUNK_BLOCK_BYTES;
    if range.end() <= edge {
        return Some((range, None));
    }
    let head = ChunkRange::new(range.offset(), edge - range.offset())?;
    Some((head, ChunkRange::new(edge, range.end() - edge)))
}

/// The bytes of `range` out of whole `blocks`.
fn cut(mut data: Vec<u8>, range: ChunkRange, blocks: &Range<u32>) -> Vec<u8> {
    let skip = (range.offset() - blocks.start * CHUNK_BLOCK_BYTES) as usize;
    if skip > 0 {
        data.drain(..skip);
    }
    data.truncate(range.length() as usize);
    data
}

#[cfg(test)]
mod tests;
