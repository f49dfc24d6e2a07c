//! Limits and fixed sizes that several crates share, with the relations between them checked at compile time.

/// Bytes of a chunk.
pub const CHUNK_BYTES: u32 = 16 << 20;
/// Chunks of a segment; a segment is what the metadata server allocates at once.
pub const SEGMENT_CHUNKS: u32 = 64;
/// Bytes of a segment.
pub const SEGMENT_BYTES: u64 = CHUNK_BYTES as u64 * SEGMENT_CHUNKS as u64;
/// Bytes of a checksummed block of a chunk; writes of less are merged by the chunkserver.
pub const CHUNK_BLOCK_BYTES: u32 = 4096;
/// Blocks of a chunk.
pub const CHUNK_BLOCKS: u32 = CHUNK_BYTES / CHUNK_BLOCK_BYTES;
/// Smallest volume, bytes.
pub const VOLUME_BYTES_MIN: u64 = 1 << 20;
/// Largest volume, bytes (64 TiB): its chunk index still fits 32 bits with room to spare.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;
/// Largest data of one request, bytes; NBD clients are told so, larger requests are refused.
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Requests of one volume in flight; more wait at the door (`bounded`).
pub const VOLUME_INFLIGHT_REQUESTS: usize = 1024;
/// Bytes of one volume in flight (`bounded`).
pub const VOLUME_INFLIGHT_BYTES: u64 = 64 << 20;
/// Longest volume name, bytes: below NBD's 4096 and what humans type.
pub const VOLUME_NAME_BYTES_MAX: usize = 255;
/// Copies of each chunk.
pub const REPLICAS: usize = 3;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(CHUNK_BLOCK_BYTES));
const _: () = assert!(VOLUME_BYTES_MAX / CHUNK_BYTES as u64 <= u32::MAX as u64);
const _: () = assert!(REQUEST_BYTES_MAX as u64 <= VOLUME_INFLIGHT_BYTES);
