//! What is logged: commands of a copyset and their answers, as bytes.
//!
//! Called by the copyset (encodes) and the state machine (decodes). Pure. Must not know: the log, chunk files.
//!
//! Meta: version u8 | kind u8 | body. Kind 1, chunk: the 64 bytes of `spline_wire::chunk`; the payload lies beside.
//! Kind 2, fence: volume u64 | epoch u64. Kind 3, delete volume: volume u64. Little-endian.
//! Answer: fault u16 (0: done), as `spline_wire::fault` numbers them. Answers are never stored.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use spline_raft::{Answer, LogCommand};
use spline_types::{ChunkCommand, Epoch, Fault, VolumeId};

/// Versions of the encoding, newest first.
pub const VERSIONS: [u8; 1] = [
    1, // chunk, fence, delete volume
];

const CHUNK: u8 = 1;
const FENCE: u8 = 2;
const DELETE_VOLUME: u8 = 3;

/// A command of a copyset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Changes a chunk.
    Chunk(ChunkCommand),
    /// A session of this epoch exists: older ones are over.
    Fence {
        /// Whose session.
        volume: VolumeId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// The volume is gone: its chunks are removed and never come back.
    DeleteVolume(VolumeId),
}

impl Command {
    /// As it is logged, with the payload of a write.
    pub fn encode(&self, payload: Bytes) -> LogCommand {
        let mut meta = BytesMut::with_capacity(2 + spline_wire::chunk::REQUEST_BYTES);
        meta.put_u8(VERSIONS[0]);
        match self {
            Self::Chunk(command) => {
                meta.put_u8(CHUNK);
                meta.put_slice(&spline_wire::chunk::encode_request(command));
            }
            Self::Fence { volume, epoch } => {
                meta.put_u8(FENCE);
                meta.put_u64_le(volume.get());
                meta.put_u64_le(epoch.get());
            }
            Self::DeleteVolume(volume) => {
                meta.put_u8(DELETE_VOLUME);
                meta.put_u64_le(volume.get());
            }
        }
        LogCommand { meta: meta.freeze(), payload }
    }

    /// Reads the meta of a logged command.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(meta: &[u8]) -> Result<Self, String> {
        let (&[version, kind], mut body) = meta.split_first_chunk::<2>().ok_or("too short")?;
        if !VERSIONS.contains(&version) {
            return Err(format!("unknown command version, upgrade this chunkserver: version={version}"));
        }
        match (kind, body.len()) {
            (CHUNK, _) => {
                spline_wire::chunk::decode_request(body).map(Self::Chunk).map_err(|error| error.to_string())
            }
            (FENCE, 16) => Ok(Self::Fence {
                volume: VolumeId::new(body.get_u64_le()),
                epoch: Epoch::new(body.get_u64_le()),
            }),
            (DELETE_VOLUME, 8) => Ok(Self::DeleteVolume(VolumeId::new(body.get_u64_le()))),
            (kind, bytes) => Err(format!("unknown command kind={kind} bytes={bytes}")),
        }
    }
}

/// The answer to the proposer.
pub fn encode_answer(result: Result<(), Fault>) -> Answer {
    const DONE: &[u8] = &[0, 0];
    match result {
        Ok(()) => Bytes::from_static(DONE),
        Err(fault) => Bytes::copy_from_slice(&spline_wire::fault::number_of(fault).to_le_bytes()),
    }
}

/// Reads an answer.
///
/// # Errors
/// The fault; `Internal` if it is no answer.
pub fn decode_answer(answer: &[u8]) -> Result<(), Fault> {
    let number = <[u8; 2]>::try_from(answer).map(u16::from_le_bytes).map_err(|_| Fault::Internal)?;
    match number {
        0 => Ok(()),
        number => Err(spline_wire::fault::fault_of(number).unwrap_or(Fault::Internal)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spline_types::{ChunkId, ChunkIndex, ChunkOp, ChunkRange, CopysetId, FenceTag, Seq};

    #[test]
    fn golden_bytes_of_version_1() {
        let (volume, epoch) = (VolumeId::new(7), Epoch::new(3));
        let fence = Command::Fence { volume, epoch };
        let meta = fence.encode(Bytes::new()).meta;
        assert_eq!(meta[..], [1, 2, 7, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        let delete = Command::DeleteVolume(volume);
        assert_eq!(delete.encode(Bytes::new()).meta[..], [1, 3, 7, 0, 0, 0, 0, 0, 0, 0]);
        let chunk = Command::Chunk(ChunkCommand {
            copyset: CopysetId::new(1),
            chunk: ChunkId { volume, index: ChunkIndex::new(2) },
            op: ChunkOp::Write,
            range: ChunkRange::whole(),
            fence: FenceTag { epoch, seq: Seq::new(5), floor: Seq::new(4) },
        });
        for command in [fence, delete, chunk] {
            assert_eq!(Command::decode(&command.encode(Bytes::new()).meta), Ok(command));
        }
        assert_eq!(chunk.encode(Bytes::new()).meta.len(), 66);
        assert_eq!(chunk.encode(Bytes::new()).meta[..2], [1, 1]);
    }

    #[test]
    fn strangers_are_refused() {
        for bad in [&[][..], &[1], &[2, 2], &[1, 9], &[1, 3, 0], &[1, 1, 0, 0]] {
            assert!(Command::decode(bad).is_err(), "{bad:?}");
        }
        assert!(Command::decode(&[9, 1]).is_err_and(|why| why.contains("version=9")));
    }

    #[test]
    fn answers_round_trip() {
        for result in [Ok(()), Err(Fault::Fenced), Err(Fault::NoSpace)] {
            assert_eq!(decode_answer(&encode_answer(result)), result);
        }
        assert_eq!(decode_answer(&[1]), Err(Fault::Internal));
    }
}
