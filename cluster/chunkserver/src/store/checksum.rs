//! Checksums of chunk blocks, bound to their address, and digests of whole chunks.
//!
//! Called by the store's other modules and by the snapshot. Pure. Must not know files.

use super::layout::Bitmap;
use crc_fast::{CrcAlgorithm, Digest};
use spline_types::ChunkId;
use spline_types::limits::CHUNK_BLOCK_BYTES;
use std::sync::LazyLock;

/// A block of zeros.
pub static ZERO_BLOCK: [u8; CHUNK_BLOCK_BYTES as usize] = [0; CHUNK_BLOCK_BYTES as usize];

static ZERO_CRC: LazyLock<u32> = LazyLock::new(|| crc32c(&ZERO_BLOCK));

/// CRC-32/ISCSI, also called crc32c.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The checksum kept for a block of a chunk: the crc32c of its 4096 bytes, exclusive-or that of its address, so that
/// a block which the disk returns from or wrote to a wrong place does not match. Never 0, which stands for "not
/// allocated", nor [`DAMAGED`].
pub fn of_block(id: ChunkId, block: u32, bytes: &[u8]) -> u32 {
    bound(id, block, crc32c(bytes))
}

/// The checksum kept for a block of zeros.
pub fn of_zero_block(id: ChunkId, block: u32) -> u32 {
    bound(id, block, *ZERO_CRC)
}

/// Kept for a block whose content is known to be damaged: matches nothing.
pub const DAMAGED: u32 = 1;

fn bound(id: ChunkId, block: u32, crc: u32) -> u32 {
    let mut address = [0; 16];
    address[..8].copy_from_slice(&id.volume.get().to_le_bytes());
    address[8..12].copy_from_slice(&id.index.get().to_le_bytes());
    address[12..].copy_from_slice(&block.to_le_bytes());
    match crc ^ crc32c(&address) {
        reserved @ (0 | DAMAGED) => reserved + 2,
        sum => sum,
    }
}

/// CRC-64/NVME over bitmap and checksum table: equal digests of one chunk mean equal content.
pub fn digest(bitmap: &Bitmap, table: &[u32]) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    for word in bitmap.words() {
        digest.update(&word.to_le_bytes());
    }
    for (block, sum) in (0u32..).zip(table) {
        if bitmap.get(block) {
            digest.update(&sum.to_le_bytes());
        }
    }
    digest.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use spline_types::{ChunkIndex, VolumeId};

    #[test]
    fn a_checksum_is_bound_to_its_address() {
        let id = ChunkId { volume: VolumeId::new(1), index: ChunkIndex::new(2) };
        let other = ChunkId { volume: VolumeId::new(1), index: ChunkIndex::new(3) };
        let sum = of_block(id, 7, &ZERO_BLOCK);
        assert_eq!(sum, of_zero_block(id, 7));
        assert_ne!(sum, of_block(id, 8, &ZERO_BLOCK));
        assert_ne!(sum, of_block(other, 7, &ZERO_BLOCK));
    }

    #[test]
    fn the_polynomial_is_castagnoli() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }
}
