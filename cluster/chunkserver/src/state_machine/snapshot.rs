//! A replica's chunks on the way to another server: manifest, items, and the place where they are gathered.
//!
//! Called by raft through the state machine. Must not know: the network, throttling.
//!
//! The manifest names every chunk with the digest of its content. The receiver asks only for chunks that it has not,
//! or not in that content, so an interrupted copy goes on where it stopped. What arrives is gathered in `incoming/`
//! beside the living chunks and takes their place at once when all of it is durable: entries of the old log that are
//! applied meanwhile never touch new content. Chunks may be newer than the checkpoint (the log is applied again on
//! top); the fence must not be, so it comes with the position it belongs to and is compared with raft's.
//!
//! Manifest, little-endian: version u32 | copyset u32 | has position u8 | term u64 | node u64 | index u64 | fence |
//! chunk count u32, (volume u64, index u32, generation u64, digest u64, pieces u32)* | crc32c u32.
//! Item n is piece n % 32 of chunk n / 32 of the manifest: block count u32 | (block u32, checksum u32)* | bytes of the
//! blocks. Blocks that are not allocated are not sent.

use super::adoption::{Adoption, sync_names};
use super::meta::{Meta, put_chunk, put_count, put_fence, take_chunk, take_count, take_fence};
use super::relied::Reliance;
use super::{Shared, blocking};
use crate::fence::FenceTable;
use crate::store::checksum::crc32c;
use crate::store::chunk_store::{file_name, list};
use crate::store::{Chunk, Patience, StoreError};
use bytes::{Buf, BufMut, Bytes};
use futures_util::future::BoxFuture;
use spline_raft::{Checkpoint, LogPosition, SnapshotSink, SnapshotSource};
use spline_types::limits::{CHUNK_BLOCK_BYTES, CHUNK_BLOCKS};
use spline_types::{ChunkId, CopysetId};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Versions of manifest and items, newest first.
pub const VERSIONS: [u32; 1] = [
    1, // pieces of 128 blocks
];
/// Pieces of a chunk.
pub(super) const PIECES: u32 = 32;
/// Blocks of a piece: 512 KiB, so that an item with its checksums stays below 1 MiB.
pub(super) const PIECE_BLOCKS: u32 = CHUNK_BLOCKS / PIECES;
/// Where a copyset gathers what arrives.
pub const INCOMING: &str = "incoming";
/// Bytes of a chunk's entry in a manifest.
const ENTRY_BYTES: usize = 32;

/// A block on its way: number, checksum, bytes.
type BlockRef<'a> = (u32, u32, &'a [u8]);

/// One chunk of a manifest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    id: ChunkId,
    generation: u64,
    digest: u64,
    /// One bit per piece that has anything allocated.
    pieces: u32,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Manifest {
    position: Option<LogPosition>,
    fence: FenceTable,
    chunks: Vec<Entry>,
}

impl Manifest {
    fn encode(&self, copyset: CopysetId) -> Bytes {
        let mut out = Vec::new();
        out.put_u32_le(VERSIONS[0]);
        out.put_u32_le(copyset.get());
        out.put_u8(u8::from(self.position.is_some()));
        let position = self.position.unwrap_or_default();
        out.put_u64_le(position.term);
        out.put_u64_le(position.node);
        out.put_u64_le(position.index);
        put_fence(&mut out, &self.fence);
        put_count(&mut out, self.chunks.len());
        for entry in &self.chunks {
            put_chunk(&mut out, entry.id);
            out.put_u64_le(entry.generation);
            out.put_u64_le(entry.digest);
            out.put_u32_le(entry.pieces);
        }
        let crc = crc32c(&out);
        out.put_u32_le(crc);
        out.into()
    }

