//! Frames: what both sides say once the hello is accepted.
//!
//! Layout (48 bytes, then the payload): magic u32 | kind u8 | op u8 | flags u16 | request u64 | offset u64 |
//! length u64 | payload u32 | status u16 | reserved u16 | reserved u64. Fields that a kind does not use are zero;
//! `Resized` carries its size in `length`, `Region` and `RegionGone` their number in `request`, `Renewed` its epoch there.

use crate::error::LinkError;
use crate::fault::{completion_code, completion_from_code};
use crate::fields::{put, u16_at, u32_at, u64_at, within, zero};
use spline_types::limits::{REQUEST_BYTES_MAX, VOLUME_BYTES_MAX};
use spline_types::{BlockOp, BlockRequest, ByteRange, Completion, Epoch, RequestId};

/// "SPLF" as it lies on the socket.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"SPLF");
/// Bytes of a frame before its payload.
pub const HEADER_BYTES: usize = 48;

const KIND_REQUEST: u8 = 1;
const KIND_REPLY: u8 = 2;
const KIND_RESIZED: u8 = 3;
const KIND_LEAVING: u8 = 4;
const KIND_LOST: u8 = 5;
const KIND_DETACH: u8 = 6;
const KIND_REGION: u8 = 7;
const KIND_REGION_GONE: u8 = 8;
const KIND_RENEWED: u8 = 9;

const FLAG_FUA: u16 = 1;
const FLAG_NO_HOLE: u16 = 2;
const FLAG_FAST: u16 = 4;

/// What a frame says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// nebd: execute this. A write's payload is as long as its range; other requests have none.
    Request(BlockRequest),
    /// Gateway: how the request ended. Done reads carry the range's data, done status requests their
    /// [`extents`](crate::extents); every other reply has no payload.
    Reply {
        /// The request.
        id: RequestId,
        /// Its end; `Withdrawn` means that it will not be answered here and is to be replayed on the next link.
        completion: Completion,
    },
    /// Gateway: the volume now has this many bytes.
    Resized {
        /// Bytes.
        size: u64,
    },
    /// Gateway: it ends; what is unanswered is to be replayed on the next link.
    Leaving,
    /// Gateway: a newer session has the volume; what is unanswered fails as fenced.
    Lost,
    /// nebd: it ends for good; the session may be closed once the requests before this are answered.
    Detach,
    /// nebd: requests in the ring may name this memory from now on. Its descriptor comes with the frame. From V4 on.
    Region {
        /// Its number, larger than any before on this link.
        number: u32,
        /// Where it starts in its file, bytes.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// nebd: no request names it any more. From V4 on.
    RegionGone {
        /// Which.
        number: u32,
    },
    /// Gateway: another process has taken the link over with a session of this epoch; what it found unanswered was withdrawn and
    /// is to be sent again on this link. From V4 on.
    Renewed {
        /// The epoch; 0 for engines without sessions.
        epoch: Epoch,
    },
}

/// A frame without its payload's bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// What it says.
    pub message: Message,
    /// Bytes of payload that follow.
    pub payload: u32,
}

impl Header {
    /// The frame of a request; the payload of a write follows.
    pub const fn request(request: BlockRequest) -> Self {
        let payload = match request.op {
            // A write's range is at most REQUEST_BYTES_MAX long: whoever built the request has checked it.
            BlockOp::Write => request.range.length() as u32,
            _ => 0,
        };
        Self { message: Message::Request(request), payload }
    }

    /// The frame of a reply with `payload` bytes behind it.
    pub const fn reply(id: RequestId, completion: Completion, payload: u32) -> Self {
        Self { message: Message::Reply { id, completion }, payload }
    }

    /// A frame without a payload.
    pub const fn bare(message: Message) -> Self {
        Self { message, payload: 0 }
    }

