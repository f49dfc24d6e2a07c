//! The frame: a 32-byte header, meta, payload. Pure; called by `connection`. Must never know sockets or what meta
//! means.
//!
//! Header, little-endian: magic u32 | version u16 | kind u16 | request u64 | meta length u32 | payload length u32 |
//! CRC-32C of the header (with this field zero) and meta u32 | CRC-32C of the payload u32.
//!
//! `bounded`: lengths are checked against their limits before anything is allocated for them.

use crate::error::WireError;
use bytes::Bytes;

/// First bytes of every frame: `SPLF`.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"SPLF");
/// Bytes of the header.
pub const HEADER_BYTES: usize = 32;
/// Longest meta, bytes: raft's entry headers are the largest user; chunk requests need 64.
pub const META_BYTES_MAX: u32 = 64 << 10;
/// Longest payload, bytes: the largest request (32 MiB) and room for a batch's overhead.
pub const PAYLOAD_BYTES_MAX: u32 = 33 << 20;

const CRC_AT: usize = 24;

/// What a frame is. Closed: an unknown number is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u16)]
pub enum Kind {
    /// A gateway asks something of a chunk.
    ChunkRequest = 1,
    /// The answer.
    ChunkReply = 2,
    /// One raft peer asks another.
    RaftRequest = 3,
    /// The answer.
    RaftReply = 4,
    /// Are you there? Answered by the receiver itself, never seen by its user.
    Ping = 5,
    /// The answer to a ping.
    Pong = 6,
}

impl Kind {
    /// From its number; `None` if unknown.
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::ChunkRequest,
            2 => Self::ChunkReply,
            3 => Self::RaftRequest,
            4 => Self::RaftReply,
            5 => Self::Ping,
            6 => Self::Pong,
            _ => return None,
        })
    }
}

/// One message. The payload may come in parts, which are sent without being joined; a received frame has at most one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Joins a reply to its request; unique among the unanswered requests of a connection and direction.
    pub request: u64,
    /// At most [`META_BYTES_MAX`] bytes.
    pub meta: Bytes,
    /// At most [`PAYLOAD_BYTES_MAX`] bytes in all.
    pub payload: Vec<Bytes>,
}

impl Frame {
    /// Bytes of the payload.
    pub fn payload_bytes(&self) -> usize {
        self.payload.iter().map(Bytes::len).sum()
    }

    /// The payload in one piece: no copy when it has at most one part, as every received frame.
    pub fn into_payload(mut self) -> Bytes {
        match self.payload.len() {
            0 => Bytes::new(),
            1 => self.payload.swap_remove(0),
            _ => self.payload.concat().into(),
        }
    }

    /// The header's bytes; `None` if meta or payload is longer than its limit.
    pub fn header(&self, version: u16) -> Option<[u8; HEADER_BYTES]> {
        let meta = u32::try_from(self.meta.len()).ok().filter(|&n| n <= META_BYTES_MAX)?;
        let payload = u32::try_from(self.payload_bytes()).ok().filter(|&n| n <= PAYLOAD_BYTES_MAX)?;
        let mut header = [0; HEADER_BYTES];
        header[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        header[4..6].copy_from_slice(&version.to_le_bytes());
        header[6..8].copy_from_slice(&(self.kind as u16).to_le_bytes());
        header[8..16].copy_from_slice(&self.request.to_le_bytes());
        header[16..20].copy_from_slice(&meta.to_le_bytes());
        header[20..24].copy_from_slice(&payload.to_le_bytes());
        header[28..32].copy_from_slice(&crc32c(self.payload.iter().map(Bytes::as_ref)).to_le_bytes());
        let crc = crc32c([&header[..], &self.meta]);
        header[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        Some(header)
    }
}

/// A received header whose lengths are within their limits; its checksum is not yet verified (that takes the meta).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// What the frame is.
    pub kind: Kind,
    /// Its request number.
    pub request: u64,
    /// Bytes of meta that follow.
    pub meta_bytes: usize,
    /// Bytes of payload that follow the meta.
    pub payload_bytes: usize,
    /// CRC-32C that the payload must have.
    pub payload_crc: u32,
}

impl Head {
    /// Reads a header of a connection that speaks `version`.
    ///
    /// # Errors
    /// `Malformed` with the field that is wrong.
    pub fn parse(bytes: &[u8; HEADER_BYTES], version: u16) -> Result<Self, WireError> {
        let [m0, m1, m2, m3, v0, v1, k0, k1, r @ .., _, _, _, _, p0, p1, p2, p3] = *bytes;
        let [r0, r1, r2, r3, r4, r5, r6, r7, l0, l1, l2, l3, n0, n1, n2, n3] = r;
        let bad = |what, value: u64| Err(WireError::Malformed { what, value });
        let magic = u32::from_le_bytes([m0, m1, m2, m3]);
        if magic != FRAME_MAGIC {
            return bad("magic", magic.into());
        }
        let seen = u16::from_le_bytes([v0, v1]);
        if seen != version {
            return bad("version is not the negotiated one", seen.into());
        }
        let kind = u16::from_le_bytes([k0, k1]);
        let Some(kind) = Kind::from_number(kind) else { return bad("unknown kind", kind.into()) };
        let meta = u32::from_le_bytes([l0, l1, l2, l3]);
        if meta > META_BYTES_MAX {
            return bad("meta is longer than the limit", meta.into());
        }
        let payload = u32::from_le_bytes([n0, n1, n2, n3]);
        if payload > PAYLOAD_BYTES_MAX {
            return bad("payload is longer than the limit", payload.into());
        }
        Ok(Self {
            kind,
            request: u64::from_le_bytes([r0, r1, r2, r3, r4, r5, r6, r7]),
            meta_bytes: meta as usize,
            payload_bytes: payload as usize,
            payload_crc: u32::from_le_bytes([p0, p1, p2, p3]),
        })
    }

    /// Verifies the checksum of a header and its meta.
    ///
    /// # Errors
    /// `Malformed` if it does not match: the stream can no longer be trusted to be in step.
    pub fn verify(header: &[u8; HEADER_BYTES], meta: &[u8]) -> Result<(), WireError> {
        let mut zeroed = *header;
        zeroed[CRC_AT..CRC_AT + 4].fill(0);
        let seen = crc32c([&zeroed[..], meta]);
        match header[CRC_AT..CRC_AT + 4] == seen.to_le_bytes() {
            true => Ok(()),
            false => Err(WireError::Malformed { what: "checksum of header and meta", value: seen.into() }),
        }
    }
}

/// CRC-32C (CRC-32/ISCSI) of parts in a row; 0 for no bytes.
pub fn crc32c<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    let mut parts = parts.into_iter();
    let first = parts.next().unwrap_or_default();
    let Some(second) = parts.next() else { return crc_fast::crc32_iscsi(first) };
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(first);
    digest.update(second);
    parts.for_each(|part| digest.update(part));
    digest.finalize() as u32
}

#[cfg(test)]
mod tests;