    fn decode(bytes: &[u8], copyset: CopysetId) -> Result<Self, String> {
        let (mut body, crc) = bytes.split_last_chunk::<4>().ok_or("too short")?;
        let short = |_| "too short".to_owned();
        let version = body.try_get_u32_le().map_err(short)?;
        if !VERSIONS.contains(&version) {
            return Err(format!(
                "unknown version, upgrade this chunkserver: version={version} known={VERSIONS:?}"
            ));
        }
        if crc32c(&bytes[..bytes.len() - 4]) != u32::from_le_bytes(*crc) {
            return Err("checksum does not match".into());
        }
        let found = body.try_get_u32_le().map_err(short)?;
        if found != copyset.get() {
            return Err(format!("of another copyset: found={found} expected={copyset}"));
        }
        let has = body.try_get_u8().map_err(short)?;
        let term = body.try_get_u64_le().map_err(short)?;
        let node = body.try_get_u64_le().map_err(short)?;
        let index = body.try_get_u64_le().map_err(short)?;
        let fence = take_fence(&mut body)?;
        let chunks = (0..take_count(&mut body, ENTRY_BYTES)?)
            .map(|_| {
                let id = take_chunk(&mut body)?;
                let (generation, digest) = (body.get_u64_le(), body.get_u64_le());
                Ok(Entry { id, generation, digest, pieces: body.get_u32_le() })
            })
            .collect::<Result<_, String>>()?;
        Ok(Self { position: (has == 1).then_some(LogPosition { term, node, index }), fence, chunks })
    }
}

fn encode_item(blocks: &[(u32, u32, Vec<u8>)]) -> Bytes {
    let mut out = Vec::with_capacity(4 + blocks.len() * (8 + CHUNK_BLOCK_BYTES as usize));
    put_count(&mut out, blocks.len());
    for (block, sum, _) in blocks {
        out.put_u32_le(*block);
        out.put_u32_le(*sum);
    }
    for (_, _, bytes) in blocks {
        out.put_slice(bytes);
    }
    out.into()
}

fn decode_item(mut item: &[u8], piece: u32) -> Result<Vec<BlockRef<'_>>, String> {
    let count = take_count(&mut item, 8 + CHUNK_BLOCK_BYTES as usize)?;
    let (mut heads, data) = item.split_at(count * 8);
    if data.len() != count * CHUNK_BLOCK_BYTES as usize {
        return Err(format!("item has the wrong length: blocks={count} bytes={}", data.len()));
    }
    let blocks = piece * PIECE_BLOCKS..(piece + 1) * PIECE_BLOCKS;
    data.chunks_exact(CHUNK_BLOCK_BYTES as usize)
        .map(|bytes| {
            let (block, sum) = (heads.get_u32_le(), heads.get_u32_le());
            blocks
                .contains(&block)
                .then_some((block, sum, bytes))
                .ok_or_else(|| format!("block is not of this piece: block={block} piece={piece}"))
        })
        .collect()
}

/// The sending side.
pub struct Source {
    shared: Arc<Shared>,
    manifest: Manifest,
}

impl Source {
    /// A reader of the chunks as they are, under the fence of the last checkpoint, and that checkpoint. Opens every
    /// chunk.
    ///
    /// # Errors
    /// If a chunk can not be opened.
    pub fn new(shared: Arc<Shared>) -> io::Result<(Checkpoint, Self)> {
        let durable = shared.durable();
        let checkpoint = Checkpoint { position: durable.position, membership: durable.membership };
        let mut chunks = Vec::new();
        for id in shared.store.present() {
            let Some(chunk) = shared.store.get(id, Patience::Blocking).map_err(to_io)? else { continue };
            let (generation, digest, pieces) = chunk.summary(PIECE_BLOCKS);
            if pieces != 0 {
                chunks.push(Entry { id, generation, digest, pieces });
            }
        }
        let manifest = Manifest { position: durable.position, fence: durable.fence, chunks };
        Ok((checkpoint, Self { shared, manifest }))
    }
}

impl SnapshotSource for Source {
    fn manifest(&self) -> Bytes {
        self.manifest.encode(self.shared.copyset)
    }

