//! What lies in the places of a ring: requests, pieces, completions. Pure.
//!
//! Called by the ring's two ends. A request's operations, flags and statuses have the codes of a frame.

use crate::error::LinkError;
use crate::fault::{completion_code, completion_from_code};
use crate::fields::{within, zero};
use crate::frame::{decode_op, op_code};
use spline_types::limits::REQUEST_BYTES_MAX;
use spline_types::{BlockOp, BlockRequest, ByteRange, Completion, RequestId};

/// Cells of a request.
pub(super) const SUBMISSION_CELLS: usize = 8;
/// Cells of a completion.
pub(super) const ANSWER_CELLS: usize = 2;
/// Cells of a piece.
pub(super) const PIECE_CELLS: usize = 2;
/// Pieces that a request holds itself.
pub(super) const PIECES_INLINE: usize = 2;

/// A part of a request's data: bytes of a region that both sides have mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Piece {
    /// Number of the region on this link.
    pub region: u32,
    /// Bytes; never 0.
    pub length: u32,
    /// Where in the region, bytes.
    pub offset: u64,
}

impl Piece {
    pub(super) fn encode(self) -> [u64; PIECE_CELLS] {
        [u64::from(self.region) | u64::from(self.length) << 32, self.offset]
    }

    pub(super) fn decode(cells: [u64; PIECE_CELLS]) -> Self {
        Self { region: cells[0] as u32, length: (cells[0] >> 32) as u32, offset: cells[1] }
    }
}

/// How a request ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RingAnswer {
    /// The request.
    pub id: RequestId,
    /// Its end; `Withdrawn` means that it will be sent again.
    pub completion: Completion,
    /// Bytes of extents in the piece of a status request; 0 for others.
    pub payload: u32,
}

impl RingAnswer {
    pub(super) fn encode(&self) -> [u64; ANSWER_CELLS] {
        let status = u64::from(completion_code(&self.completion));
        [self.id.get(), status | u64::from(self.payload) << 32]
    }
}

pub(super) fn decode_answer(cells: [u64; ANSWER_CELLS]) -> Result<RingAnswer, LinkError> {
    zero("reserved", cells[1] >> 16 & 0xffff)?;
    let completion = completion_from_code(cells[1] as u16)?;
    let payload = (cells[1] >> 32) as u32;
    if completion != Completion::Done(()) {
        zero("payload", payload.into())?;
    }
    Ok(RingAnswer { id: RequestId::new(cells[0]), completion, payload })
}

/// Where a request's pieces are.
pub(super) enum Listed {
    /// In the request; so many.
    Inline([Piece; PIECES_INLINE], usize),
    /// Among the pieces, from this number on; so many.
    From(u64, usize),
}

/// A request; more pieces than it holds itself lie among the pieces from number `first` on.
pub(super) fn encode(request: &BlockRequest, pieces: &[Piece], first: u64) -> [u64; SUBMISSION_CELLS] {
    let (op, flags) = op_code(request);
    let mut cells = [0; SUBMISSION_CELLS];
    cells[0] = request.id.get();
    cells[1] = u64::from(op) | u64::from(flags) << 8 | (pieces.len() as u64) << 32;
    cells[2] = request.range.offset();
    cells[3] = request.range.length();
    if pieces.len() > PIECES_INLINE {
        cells[4] = first;
    } else {
        for (index, piece) in pieces.iter().enumerate() {
            cells[4 + 2 * index..6 + 2 * index].copy_from_slice(&piece.encode());
        }
    }
    cells
}

/// Reads a request that was copied out of the ring.
pub(super) fn decode(cells: &[u64; SUBMISSION_CELLS]) -> Result<(BlockRequest, Listed), LinkError> {
    let (op, flags) = (cells[1] as u8, u16::from((cells[1] >> 8) as u8));
    zero("reserved", cells[1] >> 16 & 0xffff)?;
    let (op, fua) = decode_op(op, flags)?;
    let length = cells[3];
    let range =
        ByteRange::new(cells[2], length).ok_or(LinkError::Mismatch { field: "length", value: length })?;
    if op.carries_data() {
        within("length", length, REQUEST_BYTES_MAX.into())?;
    }
    let count = cells[1] >> 32;
    within("pieces", count, super::PIECES_MAX as u64)?;
    let count = count as usize;
    let listed = match count <= PIECES_INLINE {
        true => {
            let inline = [Piece::decode([cells[4], cells[5]]), Piece::decode([cells[6], cells[7]])];
            Listed::Inline(inline, count)
        }
        false => Listed::From(cells[4], count),
    };
    Ok((BlockRequest { id: RequestId::new(cells[0]), op, range, fua }, listed))
}

/// Whether a request's pieces are as many bytes as its data.
pub(super) fn check(request: &BlockRequest, pieces: &[Piece]) -> Result<(), LinkError> {
    if let Some(empty) = pieces.iter().find(|piece| piece.length == 0) {
        return Err(LinkError::Mismatch { field: "piece_length", value: empty.offset });
    }
    let bytes: u64 = pieces.iter().map(|piece| u64::from(piece.length)).sum();
    let fits = match request.op {
        BlockOp::Read | BlockOp::Write => bytes == request.range.length(),
        BlockOp::Status => pieces.len() == 1,
        _ => pieces.is_empty(),
    };
    if fits { Ok(()) } else { Err(LinkError::Mismatch { field: "pieces", value: bytes }) }
}
