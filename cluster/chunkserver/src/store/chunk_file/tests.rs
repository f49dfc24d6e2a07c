//! Sectors that the disk can not read. `/proc/self/mem` is a file that answers EIO where nothing is mapped, as at the
//! low addresses where a chunk's blocks would lie.

use super::*;
use spline_types::{ChunkIndex, VolumeId};

fn unreadable(blocks: Range<u32>) -> Chunk {
    let id = ChunkId { volume: VolumeId::new(3), index: ChunkIndex::new(1) };
    let file = File::open("/proc/self/mem").expect("opens");
    let chunk = Chunk::fresh(id, file);
    blocks.for_each(|block| chunk.exclusive().put(block, 77));
    chunk
}

#[test]
fn the_bad_block_of_a_run_is_named() {
    let eio = || StoreError::Io(io::Error::from(Errno::IO));
    let mut part = vec![0; 4 * BLOCK];
    let read = |bad: Range<u32>| {
        move |into: &mut [u8], block: u32| {
            let end = block + (into.len() / BLOCK) as u32;
            into.fill(block as u8);
            if bad.start < end && block < bad.end { Err(eio()) } else { Ok(()) }
        }
    };
    assert_eq!(first_unreadable(8, &mut part, read(10..12)).expect("no other error"), Some(10));
    assert_eq!(part[BLOCK..2 * BLOCK], [9; BLOCK]);
    assert_eq!(first_unreadable(8, &mut part, read(12..13)).expect("no other error"), None);
    // Read well at the second try.
    let mut tries = 0;
    let once = |_: &mut [u8], _| {
        tries += 1;
        if tries == 1 { Err(eio()) } else { Ok(()) }
    };
    assert_eq!(first_unreadable(8, &mut part, once).expect("no other error"), None);
    assert_eq!(tries, 5);
    let other = first_unreadable(8, &mut part, |_, _| Err(StoreError::WouldBlock));
    assert!(matches!(other, Err(StoreError::WouldBlock)));
}

#[test]
fn an_unreadable_block_is_damaged_and_not_fatal() {
    let chunk = unreadable(2..5);
    let range = ChunkRange::new(0, 5 * CHUNK_BLOCK_BYTES).expect("inside");
    let read = chunk.read(range, Patience::Blocking);
    assert!(matches!(read, Err(StoreError::Corrupt { block: 2, .. })), "{read:?}");
    for merge in [Merge::Verified, Merge::Replaying] {
        let merged = chunk.merged(&chunk.shared(), 3, 100, &[7; 50], merge, Patience::Blocking);
        let (bytes, sound) = merged.expect("not fatal");
        assert!(!sound);
        assert_eq!(bytes[100..150], [7; 50]);
        assert!(bytes[..100].iter().chain(&bytes[150..]).all(|byte| *byte == 0));
    }
}
