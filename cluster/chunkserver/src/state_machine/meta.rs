//! The copyset's meta file: what its last durable checkpoint says.
//!
//! Called by the state machine and the snapshot. Must not know: how chunks are stored.
//! Written to a temporary file, synced, renamed over the old one, and the directory synced: a crash leaves the old
//! checkpoint or the new one, whole. The fence in it is exactly that of the position, unlike the chunks, which may be
//! newer: an entry that is applied again must be judged as it was the first time (`replicas_identical`).
//!
//! Bytes, little-endian: magic "SPLCSMET" | version u32 | copyset u32 | has position u8 | term u64 | node u64 |
//! index u64 | membership length u32, bytes | fence | chunk count u32, (volume u64, index u32)* | crc32c u32.
//! Fence: mark count u32, (volume u64, epoch u64, floor u64)* | deleted count u32, (volume u64)*.

use crate::fence::{FenceTable, Mark};
use crate::store::checksum::crc32c;
use bytes::{Buf, BufMut, Bytes};
use spline_raft::LogPosition;
use spline_types::{ChunkId, ChunkIndex, CopysetId, Epoch, Seq, VolumeId};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Versions of the file, newest first.
pub const VERSIONS: [u32; 1] = [
    1, // position, membership, fence, chunks
];
const MAGIC: &[u8; 8] = b"SPLCSMET";
/// Name of the file in the copyset's directory.
pub const FILE_NAME: &str = "meta";

/// What a checkpoint says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Meta {
    /// The last entry that it covers.
    pub position: Option<LogPosition>,
    /// Raft's membership at that entry, opaque.
    pub membership: Bytes,
    /// The fence after that entry.
    pub fence: FenceTable,
    /// The chunks that had a file.
    pub chunks: Vec<ChunkId>,
}

impl Meta {
    /// The bytes of the file.
    pub fn encode(&self, copyset: CopysetId) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_slice(MAGIC);
        out.put_u32_le(VERSIONS[0]);
        out.put_u32_le(copyset.get());
        out.put_u8(u8::from(self.position.is_some()));
        let position = self.position.unwrap_or_default();
        out.put_u64_le(position.term);
        out.put_u64_le(position.node);
        out.put_u64_le(position.index);
        put_count(&mut out, self.membership.len());
        out.put_slice(&self.membership);
        put_fence(&mut out, &self.fence);
        put_count(&mut out, self.chunks.len());
        self.chunks.iter().for_each(|id| put_chunk(&mut out, *id));
        let crc = crc32c(&out);
        out.put_u32_le(crc);
        out
    }

    /// Reads the file's bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8], copyset: CopysetId) -> Result<Self, String> {
        let body = checked(bytes, MAGIC, &VERSIONS)?;
        Self::decode_body(body, copyset).map_err(|error| format!("bad content: {error}"))
    }

    fn decode_body(mut body: &[u8], copyset: CopysetId) -> Result<Self, String> {
        let short = |_| "too short".to_owned();
        let found = body.try_get_u32_le().map_err(short)?;
        if found != copyset.get() {
            return Err(format!("of another copyset: found={found} expected={copyset}"));
        }
        let has = body.try_get_u8().map_err(short)?;
        let term = body.try_get_u64_le().map_err(short)?;
        let node = body.try_get_u64_le().map_err(short)?;
        let index = body.try_get_u64_le().map_err(short)?;
        let position = (has == 1).then_some(LogPosition { term, node, index });
        let length = take_count(&mut body, 1)?;
        let membership = Bytes::copy_from_slice(&body[..length]);
        body.advance(length);
        let fence = take_fence(&mut body)?;
        let count = take_count(&mut body, 12)?;
        let chunks = (0..count).map(|_| take_chunk(&mut body)).collect::<Result<_, _>>()?;
        Ok(Self { position, membership, fence, chunks })
    }

    /// Writes the file durably in `dir`.
    ///
    /// # Errors
    /// If the disk fails or is full.
    pub fn save(&self, dir: &Path, copyset: CopysetId) -> io::Result<()> {
        replace_file(dir, FILE_NAME, &self.encode(copyset))
    }

    /// Reads the file in `dir`.
    ///
    /// # Errors
    /// If it can not be read or understood.
    pub fn load(dir: &Path, copyset: CopysetId) -> io::Result<Self> {
        let path = dir.join(FILE_NAME);
        Self::decode(&fs::read(&path)?, copyset).map_err(|why| {
            io::Error::new(io::ErrorKind::InvalidData, format!("copyset meta: {why} path={}", path.display()))
        })
    }
}

/// What lies between version and checksum of a file that begins with `magic` and a version and ends with its crc32c.
///
/// # Errors
/// What is wrong with the frame.
pub fn checked<'a>(bytes: &'a [u8], magic: &[u8; 8], versions: &[u32]) -> Result<&'a [u8], String> {
    let (sealed, crc) = bytes.split_last_chunk::<4>().ok_or("too short")?;
    let mut body = sealed.strip_prefix(magic).ok_or("no magic")?;
    let version = body.try_get_u32_le().map_err(|_| "too short")?;
    if !versions.contains(&version) {
        return Err(format!(
            "unknown version, upgrade this chunkserver: version={version} known={versions:?}"
        ));
    }
    if crc32c(sealed) != u32::from_le_bytes(*crc) {
        return Err("checksum does not match".into());
    }
    Ok(body)
}

