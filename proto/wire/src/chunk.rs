//! Meta of chunk requests and replies, and the payload of a status reply. Pure; called by the cluster client and the
//! chunkserver. Must never know how frames travel.
//!
//! Request, 64 bytes little-endian: version u8 | op u8 | 0 u16 | copyset u32 | volume u64 | chunk index u32 |
//! offset u32 | length u32 | 0 u32 | epoch u64 | seq u64 | floor u64 | 0 u64.
//! Reply, 8 bytes: version u8 | 0 u8 | fault u16 (0: done) | leader hint u32 (0: none).
//! Extent, 8 bytes: length u32 | flags u32 (1: hole, 2: zero).

use crate::fault;
use bytes::{BufMut, Bytes, BytesMut};
use spline_types::limits::CHUNK_BYTES;
use spline_types::{
    ChunkCommand, ChunkId, ChunkIndex, ChunkOp, ChunkRange, ChunkserverId, CopysetId, Epoch, Extent, Fault,
    FenceTag, Seq, VolumeId,
};

/// Version of these encodings, newest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum ChunkVersion {
    /// First version.
    V1 = 1,
}

const VERSION: u8 = ChunkVersion::V1 as u8;
/// Bytes of a request's meta.
pub const REQUEST_BYTES: usize = 64;
/// Bytes of a reply's meta.
pub const REPLY_BYTES: usize = 8;
/// Bytes of an extent.
pub const EXTENT_BYTES: usize = 8;
/// Extents of one answer: a chunk has that many 512-byte sectors, finer is nothing.
pub const EXTENTS_MAX: usize = CHUNK_BYTES as usize / 512;

const HOLE: u32 = 1;
const ZERO: u32 = 2;

/// Why bytes are not what they should be.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum DecodeError {
    /// Not the length that the encoding has.
    #[error("wrong length: bytes={0}")]
    Length(usize),
    /// From a version that this build does not know.
    #[error("unknown version, upgrade this side: version={0}")]
    Version(u8),
    /// A field has a value that it can not have.
    #[error("bad {field}: value={value}")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

const fn op_number(op: ChunkOp) -> u8 {
    match op {
        ChunkOp::Read => 1,
        ChunkOp::Write => 2,
        ChunkOp::WriteZeroes => 3,
        ChunkOp::Discard => 4,
        ChunkOp::Status => 5,
        ChunkOp::Peek => 6,
    }
}

const fn op_of(number: u8) -> Option<ChunkOp> {
    Some(match number {
        1 => ChunkOp::Read,
        2 => ChunkOp::Write,
        3 => ChunkOp::WriteZeroes,
        4 => ChunkOp::Discard,
        5 => ChunkOp::Status,
        6 => ChunkOp::Peek,
        _ => return None,
    })
}

/// Encodes a request's meta: [`REQUEST_BYTES`] bytes.
pub fn encode_request(command: &ChunkCommand) -> Bytes {
    let mut meta = BytesMut::with_capacity(REQUEST_BYTES);
    meta.put_u8(VERSION);
    meta.put_u8(op_number(command.op));
    meta.put_u16_le(0);
    meta.put_u32_le(command.copyset.get());
    meta.put_u64_le(command.chunk.volume.get());
    meta.put_u32_le(command.chunk.index.get());
    meta.put_u32_le(command.range.offset());
    meta.put_u32_le(command.range.length());
    meta.put_u32_le(0);
    meta.put_u64_le(command.fence.epoch.get());
    meta.put_u64_le(command.fence.seq.get());
    meta.put_u64_le(command.fence.floor.get());
    meta.put_u64_le(0);
    meta.freeze()
}

/// Decodes a request's meta.
///
/// # Errors
/// `Length`, `Version`, or `Field`: unknown op, a range outside a chunk, a floor above the seq, reserved bytes that
/// are not zero.
pub fn decode_request(meta: &[u8]) -> Result<ChunkCommand, DecodeError> {
    check_version(meta)?;
    let bytes: &[u8; REQUEST_BYTES] = meta.try_into().map_err(|_| DecodeError::Length(meta.len()))?;
    let (offset, length) = (u32_at(bytes, 20), u32_at(bytes, 24));
    let bad = |field, value| DecodeError::Field { field, value };
    let reserved = u64::from(u16::from_le_bytes([bytes[2], bytes[3]]))
        | u64::from(u32_at(bytes, 28))
        | u64_at(bytes, 56);
    if reserved != 0 {
        return Err(bad("reserved bytes", reserved));
    }
    let (seq, floor) = (u64_at(bytes, 40), u64_at(bytes, 48));
    if floor > seq {
        return Err(bad("floor above the seq", floor));
    }
    Ok(ChunkCommand {
        copyset: CopysetId::new(u32_at(bytes, 4)),
        chunk: ChunkId { volume: VolumeId::new(u64_at(bytes, 8)), index: ChunkIndex::new(u32_at(bytes, 16)) },
        op: op_of(bytes[1]).ok_or_else(|| bad("operation", bytes[1].into()))?,
        range: ChunkRange::new(offset, length)
            .ok_or_else(|| bad("range end", u64::from(offset) + u64::from(length)))?,
        fence: FenceTag { epoch: Epoch::new(u64_at(bytes, 32)), seq: Seq::new(seq), floor: Seq::new(floor) },
    })
}

