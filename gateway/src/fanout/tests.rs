//! Fan-out over a volume whose chunks lie in memory.

use super::*;
use spline_types::{BlockOp, ChunkIndex, RequestId};
use std::collections::{HashMap, HashSet};
use std::sync::Mutex;

/// Chunks in memory; a chunk's copyset is its index plus 1.
#[derive(Default)]
struct Memory {
    segments: Mutex<HashSet<SegmentIndex>>,
    chunks: Mutex<HashMap<ChunkIndex, Vec<u8>>>,
    asked: Mutex<Vec<(ChunkOp, ChunkIndex)>>,
    broken: Option<ChunkIndex>,
}

fn copysets(segment: SegmentIndex) -> Arc<[CopysetId]> {
    (0..64).map(|place| CopysetId::new(segment.get() * 64 + place + 1)).collect()
}

impl Chunks for Memory {
    fn allocated(&self, segment: SegmentIndex) -> Option<Arc<[CopysetId]>> {
        self.segments.lock().expect("unpoisoned").contains(&segment).then(|| copysets(segment))
    }

    async fn allocate(&self, segment: SegmentIndex) -> Result<Arc<[CopysetId]>, Fault> {
        tokio::task::yield_now().await;
        self.segments.lock().expect("unpoisoned").insert(segment);
        Ok(copysets(segment))
    }

    async fn execute(
        &self,
        copyset: CopysetId,
        op: ChunkOp,
        part: Part,
        payload: Bytes,
    ) -> Result<PartAnswer, Fault> {
        tokio::task::yield_now().await;
        assert_eq!(copyset.get(), part.chunk.get() + 1, "asked the wrong copyset");
        self.asked.lock().expect("unpoisoned").push((op, part.chunk));
        if self.broken == Some(part.chunk) {
            return Err(Fault::Corrupt);
        }
        let mut chunks = self.chunks.lock().expect("unpoisoned");
        let known = chunks.contains_key(&part.chunk);
        let range = part.range.offset() as usize..part.range.end() as usize;
        let chunk = chunks.entry(part.chunk).or_insert_with(|| vec![0; CHUNK_BYTES as usize]);
        Ok(match op {
            ChunkOp::Read | ChunkOp::Peek => PartAnswer::Data(Bytes::copy_from_slice(&chunk[range])),
            ChunkOp::Write => {
                chunk[range].copy_from_slice(&payload);
                PartAnswer::Written
            }
            ChunkOp::WriteZeroes | ChunkOp::Discard => {
                chunk[range].fill(0);
                PartAnswer::Written
            }
            ChunkOp::Status => {
                let length = part.range.length().into();
                PartAnswer::Extents(vec![Extent { length, hole: !known, zero: !known }])
            }
        })
    }
}

fn request(op: BlockOp, offset: u64, length: u64) -> BlockRequest {
    BlockRequest {
        id: RequestId::new(1),
        op,
        range: ByteRange::new(offset, length).expect("fits"),
        fua: false,
    }
}

async fn read(memory: &Memory, offset: u64, length: u64) -> Vec<u8> {
    match execute(memory, request(BlockOp::Read, offset, length), Bytes::new()).await {
        Ok(EngineAnswer::Data(parts)) => parts.concat(),
        other => panic!("read answered {other:?}"),
    }
}

#[tokio::test]
async fn a_request_over_several_chunks_is_one() {
    let memory = Memory::default();
    let start = SEGMENT_BYTES - 5000;
    let data: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
    let written = execute(&memory, request(BlockOp::Write, start, 20_000), data.clone().into()).await;
    assert_eq!(written, Ok(EngineAnswer::Done));
    assert_eq!(memory.segments.lock().expect("unpoisoned").len(), 2);
    assert!(read(&memory, start, 20_000).await == data);
    let around = read(&memory, start - 10, 20_020).await;
    assert!(around[..10] == [0; 10] && around[10..20_010] == data && around[20_010..] == [0; 10]);
    let large = 2 * u64::from(CHUNK_BYTES);
    assert_eq!(read(&memory, start - large / 2, large).await.len() as u64, large);
}

#[tokio::test]
async fn segments_that_are_not_there_cost_no_io() {
    let memory = Memory::default();
    assert!(read(&memory, 5, 3 << 20).await.iter().all(|byte| *byte == 0));
    for op in [
        BlockOp::Discard,
        BlockOp::WriteZeroes { no_hole: false, fast: true },
        BlockOp::Flush,
        BlockOp::Cache,
    ] {
        let range = if op == BlockOp::Flush { 0 } else { 60 << 40 };
        assert_eq!(execute(&memory, request(op, 0, range), Bytes::new()).await, Ok(EngineAnswer::Done));
    }
    let status = execute(&memory, request(BlockOp::Status, 4096, 60 << 40), Bytes::new()).await;
    let hole = Extent { length: STATUS_BYTES_MAX, hole: true, zero: true };
    assert_eq!(status, Ok(EngineAnswer::Extents(vec![hole])));
    assert!(memory.asked.lock().expect("unpoisoned").is_empty());
    assert!(memory.segments.lock().expect("unpoisoned").is_empty());
    let keep = BlockOp::WriteZeroes { no_hole: true, fast: false };
    assert_eq!(execute(&memory, request(keep, 0, 4096), Bytes::new()).await, Ok(EngineAnswer::Done));
    assert_eq!(memory.segments.lock().expect("unpoisoned").len(), 1, "space that is to be kept is allocated");
}

#[tokio::test]
async fn extents_of_chunks_and_holes_are_joined() {
    let memory = Memory::default();
    let chunk = u64::from(CHUNK_BYTES);
    let data = Bytes::from(vec![1; 4096]);
    execute(&memory, request(BlockOp::Write, chunk, 4096), data).await.expect("writes");
    let status = execute(&memory, request(BlockOp::Status, 0, SEGMENT_BYTES + chunk), Bytes::new()).await;
    let hole = |length| Extent { length, hole: true, zero: true };
    let data = Extent { length: chunk, hole: false, zero: false };
    let expected = vec![hole(chunk), data, hole(SEGMENT_BYTES - chunk)];
    assert_eq!(status, Ok(EngineAnswer::Extents(expected)));
}

#[tokio::test]
async fn a_fault_of_one_part_waits_for_the_others() {
    let memory = Memory { broken: Some(ChunkIndex::new(1)), ..Memory::default() };
    let length = 3 * u64::from(CHUNK_BYTES);
    let written = execute(&memory, request(BlockOp::Discard, 0, length), Bytes::new()).await;
    assert_eq!(written, Ok(EngineAnswer::Done), "nothing is allocated, nothing is asked");
    memory.allocate(SegmentIndex::new(0)).await.expect("allocates");
    let discarded = execute(&memory, request(BlockOp::Discard, 0, length), Bytes::new()).await;
    assert_eq!(discarded, Err(Fault::Corrupt));
    assert_eq!(memory.asked.lock().expect("unpoisoned").len(), 3, "all parts have ended");
}
