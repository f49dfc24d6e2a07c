//! Mends a damaged block: asks the peers for it, and takes bytes that match the checksum kept here.
//!
//! Called by the copyset when a read finds damage. Must not know: who reads, what a session is.
//! However far a peer has applied the log: bytes that match the checksum which this replica computed when it applied
//! the block's last write are what that write left (`replicas_identical`).

use crate::state_machine::Shared;
use bytes::Bytes;
use spline_raft::NodeId;
use spline_types::limits::CHUNK_BLOCK_BYTES;
use spline_types::{ChunkCommand, ChunkId, ChunkOp, ChunkRange, Epoch, FenceTag, Seq};
use spline_wire::chunk::{Reply, encode_request};
use spline_wire::{Caller, Kind};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Longest wait for one peer; damage is rare, so each time a connection is made for it.
const PEEK_LIMIT: Duration = Duration::from_secs(1);

/// Asks `peers` in turn until one has the block of `chunk`; writes it. Returns whether it is mended.
pub async fn mend(
    shared: &Arc<Shared>,
    peers: impl Iterator<Item = NodeId>,
    book: &HashMap<NodeId, SocketAddr>,
    chunk: ChunkId,
    block: u32,
) -> bool {
    for (peer, address) in peers.filter_map(|peer| Some((peer, *book.get(&peer)?))) {
        let Some(bytes) = peek(shared, address, chunk, block).await else { continue };
        let to = Arc::clone(shared);
        let written = tokio::task::spawn_blocking(move || to.store.mend(chunk, block, &bytes)).await;
        match written {
            Ok(Ok(true)) => {
                shared.metrics.mended.inc();
                tracing::warn!(copyset = %shared.copyset, %chunk, block, from = %peer, "damaged block is mended");
                return true;
            }
            // It has another version of the block, or the block was written anew meanwhile.
            Ok(Ok(false)) | Err(_) => {}
            Ok(Err(error)) => {
                tracing::error!(copyset = %shared.copyset, %chunk, block, %error, "could not mend a damaged block");
                return false;
            }
        }
    }
    false
}

async fn peek(shared: &Shared, address: SocketAddr, chunk: ChunkId, block: u32) -> Option<Bytes> {
    let range = ChunkRange::new(block * CHUNK_BLOCK_BYTES, CHUNK_BLOCK_BYTES)?;
    let fence = FenceTag { epoch: Epoch::default(), seq: Seq::default(), floor: Seq::default() };
    let command = ChunkCommand { copyset: shared.copyset, chunk, op: ChunkOp::Peek, range, fence };
    let deadline = tokio::time::Instant::now() + PEEK_LIMIT;
    let call = Caller::new(address);
    let frame = call.call(Kind::ChunkRequest, encode_request(&command), Vec::new(), deadline).await.ok()?;
    Reply::decode(&frame.meta).ok()?.result.ok()?;
    Some(frame.into_payload())
}