    fn read(&mut self, item: u32) -> BoxFuture<'_, io::Result<Bytes>> {
        let entry = self.manifest.chunks.get((item / PIECES) as usize).copied();
        let shared = Arc::clone(&self.shared);
        let blocks = item % PIECES * PIECE_BLOCKS..(item % PIECES + 1) * PIECE_BLOCKS;
        Box::pin(async move {
            let entry = entry.ok_or_else(|| invalid(format!("no such snapshot item: item={item}")))?;
            blocking(move || {
                // A chunk that was discarded meanwhile is sent as empty: the log will discard it there too.
                let chunk = shared.store.get(entry.id, Patience::Blocking).map_err(to_io)?;
                let blocks = chunk.map_or(Ok(Vec::new()), |chunk| chunk.export(blocks)).map_err(to_io)?;
                Ok(encode_item(&blocks))
            })
            .await
        })
    }
}

/// A snapshot that was received to the end and is durable in `incoming/`.
pub struct Staged {
    /// What it covers.
    pub position: Option<LogPosition>,
    /// The fence after it.
    pub fence: FenceTable,
    /// The chunks that the replica had already.
    relies: Reliance,
    /// Every chunk that it has.
    chunks: BTreeSet<ChunkId>,
    /// Those of them that lie in `incoming/` because they were sent.
    incoming: BTreeSet<ChunkId>,
}

impl Staged {
    /// Makes sure that all of it is here and durable; returns what is to be done to put it in place of the copyset's
    /// chunks. Moves nothing. Blocks.
    ///
    /// # Errors
    /// If a chunk is missing or not what it must be, if another transfer has begun since, or if the disk fails.
    pub fn prepare(&self, shared: &Shared, checkpoint: Checkpoint) -> io::Result<Adoption> {
        let found = self.relies.end()?;
        let incoming: BTreeSet<_> = self.incoming.iter().copied().chain(found.kept).collect();
        let mut chunks = incoming.clone();
        for (id, digest) in found.in_place {
            let chunk = shared.store.get(id, Patience::Blocking).map_err(to_io)?;
            let equal = chunk.filter(|chunk| chunk.summary(PIECE_BLOCKS).1 == digest);
            let chunk = equal.ok_or_else(|| {
                io::Error::other(format!("chunk changed although a snapshot relies on it: chunk={id}"))
            })?;
            // A checkpoint under way may have taken it off the list of dirty ones and not have synced it yet.
            chunk.persist()?;
            chunk.sync()?;
            chunks.insert(id);
        }
        if chunks != self.chunks {
            let (found, expected) = (chunks.len(), self.chunks.len());
            let text = format!("snapshot is not complete: chunks={found} expected={expected}");
            return Err(io::Error::other(text));
        }
        sync_names(&shared.dir)?;
        let Checkpoint { position, membership } = checkpoint;
        let (fence, chunks) = (self.fence.clone(), chunks.into_iter().collect());
        Ok(Adoption { meta: Meta { position, membership, fence, chunks }, incoming })
    }
}

/// The receiving side.
pub struct Sink {
    shared: Arc<Shared>,
    staged: Arc<Mutex<Option<Staged>>>,
    work: Arc<Mutex<Gathering>>,
}

#[derive(Default)]
struct Gathering {
    manifest: Manifest,
    relies: Option<Reliance>,
    complete: BTreeSet<ChunkId>,
    /// Chunks under way, with the pieces that are missing.
    partial: BTreeMap<ChunkId, (Arc<Chunk>, u32)>,
}

impl Sink {
    /// A receiver that leaves its result in `staged`.
    pub fn new(shared: Arc<Shared>, staged: Arc<Mutex<Option<Staged>>>) -> Self {
        Self { shared, staged, work: Arc::default() }
    }
}

