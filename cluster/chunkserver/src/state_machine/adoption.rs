//! Adoption of a received snapshot: what is intended is on disk before the first chunk moves.
//!
//! Called by the state machine, and when a copyset is opened. Must not know: how a snapshot arrives.
//! The file `adoption` in the copyset's directory holds the checkpoint that is to be in force and says which of its
//! chunks still lie in `incoming/`. A crash leaves the old state without that file, or the file, and then the steps are
//! taken again from wherever they stopped before the replica starts: never an old checkpoint with chunks missing.
//!
//! Bytes, little-endian: magic "SPLCSADO" | version u32 | meta length u32, bytes of the meta file |
//! incoming count u32, (volume u64, index u32)* | crc32c u32.

use super::CHUNKS;
use super::meta::{Meta, checked, put_chunk, put_count, replace_file, take_chunk, take_count};
use super::snapshot::INCOMING;
use crate::store::checksum::crc32c;
use crate::store::chunk_store::file_name;
use crate::store::{ChunkStore, Disk};
use bytes::BufMut;
use spline_types::{ChunkId, CopysetId};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Versions of the file, newest first.
pub const VERSIONS: [u32; 1] = [
    1, // meta, incoming chunks
];
const MAGIC: &[u8; 8] = b"SPLCSADO";
/// Name of the file in the copyset's directory.
pub const FILE_NAME: &str = "adoption";

/// What is intended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Adoption {
    /// The checkpoint that will be in force; it names every chunk.
    pub meta: Meta,
    /// Those of its chunks that come from `incoming/`. The others are in their place, and durable.
    pub incoming: BTreeSet<ChunkId>,
}

/// One step of an adoption.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// A living chunk goes: the snapshot has it not, or has another.
    Remove(ChunkId),
    /// A chunk comes in from `incoming/`.
    MoveIn(ChunkId),
    /// The names of all chunks are made durable.
    SyncNames,
    /// The checkpoint is in force.
    SaveMeta,
    /// The intention is carried out, and forgotten.
    Forget,
}

impl Adoption {
    /// The bytes of the file.
    pub fn encode(&self, copyset: CopysetId) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_slice(MAGIC);
        out.put_u32_le(VERSIONS[0]);
        let meta = self.meta.encode(copyset);
        put_count(&mut out, meta.len());
        out.put_slice(&meta);
        put_count(&mut out, self.incoming.len());
        self.incoming.iter().for_each(|id| put_chunk(&mut out, *id));
        let crc = crc32c(&out);
        out.put_u32_le(crc);
        out
    }

    /// Reads the file's bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8], copyset: CopysetId) -> Result<Self, String> {
        let mut body = checked(bytes, MAGIC, &VERSIONS)?;
        let length = take_count(&mut body, 1)?;
        let (meta, mut body) = body.split_at(length);
        let meta = Meta::decode(meta, copyset)?;
        let count = take_count(&mut body, 12)?;
        let incoming = (0..count).map(|_| take_chunk(&mut body)).collect::<Result<_, _>>()?;
        Ok(Self { meta, incoming })
    }

    /// Writes the file durably in `dir`, the copyset's directory. From then on there is no way back.
    ///
    /// # Errors
    /// If the disk fails or is full.
    pub fn save(&self, dir: &Path, copyset: CopysetId) -> io::Result<()> {
        replace_file(dir, FILE_NAME, &self.encode(copyset))
    }

    /// Reads the file in `dir`; `None` if no adoption was interrupted.
    ///
    /// # Errors
    /// If it can not be read or understood.
    pub fn load(dir: &Path, copyset: CopysetId) -> io::Result<Option<Self>> {
        let path = dir.join(FILE_NAME);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read?,
        };
        Self::decode(&bytes, copyset).map(Some).map_err(|why| {
            let text = format!("adoption of a snapshot: {why} path={}", path.display());
            io::Error::new(io::ErrorKind::InvalidData, text)
        })
    }

    /// Takes all steps that are left. Blocks.
    ///
    /// # Errors
    /// If the disk fails or is full; it may be tried again. If a chunk is nowhere; nothing is touched then.
    pub fn carry_out(&self, copyset: CopysetId, dir: &Path, store: &ChunkStore) -> io::Result<()> {
        self.steps(dir, store)?.into_iter().try_for_each(|step| self.take(step, copyset, dir, store))
    }

    /// The steps that are left.
    pub(super) fn steps(&self, dir: &Path, store: &ChunkStore) -> io::Result<Vec<Step>> {
        let mut moves = Vec::new();
        for id in &self.incoming {
            if incoming(dir, *id).try_exists()? {
                moves.push(*id);
            }
        }
        let lost = |id: &&ChunkId| !store.has(**id) && !moves.contains(id);
        if let Some(id) = self.meta.chunks.iter().find(lost) {
            return Err(io::Error::other(format!("a chunk of the snapshot is missing: chunk={id}")));
        }
        let stay: BTreeSet<_> = self.meta.chunks.iter().filter(|id| !moves.contains(id)).collect();
        let gone = store.present().into_iter().filter(|id| !stay.contains(id)).map(Step::Remove);
        let end = [Step::SyncNames, Step::SaveMeta, Step::Forget];
        Ok(gone.chain(moves.iter().map(|id| Step::MoveIn(*id))).chain(end).collect())
    }

    pub(super) fn take(
        &self,
        step: Step,
        copyset: CopysetId,
        dir: &Path,
        store: &ChunkStore,
    ) -> io::Result<()> {
        match step {
            Step::Remove(id) => store.remove(id),
            Step::MoveIn(id) => store.adopt(id, &incoming(dir, id)),
            Step::SyncNames => sync_names(dir),
            Step::SaveMeta => self.meta.save(dir, copyset),
            Step::Forget => {
                fs::remove_file(dir.join(FILE_NAME))?;
                File::open(dir)?.sync_all()
            }
        }
    }
}

