//! Carries out a request over the chunks that it touches and joins their answers into one (`complete_once`).
//!
//! Called by the cluster engine. Knows: what an unallocated segment means. Must not know: copysets' leaders, retries.
//! A request is answered only when all of its parts have ended, also when one fails: a part that ran on could
//! overwrite what the guest writes next (`no_late_duplicate`).

use crate::engine::EngineAnswer;
use crate::split::{Part, chunk_op, parts, segment_ranges};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use spline_types::limits::{CHUNK_BYTES, SEGMENT_BYTES};
use spline_types::{BlockRequest, ByteRange, ChunkOp, CopysetId, Extent, Fault, SegmentIndex};
use std::future::Future;
use std::sync::Arc;

/// Parts of one request under way at once: a 32 MiB write has three, a large discard takes turns (`bounded`).
const PARTS_MAX: usize = 16;
/// Bytes that one status request looks at; the rest is asked for again.
const STATUS_BYTES_MAX: u64 = 4 * SEGMENT_BYTES;
/// What unallocated segments read as, in pieces.
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// One volume, chunk by chunk.
pub(crate) trait Chunks: Sync {
    /// The copysets of a segment's chunks, if it is allocated.
    fn allocated(&self, segment: SegmentIndex) -> Option<Arc<[CopysetId]>>;

    /// Allocates a segment, once however many ask.
    fn allocate(&self, segment: SegmentIndex)
    -> impl Future<Output = Result<Arc<[CopysetId]>, Fault>> + Send;

    /// Carries out one part.
    fn execute(
        &self,
        copyset: CopysetId,
        op: ChunkOp,
        part: Part,
        payload: Bytes,
    ) -> impl Future<Output = Result<PartAnswer, Fault>> + Send;
}

/// What a part is answered with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum PartAnswer {
    Written,
    Data(Bytes),
    Extents(Vec<Extent>),
}

/// What is done about a piece of the range.
enum Piece {
    /// A chunk is asked.
    Part(Part),
    /// No chunk has it: that many bytes of zeros.
    Hole(u64),
}

/// Carries out a request.
///
/// # Errors
/// The first fault of any part, in order of the range.
pub(crate) async fn execute<C: Chunks>(
    chunks: &C,
    request: BlockRequest,
    payload: Bytes,
) -> Result<EngineAnswer, Fault> {
    let Some(op) = chunk_op(request.op) else { return Ok(EngineAnswer::Done) };
    let range = match op {
        ChunkOp::Status => shortened(request.range, STATUS_BYTES_MAX),
        _ => request.range,
    };
    let mut joined = Joined::new(op);
    let mut pieces = pieces(chunks, op, range);
    let first = pieces.next();
    match (first, pieces.next()) {
        (None, _) => {}
        // Nearly every request lies in one chunk.
        (Some(piece), None) => joined.add(serve(chunks, op, piece, payload).await),
        (Some(first), Some(second)) => {
            let all = [first, second].into_iter().chain(pieces);
            let mut answers = stream::iter(all)
                .map(|piece| {
                    let data = part_of(&payload, &piece);
                    serve(chunks, op, piece, data)
                })
                .buffered(PARTS_MAX);
            while let Some(answer) = answers.next().await {
                joined.add(answer);
            }
        }
    }
    joined.finish()
}

fn shortened(range: ByteRange, limit: u64) -> ByteRange {
    ByteRange::new(range.offset(), range.length().min(limit)).unwrap_or(range)
}

/// The pieces of a range in order. Segments that are not there are one piece, unless the operation needs them.
fn pieces<C: Chunks>(chunks: &C, op: ChunkOp, range: ByteRange) -> impl Iterator<Item = Piece> {
    let needs_space = matches!(op, ChunkOp::Write | ChunkOp::WriteZeroes);
    segment_ranges(range).flat_map(move |(segment, within)| {
        let there = needs_space || chunks.allocated(segment).is_some();
        let hole = (!there).then(|| Piece::Hole(within.length()));
        let asked = there.then(|| parts(range, within).map(Piece::Part));
        hole.into_iter().chain(asked.into_iter().flatten())
    })
}

fn part_of(payload: &Bytes, piece: &Piece) -> Bytes {
    match piece {
        Piece::Part(part) if !payload.is_empty() => {
            let start = part.payload_at as usize;
            payload.slice(start..start + part.range.length() as usize)
        }
        _ => Bytes::new(),
    }
}

/// The answer to a piece: one of a chunk, or a hole's.
enum Answer {
    Chunk(PartAnswer),
    Hole(u64),
}

async fn serve<C: Chunks>(chunks: &C, op: ChunkOp, piece: Piece, payload: Bytes) -> Result<Answer, Fault> {
    let part = match piece {
        Piece::Hole(length) => return Ok(Answer::Hole(length)),
        Piece::Part(part) => part,
    };
    let copysets = match chunks.allocated(part.segment) {
        Some(copysets) => copysets,
        None => chunks.allocate(part.segment).await?,
    };
    // A segment has a copyset for each of its chunks; one that has not is the metadata server's defect.
    let copyset = *copysets.get(part.place).ok_or(Fault::Internal)?;
    chunks.execute(copyset, op, part, payload).await.map(Answer::Chunk)
}

/// The answers so far.
struct Joined {
    answer: EngineAnswer,
    fault: Option<Fault>,
}

impl Joined {
    fn new(op: ChunkOp) -> Self {
        let answer = match op {
            ChunkOp::Read | ChunkOp::Peek => EngineAnswer::Data(Vec::new()),
            ChunkOp::Status => EngineAnswer::Extents(Vec::new()),
            ChunkOp::Write | ChunkOp::WriteZeroes | ChunkOp::Discard => EngineAnswer::Done,
        };
        Self { answer, fault: None }
    }

    fn add(&mut self, answer: Result<Answer, Fault>) {
        let answer = match answer {
            Ok(answer) => answer,
            Err(fault) => {
                self.fault.get_or_insert(fault);
                return;
            }
        };
        match (&mut self.answer, answer) {
            (EngineAnswer::Data(all), Answer::Chunk(PartAnswer::Data(data))) => all.push(data),
            (EngineAnswer::Data(all), Answer::Hole(mut left)) => {
                while left > 0 {
                    let length = left.min(ZEROS.len() as u64);
                    all.push(Bytes::from_static(&ZEROS[..length as usize]));
                    left -= length;
                }
            }
            (EngineAnswer::Extents(all), Answer::Chunk(PartAnswer::Extents(extents))) => {
                extents.into_iter().for_each(|extent| Extent::push_merged(all, extent));
            }
            (EngineAnswer::Extents(all), Answer::Hole(length)) => {
                Extent::push_merged(all, Extent { length, hole: true, zero: true });
            }
            (EngineAnswer::Done, Answer::Chunk(PartAnswer::Written) | Answer::Hole(_)) => {}
            _ => {
                tracing::error!("a chunk answered an operation with something else");
                self.fault.get_or_insert(Fault::Internal);
            }
        }
    }

    fn finish(self) -> Result<EngineAnswer, Fault> {
        self.fault.map_or(Ok(self.answer), Err)
    }
}

const _: () = assert!(STATUS_BYTES_MAX.is_multiple_of(CHUNK_BYTES as u64));

#[cfg(test)]
mod tests;
