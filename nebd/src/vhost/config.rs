//! What the device offers and what its config space says (virtio 1.2, 5.2.3 and 5.2.4), from the export.
//!
//! Called by `device`. Must not know: messages, queues at work.

use super::queue::{FEATURE_EVENT_INDEX, FEATURE_INDIRECT};
use super::request::{RANGE_BYTES_MAX, SECTOR_BYTES};
use crate::export::Export;
use spline_types::limits::CHUNK_BLOCK_BYTES;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VHOST_USER_F_PROTOCOL_FEATURES: not the driver's; queues start disabled once a front-end has accepted it.
pub const PROTOCOL: u64 = 1 << 30;
/// VHOST_F_LOG_ALL: what is written to the guest is marked in the log.
pub const LOG_ALL: u64 = 1 << 26;

/// VIRTIO_F_ANY_LAYOUT: what every device of version 1 does.
pub const ANY_LAYOUT: u64 = 1 << 27;

/// VIRTIO_BLK_F_SIZE_MAX.
pub const SIZE_MAX: u64 = 1 << 1;
/// VIRTIO_BLK_F_SEG_MAX.
pub const SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO.
pub const READ_ONLY: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE.
pub const BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub const FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_TOPOLOGY.
pub const TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_MQ.
pub const MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub const DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const WRITE_ZEROES: u64 = 1 << 14;

/// VHOST_USER_PROTOCOL_F_MQ.
pub const PROTOCOL_MQ: u64 = 1 << 0;
/// VHOST_USER_PROTOCOL_F_LOG_SHMFD.
pub const PROTOCOL_LOG_SHMFD: u64 = 1 << 1;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK.
pub const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
/// VHOST_USER_PROTOCOL_F_BACKEND_REQ.
pub const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
/// VHOST_USER_PROTOCOL_F_CONFIG.
pub const PROTOCOL_CONFIG: u64 = 1 << 9;
/// VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD.
pub const PROTOCOL_INFLIGHT_SHMFD: u64 = 1 << 12;
/// VHOST_USER_PROTOCOL_F_RESET_DEVICE.
pub const PROTOCOL_RESET_DEVICE: u64 = 1 << 13;
/// VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS.
pub const PROTOCOL_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

/// Everything of the protocol that we have.
pub const PROTOCOL_FEATURES: u64 = PROTOCOL_MQ
    | PROTOCOL_LOG_SHMFD
    | PROTOCOL_REPLY_ACK
    | PROTOCOL_BACKEND_REQ
    | PROTOCOL_CONFIG
    | PROTOCOL_INFLIGHT_SHMFD
    | PROTOCOL_RESET_DEVICE
    | PROTOCOL_CONFIGURE_MEM_SLOTS;

/// Bytes of the config space: as much as a front-end may ask for (VHOST_USER_MAX_CONFIG_SIZE). Fields of features that we do
/// not offer are zeros.
pub const CONFIG_BYTES: usize = 256;
/// Bytes of one segment of a request, and segments of one request, so that a request stays below what the gateway takes.
const SEGMENT_BYTES_MAX: u32 = 256 << 10;
const SEGMENTS_MAX: u32 = 126;

const _: () =
    assert!(SEGMENT_BYTES_MAX as u64 * SEGMENTS_MAX as u64 <= spline_types::limits::REQUEST_BYTES_MAX as u64);

/// The config space.
pub type ConfigSpace = [u8; CONFIG_BYTES];

/// What the driver and the front-end may accept.
pub fn features(export: &Export) -> u64 {
    let mut features = VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_INDEX | PROTOCOL | LOG_ALL;
    features |= SIZE_MAX | SEG_MAX | BLK_SIZE | TOPOLOGY | MQ;
    if export.traits.volatile_cache {
        features |= FLUSH;
    }
    features | if export.read_only { READ_ONLY } else { DISCARD | WRITE_ZEROES }
}

/// What the guest reads of the device. Little-endian; sectors have 512 bytes whatever the block size.
pub fn config_space(export: &Export, queues: u16) -> ConfigSpace {
    let block = export.geometry.block_size.bytes();
    let physical = CHUNK_BLOCK_BYTES.max(block);
    let range_sectors = u32::try_from(RANGE_BYTES_MAX / SECTOR_BYTES).unwrap_or(u32::MAX);
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(export.geometry.size / SECTOR_BYTES).to_le_bytes()); // capacity
    put(8, &SEGMENT_BYTES_MAX.to_le_bytes()); // size_max
    put(12, &SEGMENTS_MAX.to_le_bytes()); // seg_max
    put(20, &block.to_le_bytes()); // blk_size
    put(24, &[(physical / block).ilog2() as u8, 0]); // topology: physical_block_exp, alignment_offset
    put(26, &((physical / block) as u16).to_le_bytes()); // min_io_size, blocks
    put(32, &[u8::from(export.traits.volatile_cache)]); // writeback
    put(34, &queues.to_le_bytes()); // num_queues
    if !export.read_only {
        put(36, &range_sectors.to_le_bytes()); // max_discard_sectors
        put(40, &1u32.to_le_bytes()); // max_discard_seg
        put(44, &(u64::from(physical) / SECTOR_BYTES).to_le_bytes()[..4]); // discard_sector_alignment
        put(48, &range_sectors.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;
    use spline_link::VolumeTraits;
    use spline_types::{BlockSize, Geometry};

    fn export(block_size: BlockSize) -> Export {
        Export {
            name: "disk0".into(),
            description: String::new(),
            geometry: Geometry { size: 1 << 40, block_size },
            traits: VolumeTraits::default(),
            read_only: false,
        }
    }

    #[test]
    fn golden_config_space() {
        let space = config_space(&export(BlockSize::B512), 4);
        #[rustfmt::skip]
        assert_eq!(space[..60], [
            0, 0, 0, 128, 0, 0, 0, 0,  0, 0, 4, 0,  126, 0, 0, 0,  0, 0, 0, 0,
            0, 2, 0, 0,  3, 0, 8, 0, 0, 0, 0, 0,  0, 0,  4, 0,
            0, 0, 32, 0,  1, 0, 0, 0,  8, 0, 0, 0,  0, 0, 32, 0,  1, 0, 0, 0,  1, 0, 0, 0,
        ]);
        assert_eq!(space[60..], [0; 196]);
        let space = config_space(&export(BlockSize::B4096), 1);
        assert_eq!(space[20..32], [0, 16, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn what_is_offered_follows_the_volume() {
        let mut export = export(BlockSize::B4096);
        assert_eq!(features(&export), 0x1_7400_7446);
        export.traits.volatile_cache = true;
        assert_eq!(features(&export), 0x1_7400_7646);
        assert_eq!(config_space(&export, 1)[32], 1);
        export.read_only = true;
        assert_eq!(features(&export), 0x1_7400_1666);
        assert_eq!(config_space(&export, 1)[36..60], [0; 24]);
        assert_eq!(PROTOCOL_FEATURES, 0xb22b);
    }
}