    /// The bytes to send.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        put(&mut bytes, 0, &FRAME_MAGIC.to_le_bytes());
        put(&mut bytes, 32, &self.payload.to_le_bytes());
        match &self.message {
            Message::Request(request) => {
                let (op, flags) = op_code(request);
                bytes[4] = KIND_REQUEST;
                bytes[5] = op;
                put(&mut bytes, 6, &flags.to_le_bytes());
                put(&mut bytes, 8, &request.id.get().to_le_bytes());
                put(&mut bytes, 16, &request.range.offset().to_le_bytes());
                put(&mut bytes, 24, &request.range.length().to_le_bytes());
            }
            Message::Reply { id, completion } => {
                bytes[4] = KIND_REPLY;
                put(&mut bytes, 8, &id.get().to_le_bytes());
                put(&mut bytes, 36, &completion_code(completion).to_le_bytes());
            }
            Message::Resized { size } => {
                bytes[4] = KIND_RESIZED;
                put(&mut bytes, 24, &size.to_le_bytes());
            }
            Message::Leaving => bytes[4] = KIND_LEAVING,
            Message::Lost => bytes[4] = KIND_LOST,
            Message::Detach => bytes[4] = KIND_DETACH,
            Message::Region { number, offset, length } => {
                bytes[4] = KIND_REGION;
                put(&mut bytes, 8, &u64::from(*number).to_le_bytes());
                put(&mut bytes, 16, &offset.to_le_bytes());
                put(&mut bytes, 24, &length.to_le_bytes());
            }
            Message::RegionGone { number } => {
                bytes[4] = KIND_REGION_GONE;
                put(&mut bytes, 8, &u64::from(*number).to_le_bytes());
            }
            Message::Renewed { epoch } => {
                bytes[4] = KIND_RENEWED;
                put(&mut bytes, 8, &epoch.get().to_le_bytes());
            }
        }
        bytes
    }

    /// Reads a header and checks that its fields fit each other.
    ///
    /// # Errors
    /// Any `LinkError`; the link must be cut, because the next frame can not be found.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, LinkError> {
        if u32_at(bytes, 0) != FRAME_MAGIC {
            return Err(LinkError::Magic(u32_at(bytes, 0)));
        }
        let payload = u32_at(bytes, 32);
        within("payload", payload.into(), REQUEST_BYTES_MAX.into())?;
        zero("reserved", u16_at(bytes, 38).into())?;
        zero("reserved", u64_at(bytes, 40))?;
        let message = match bytes[4] {
            KIND_REQUEST => Message::Request(decode_request(bytes, payload)?),
            KIND_REPLY => decode_reply(bytes, payload)?,
            KIND_RESIZED => {
                let size = u64_at(bytes, 24);
                within("size", size, VOLUME_BYTES_MAX)?;
                Message::Resized { size }
            }
            KIND_LEAVING => Message::Leaving,
            KIND_LOST => Message::Lost,
            KIND_DETACH => Message::Detach,
            KIND_REGION => Message::Region {
                number: number(bytes)?,
                offset: u64_at(bytes, 16),
                length: u64_at(bytes, 24),
            },
            KIND_REGION_GONE => Message::RegionGone { number: number(bytes)? },
            KIND_RENEWED => Message::Renewed { epoch: Epoch::new(u64_at(bytes, 8)) },
            other => return Err(LinkError::Unknown { field: "kind", value: other.into() }),
        };
        if !matches!(message, Message::Request(_) | Message::Reply { .. }) {
            zero("payload", payload.into())?;
        }
        Ok(Self { message, payload })
    }
}

fn number(bytes: &[u8; HEADER_BYTES]) -> Result<u32, LinkError> {
    let raw = u64_at(bytes, 8);
    u32::try_from(raw).map_err(|_| LinkError::Limit { field: "region", value: raw, limit: u32::MAX.into() })
}

/// The codes of a request's operation and flags, which a ring uses too.
pub(crate) fn op_code(request: &BlockRequest) -> (u8, u16) {
    let fua = if request.fua { FLAG_FUA } else { 0 };
    match request.op {
        BlockOp::Read => (1, fua),
        BlockOp::Write => (2, fua),
        BlockOp::Flush => (3, fua),
        BlockOp::Discard => (4, fua),
        BlockOp::WriteZeroes { no_hole, fast } => {
            let no_hole = if no_hole { FLAG_NO_HOLE } else { 0 };
            let fast = if fast { FLAG_FAST } else { 0 };
            (5, fua | no_hole | fast)
        }
        BlockOp::Cache => (6, fua),
        BlockOp::Status => (7, fua),
    }
}

fn decode_request(bytes: &[u8; HEADER_BYTES], payload: u32) -> Result<BlockRequest, LinkError> {
    let (op, fua) = decode_op(bytes[5], u16_at(bytes, 6))?;
    zero("status", u16_at(bytes, 36).into())?;
    let length = u64_at(bytes, 24);
    let range = ByteRange::new(u64_at(bytes, 16), length)
        .ok_or(LinkError::Mismatch { field: "length", value: length })?;
    if op.carries_data() {
        within("length", length, REQUEST_BYTES_MAX.into())?;
    }
    let expected = if op == BlockOp::Write { length } else { 0 };
    if u64::from(payload) != expected {
        return Err(LinkError::Mismatch { field: "payload", value: payload.into() });
    }
    Ok(BlockRequest { id: RequestId::new(u64_at(bytes, 8)), op, range, fua })
}

/// The operation of a code, and whether it is to be durable when it is answered.
pub(crate) fn decode_op(code: u8, flags: u16) -> Result<(BlockOp, bool), LinkError> {
    let op = match code {
        1 => BlockOp::Read,
        2 => BlockOp::Write,
        3 => BlockOp::Flush,
        4 => BlockOp::Discard,
        5 => BlockOp::WriteZeroes { no_hole: flags & FLAG_NO_HOLE != 0, fast: flags & FLAG_FAST != 0 },
        6 => BlockOp::Cache,
        7 => BlockOp::Status,
        other => return Err(LinkError::Unknown { field: "op", value: other.into() }),
    };
    let known = match op {
        BlockOp::WriteZeroes { .. } => FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST,
        _ => FLAG_FUA,
    };
    zero("flags", u64::from(flags & !known))?;
    Ok((op, flags & FLAG_FUA != 0))
}

fn decode_reply(bytes: &[u8; HEADER_BYTES], payload: u32) -> Result<Message, LinkError> {
    let completion = completion_from_code(u16_at(bytes, 36))?;
    if completion != Completion::Done(()) {
        zero("payload", payload.into())?;
    }
    zero("op", bytes[5].into())?;
    zero("flags", u16_at(bytes, 6).into())?;
    zero("offset", u64_at(bytes, 16))?;
    zero("length", u64_at(bytes, 24))?;
    Ok(Message::Reply { id: RequestId::new(u64_at(bytes, 8)), completion })
}