impl SnapshotSink for Sink {
    fn begin(&mut self, manifest: Bytes) -> BoxFuture<'_, io::Result<Vec<u32>>> {
        let (shared, work) = (Arc::clone(&self.shared), Arc::clone(&self.work));
        Box::pin(blocking(move || {
            let manifest = Manifest::decode(&manifest, shared.copyset)
                .map_err(|why| invalid(format!("snapshot manifest: {why}")))?;
            let (gathering, wanted) = begin(&shared, manifest)?;
            *work.lock().expect("no panic under the lock") = gathering;
            Ok(wanted)
        }))
    }

    fn write(&mut self, item: u32, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        let work = Arc::clone(&self.work);
        Box::pin(blocking(move || work.lock().expect("no panic under the lock").take_item(item, &data)))
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>> {
        Box::pin(blocking(move || {
            let gathering = std::mem::take(&mut *self.work.lock().expect("no panic under the lock"));
            if let Some(id) = gathering.partial.keys().next() {
                return Err(invalid(format!("snapshot ended before all of it was received: chunk={id}")));
            }
            File::open(self.shared.dir.join(INCOMING))?.sync_all()?;
            let Gathering { manifest, relies, complete: incoming, .. } = gathering;
            let relies = relies.ok_or_else(|| invalid("snapshot ended before it began".to_owned()))?;
            let Manifest { position, fence, chunks } = manifest;
            let chunks = chunks.into_iter().map(|entry| entry.id).collect();
            let staged = Staged { position, fence, relies, chunks, incoming };
            *self.staged.lock().expect("no panic under the lock") = Some(staged);
            Ok(())
        }))
    }
}

/// Compares the manifest with what is here; returns the items that are missing.
fn begin(shared: &Arc<Shared>, manifest: Manifest) -> io::Result<(Gathering, Vec<u32>)> {
    let dir = shared.dir.join(INCOMING);
    fs::create_dir_all(&dir)?;
    let mut left = list(&dir)?;
    let relies = Reliance::begin(shared, manifest.position);
    let mut gathering = Gathering::default();
    let mut wanted = Vec::new();
    for (number, entry) in (0u32..).zip(&manifest.chunks) {
        if relies.rely_on(entry.id, entry.digest).map_err(to_io)? {
            continue;
        }
        let digest = |chunk: &Chunk| chunk.summary(PIECE_BLOCKS).1;
        let path = dir.join(file_name(entry.id));
        if left.contains(&entry.id) && digest(&reopen(entry.id, &path)?) == entry.digest {
            left.remove(&entry.id);
            gathering.complete.insert(entry.id);
            continue;
        }
        if left.remove(&entry.id) {
            shared.store.disk().pool.give_back(&path)?;
        }
        let file = new_file(shared, &path)?;
        gathering.partial.insert(entry.id, (Arc::new(Chunk::fresh(entry.id, file)), entry.pieces));
        let pieces = (0..PIECES).filter(|piece| (entry.pieces >> piece) & 1 == 1);
        wanted.extend(pieces.map(|piece| number * PIECES + piece));
    }
    for id in left {
        shared.store.disk().pool.give_back(&dir.join(file_name(id)))?;
    }
    gathering.manifest = manifest;
    gathering.relies = Some(relies);
    Ok((gathering, wanted))
}

impl Gathering {
    fn take_item(&mut self, item: u32, data: &[u8]) -> io::Result<()> {
        let piece = item % PIECES;
        let entry = self.manifest.chunks.get((item / PIECES) as usize);
        let id = entry.ok_or_else(|| invalid(format!("no such snapshot item: item={item}")))?.id;
        // An item that comes twice is harmless.
        let Some((chunk, missing)) = self.partial.get_mut(&id) else { return Ok(()) };
        let blocks =
            decode_item(data, piece).map_err(|why| invalid(format!("snapshot item: {why} item={item}")))?;
        chunk.import(&blocks).map_err(to_io)?;
        *missing &= !(1 << piece);
        if *missing == 0 {
            // Data first: a header that is found after a crash vouches for it.
            chunk.sync()?;
            chunk.persist()?;
            chunk.sync()?;
            self.partial.remove(&id);
            self.complete.insert(id);
        }
        Ok(())
    }
}

fn reopen(id: ChunkId, path: &Path) -> io::Result<Chunk> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    Chunk::open(id, file, false).map_err(to_io)
}

fn new_file(shared: &Shared, path: &Path) -> io::Result<File> {
    shared.store.disk().pool.take(path, true).map_err(to_io)
}

fn to_io(error: StoreError) -> io::Error {
    match error {
        StoreError::Io(error) => error,
        StoreError::NoSpace => io::Error::new(io::ErrorKind::StorageFull, error),
        error => io::Error::other(error),
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