/// Replaces a file so that a crash leaves the old content or the new, whole and durable.
///
/// # Errors
/// If the disk fails or is full.
pub fn replace_file(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.new"));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(name))?;
    File::open(dir)?.sync_all()
}

/// Appends a fence.
pub fn put_fence(out: &mut Vec<u8>, fence: &FenceTable) {
    put_count(out, fence.marks().len());
    for (volume, mark) in fence.marks() {
        out.put_u64_le(volume.get());
        out.put_u64_le(mark.epoch.get());
        out.put_u64_le(mark.floor.get());
    }
    put_count(out, fence.deleted().len());
    for volume in fence.deleted() {
        out.put_u64_le(volume.get());
    }
}

/// Reads a fence.
///
/// # Errors
/// If the bytes are too few.
pub fn take_fence(body: &mut &[u8]) -> Result<FenceTable, String> {
    let marks = (0..take_count(body, 24)?)
        .map(|_| {
            let mark = |body: &mut &[u8]| Mark {
                epoch: Epoch::new(body.get_u64_le()),
                floor: Seq::new(body.get_u64_le()),
            };
            (VolumeId::new(body.get_u64_le()), mark(body))
        })
        .collect();
    let deleted = (0..take_count(body, 8)?).map(|_| VolumeId::new(body.get_u64_le())).collect();
    Ok(FenceTable::restore(marks, deleted))
}

/// Appends the number of what follows.
pub fn put_count(out: &mut Vec<u8>, count: usize) {
    out.put_u32_le(u32::try_from(count).expect("a copyset has fewer than 2^32 of anything"));
}

/// Reads the number of what follows, each of at least `bytes`; so many bytes are there.
///
/// # Errors
/// If they are not.
pub fn take_count(body: &mut &[u8], bytes: usize) -> Result<usize, String> {
    let count = body.try_get_u32_le().map_err(|_| "too short")? as usize;
    if count.saturating_mul(bytes) > body.len() {
        return Err(format!("more entries than bytes: count={count} bytes={}", body.len()));
    }
    Ok(count)
}

/// Appends a chunk id.
pub fn put_chunk(out: &mut Vec<u8>, id: ChunkId) {
    out.put_u64_le(id.volume.get());
    out.put_u32_le(id.index.get());
}

/// Reads a chunk id.
///
/// # Errors
/// If the bytes are too few.
pub fn take_chunk(body: &mut &[u8]) -> Result<ChunkId, String> {
    let volume = body.try_get_u64_le().map_err(|_| "too short")?;
    let index = body.try_get_u32_le().map_err(|_| "too short")?;
    Ok(ChunkId { volume: VolumeId::new(volume), index: ChunkIndex::new(index) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use spline_types::FenceTag;

    fn meta() -> Meta {
        let mut fence = FenceTable::default();
        let tag = FenceTag { epoch: Epoch::new(3), seq: Seq::new(9), floor: Seq::new(4) };
        fence.judge(VolumeId::new(7), tag).expect("first");
        fence.delete(VolumeId::new(8));
        let chunks = vec![ChunkId { volume: VolumeId::new(7), index: ChunkIndex::new(1) }];
        let position = Some(LogPosition { term: 1, node: 2, index: 3 });
        Meta { position, membership: Bytes::from_static(b"mm"), fence, chunks }
    }

    #[test]
    fn golden_bytes_of_version_1() {
        let golden = [
            &b"SPLCSMET\x01\0\0\0\x05\0\0\0\x01"[..],
            &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
            &[2, 0, 0, 0, b'm', b'm'],
            &[1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        ]
        .concat();
        let bytes = meta().encode(CopysetId::new(5));
        assert_eq!(bytes[..bytes.len() - 4], golden);
        assert_eq!(Meta::decode(&bytes, CopysetId::new(5)), Ok(meta()));
    }

    #[test]
    fn damage_and_strangers_are_refused() {
        let bytes = meta().encode(CopysetId::new(5));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(Meta::decode(&bad, CopysetId::new(5)).is_err(), "byte {at}");
            assert!(Meta::decode(&bytes[..at], CopysetId::new(5)).is_err(), "cut at {at}");
        }
        assert!(Meta::decode(&bytes, CopysetId::new(6)).is_err());
        let mut newer = bytes;
        newer[8] = 9;
        assert!(Meta::decode(&newer, CopysetId::new(5)).is_err_and(|why| why.contains("version=9")));
    }

    #[test]
    fn files_are_replaced_whole() {
        let dir = tempfile::tempdir().expect("tempdir");
        meta().save(dir.path(), CopysetId::new(5)).expect("saves");
        Meta::default().save(dir.path(), CopysetId::new(5)).expect("saves again");
        assert_eq!(Meta::load(dir.path(), CopysetId::new(5)).expect("loads"), Meta::default());
    }
}