/// What a chunkserver answers; data or extents travel as the frame's payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply {
    /// Carried out, or why not.
    pub result: Result<(), Fault>,
    /// Who leads the copyset, as far as this replica knows. Never id 0, which the metadata server does not give out.
    pub leader_hint: Option<ChunkserverId>,
}

impl Reply {
    /// Carried out.
    pub const DONE: Self = Self { result: Ok(()), leader_hint: None };

    /// Not carried out.
    pub const fn failed(fault: Fault) -> Self {
        Self { result: Err(fault), leader_hint: None }
    }

    /// Encodes the meta: [`REPLY_BYTES`] bytes.
    pub fn encode(&self) -> Bytes {
        // The common answer allocates nothing.
        const DONE: &[u8; REPLY_BYTES] = &[VERSION, 0, 0, 0, 0, 0, 0, 0];
        if *self == Self::DONE {
            return Bytes::from_static(DONE);
        }
        let [a, b] = self.result.map_or_else(fault::number_of, |()| 0).to_le_bytes();
        let [c, d, e, f] = self.leader_hint.map_or(0, ChunkserverId::get).to_le_bytes();
        Bytes::copy_from_slice(&[VERSION, 0, a, b, c, d, e, f])
    }

    /// Decodes the meta.
    ///
    /// # Errors
    /// `Length`, `Version`, or `Field` (unknown fault, reserved byte not zero).
    pub fn decode(meta: &[u8]) -> Result<Self, DecodeError> {
        check_version(meta)?;
        let &[_, zero, a, b, c, d, e, f] = meta else { return Err(DecodeError::Length(meta.len())) };
        if zero != 0 {
            return Err(DecodeError::Field { field: "reserved byte", value: zero.into() });
        }
        let number = u16::from_le_bytes([a, b]);
        let result = match (number, fault::fault_of(number)) {
            (0, _) => Ok(()),
            (_, Some(fault)) => Err(fault),
            (_, None) => return Err(DecodeError::Field { field: "fault", value: number.into() }),
        };
        let hint = u32::from_le_bytes([c, d, e, f]);
        Ok(Self { result, leader_hint: (hint != 0).then(|| ChunkserverId::new(hint)) })
    }
}

/// Encodes the extents of a part of one chunk. Lengths above 4 GiB can not occur there and are cut.
pub fn encode_extents(extents: &[Extent]) -> Bytes {
    let mut payload = BytesMut::with_capacity(extents.len() * EXTENT_BYTES);
    for extent in extents {
        payload.put_u32_le(u32::try_from(extent.length).unwrap_or(u32::MAX));
        payload.put_u32_le((HOLE * u32::from(extent.hole)) | (ZERO * u32::from(extent.zero)));
    }
    payload.freeze()
}

/// Decodes the extents of a part of one chunk.
///
/// # Errors
/// `Length`, or `Field`: an empty extent, unknown flags, more bytes than a chunk has, more than [`EXTENTS_MAX`].
pub fn decode_extents(payload: &[u8]) -> Result<Vec<Extent>, DecodeError> {
    let (entries, rest) = payload.as_chunks::<EXTENT_BYTES>();
    if !rest.is_empty() || entries.len() > EXTENTS_MAX {
        return Err(DecodeError::Length(payload.len()));
    }
    let mut total = 0;
    let mut extents = Vec::with_capacity(entries.len());
    for &[a, b, c, d, e, f, g, h] in entries {
        let length = u64::from(u32::from_le_bytes([a, b, c, d]));
        let flags = u32::from_le_bytes([e, f, g, h]);
        total += length;
        if length == 0 || total > u64::from(CHUNK_BYTES) {
            return Err(DecodeError::Field { field: "extent length", value: length });
        }
        if flags & !(HOLE | ZERO) != 0 {
            return Err(DecodeError::Field { field: "extent flags", value: flags.into() });
        }
        extents.push(Extent { length, hole: flags & HOLE != 0, zero: flags & ZERO != 0 });
    }
    Ok(extents)
}

fn check_version(meta: &[u8]) -> Result<(), DecodeError> {
    match meta.first() {
        None => Err(DecodeError::Length(0)),
        Some(&VERSION) => Ok(()),
        Some(&other) => Err(DecodeError::Version(other)),
    }
}

fn u32_at(bytes: &[u8; REQUEST_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; REQUEST_BYTES], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}

#[cfg(test)]
mod tests;
