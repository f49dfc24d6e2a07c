//! Blocks that tell which block they are and which write made them, in every word.

/// Bytes of a block.
pub const BYTES: usize = 4096;

/// The bytes of write number `version` of block `block`; version 0 is a block that was never written.
pub fn fill(block: u64, version: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(BYTES);
    if version == 0 {
        out.resize(BYTES, 0);
        return out;
    }
    out.extend(block.to_le_bytes());
    out.extend(version.to_le_bytes());
    let mut word = 0u64;
    while out.len() < BYTES {
        out.extend(mix(block, version, word).to_le_bytes());
        word += 1;
    }
    out
}

/// Which write of `block` made these bytes.
///
/// # Errors
/// If no single write did: bytes of another block, or of two writes.
pub fn read(block: u64, bytes: &[u8]) -> Result<u64, String> {
    let version = match bytes.get(8..16).and_then(|version| version.try_into().ok()) {
        Some(version) => u64::from_le_bytes(version),
        None => return Err(format!("block is too short: bytes={}", bytes.len())),
    };
    let wanted = fill(block, version);
    match bytes.iter().zip(&wanted).position(|(found, wanted)| found != wanted) {
        None if bytes.len() == BYTES => Ok(version),
        place => Err(format!(
            "block holds what no write made: block={block} version={version} differs_at={place:?}"
        )),
    }
}

fn mix(block: u64, version: u64, word: u64) -> u64 {
    let mut z = block.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version.wrapping_mul(0xd134_2543_de82_ef95);
    z = z.wrapping_add(word.wrapping_mul(0xa076_1d64_78bd_642f));
    z = (z ^ (z >> 32)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_what_it_is() {
        assert_eq!(read(7, &fill(7, 3)), Ok(3));
        assert_eq!(read(7, &vec![0; BYTES]), Ok(0));
        assert!(read(8, &fill(7, 3)).is_err(), "a block in the wrong place");
        assert!(read(7, &fill(7, 3)[..512]).is_err());
        let mut torn = fill(7, 3);
        torn[2048..].copy_from_slice(&fill(7, 4)[2048..]);
        assert!(read(7, &torn).is_err(), "half of one write, half of another");
        let mut damaged = fill(7, 3);
        damaged[BYTES - 1] ^= 1;
        assert!(read(7, &damaged).is_err());
    }
}