/// Opens what a copyset has in `dir`: its chunks, and the checkpoint in force. An adoption that was interrupted is
/// carried out first. Blocks.
///
/// # Errors
/// If a file can not be read or understood, or the disk fails.
pub fn open(disk: Arc<Disk>, copyset: CopysetId, dir: &Path) -> io::Result<(ChunkStore, Meta)> {
    let interrupted = Adoption::load(dir, copyset)?;
    let meta = match &interrupted {
        Some(adoption) => adoption.meta.clone(),
        None => Meta::load(dir, copyset)?,
    };
    let store = ChunkStore::open(disk, copyset, &dir.join(CHUNKS), &meta.chunks)?;
    if let Some(adoption) = interrupted {
        tracing::info!(%copyset, "the adoption of a snapshot was interrupted, it goes on");
        adoption.carry_out(copyset, dir, &store)?;
    }
    Ok((store, meta))
}

/// Makes the names of living and incoming chunks durable.
///
/// # Errors
/// If the disk fails.
pub fn sync_names(dir: &Path) -> io::Result<()> {
    [CHUNKS, INCOMING].iter().try_for_each(|part| File::open(dir.join(part))?.sync_all())
}

fn incoming(dir: &Path, id: ChunkId) -> PathBuf {
    dir.join(INCOMING).join(file_name(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use spline_raft::LogPosition;
    use spline_types::{ChunkIndex, VolumeId};

    const COPYSET: CopysetId = CopysetId::new(5);

    fn adoption() -> Adoption {
        let chunk = |index| ChunkId { volume: VolumeId::new(7), index: ChunkIndex::new(index) };
        let position = Some(LogPosition { term: 1, node: 2, index: 3 });
        let chunks = vec![chunk(1), chunk(2)];
        let meta = Meta { position, membership: Bytes::from_static(b"mm"), chunks, ..Meta::default() };
        Adoption { meta, incoming: BTreeSet::from([chunk(2)]) }
    }

    #[test]
    fn golden_bytes_of_version_1() {
        let golden = [
            &b"SPLCSADO\x01\0\0\0\x57\0\0\0"[..],
            b"SPLCSMET\x01\0\0\0\x05\0\0\0\x01",
            &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
            &[2, 0, 0, 0, b'm', b'm', 0, 0, 0, 0, 0, 0, 0, 0],
            &[2, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0],
        ]
        .concat();
        let bytes = adoption().encode(COPYSET);
        assert_eq!(bytes[..golden.len()], golden);
        let rest = [1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0];
        assert_eq!(bytes[golden.len() + 4..bytes.len() - 4], rest);
        assert_eq!(Adoption::decode(&bytes, COPYSET), Ok(adoption()));
    }

    #[test]
    fn damage_and_strangers_are_refused() {
        let bytes = adoption().encode(COPYSET);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(Adoption::decode(&bad, COPYSET).is_err(), "byte {at}");
            assert!(Adoption::decode(&bytes[..at], COPYSET).is_err(), "cut at {at}");
        }
        assert!(Adoption::decode(&bytes, CopysetId::new(6)).is_err());
        let mut newer = bytes;
        newer[8] = 9;
        assert!(Adoption::decode(&newer, COPYSET).is_err_and(|why| why.contains("version=9")));
    }
}
