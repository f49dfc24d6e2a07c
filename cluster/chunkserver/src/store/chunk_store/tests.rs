//! The store against a model, with crashes: in-memory tables dropped, the log since the checkpoint applied again.

use super::*;
use crate::store::Pool;
use crate::store::layout::{DATA_AT, SLOT_BYTES};
use prometheus_client::metrics::counter::Counter;
use proptest::prelude::*;
use std::os::unix::fs::FileExt;

const AREA: usize = 64 << 10;

#[derive(Clone, Debug)]
enum Op {
    Write(u32, u32, u8),
    Zero(u32, u32),
    Discard(u32, u32),
    DiscardAll,
    Checkpoint,
    /// Whether the header and table of dirty chunks reached the file before the crash.
    Crash(bool),
}

struct Bench {
    dir: tempfile::TempDir,
    pool: Arc<Pool>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let pool = Pool::open(&dir.path().join("pool"), 2, 0, 0).expect("pool");
        Self { dir, pool }
    }

    fn chunks(&self) -> PathBuf {
        self.dir.path().join("chunks")
    }

    fn store(&self, recorded: &[ChunkId]) -> ChunkStore {
        let disk = Disk::new(Arc::clone(&self.pool), 16, Counter::default());
        ChunkStore::open(disk, CopysetId::new(1), &self.chunks(), recorded).expect("opens")
    }
}

fn id() -> ChunkId {
    ChunkId { volume: VolumeId::new(3), index: ChunkIndex::new(1) }
}

fn range(offset: u32, length: u32) -> ChunkRange {
    ChunkRange::new(offset, length).expect("inside")
}

fn apply(store: &ChunkStore, op: &Op, merge: Merge) {
    let done = match *op {
        Op::Write(at, len, byte) => {
            store.write(id(), range(at, len), &vec![byte; len as usize], merge, Patience::Blocking)
        }
        Op::Zero(at, len) => store.write_zeroes(id(), range(at, len), merge, Patience::Blocking),
        Op::Discard(at, len) => store.discard(id(), range(at, len), merge, Patience::Blocking),
        Op::DiscardAll => store.discard(id(), ChunkRange::whole(), merge, Patience::Blocking),
        Op::Checkpoint | Op::Crash(_) => Ok(()),
    };
    done.expect("applies");
}

fn apply_model(model: &mut [u8], op: &Op) {
    match *op {
        Op::Write(at, len, byte) => model[at as usize..(at + len) as usize].fill(byte),
        Op::Zero(at, len) | Op::Discard(at, len) => model[at as usize..(at + len) as usize].fill(0),
        Op::DiscardAll => model.fill(0),
        Op::Checkpoint | Op::Crash(_) => {}
    }
}

fn op() -> impl Strategy<Value = Op> {
    let place = (0u32..AREA as u32, 1u32..20_000).prop_map(|(at, len)| (at, len.min(AREA as u32 - at)));
    prop_oneof![
        5 => (place.clone(), 1u8..).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        1 => place.clone().prop_map(|(at, len)| Op::Zero(at, len)),
        2 => place.prop_map(|(at, len)| Op::Discard(at, len)),
        1 => Just(Op::DiscardAll),
        2 => Just(Op::Checkpoint),
        2 => any::<bool>().prop_map(Op::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_store_is_a_byte_array_that_survives_crashes(ops in prop::collection::vec(op(), 1..40)) {
        let bench = Bench::new();
        let mut recorded = Vec::new();
        let mut store = bench.store(&recorded);
        let mut model = vec![0; AREA];
        let mut since = Vec::new();
        for op in &ops {
            match op {
                Op::Checkpoint => {
                    let unsynced = store.unsynced();
                    unsynced.sync().expect("syncs");
                    recorded = unsynced.present;
                    since.clear();
                }
                Op::Crash(persisted) => {
                    if *persisted {
                        store.unsynced().chunks.iter().for_each(|chunk| assert!(chunk.persist().expect("writes").is_some()));
                    }
                    store = bench.store(&recorded);
                    since.iter().for_each(|op| apply(&store, op, Merge::Replaying));
                }
                op => {
                    apply(&store, op, Merge::Verified);
                    apply_model(&mut model, op);
                    since.push(op.clone());
                }
            }
            let whole = range(0, AREA as u32);
            prop_assert!(store.read(id(), whole, Patience::Blocking).expect("reads") == model);
            let extents = store.extents(id(), whole, Patience::Blocking).expect("extents");
            let mut at = 0;
            for extent in extents {
                let end = at + extent.length as usize;
                prop_assert!(!extent.zero || model[at..end].iter().all(|byte| *byte == 0));
                at = end;
            }
            prop_assert_eq!(at, AREA);
        }
    }
}

#[test]
fn damage_is_seen_and_never_spread() {
    let bench = Bench::new();
    let store = bench.store(&[]);
    apply(&store, &Op::Write(0, 16_384, 5), Merge::Verified);
    let file = OpenOptions::new().write(true).open(bench.chunks().join(file_name(id()))).expect("opens");
    file.write_all_at(&[6], DATA_AT + 4096 + 77).expect("flips");
    let read = |at, len| store.read(id(), range(at, len), Patience::Blocking);
    assert!(matches!(read(0, 16_384), Err(StoreError::Corrupt { block: 1, .. })));
    assert_eq!(read(8192, 100).expect("another block is sound"), vec![5; 100]);
    // Writing a part of the damaged block must not make the rest of it look sound, not even after a restart.
    apply(&store, &Op::Write(4096, 512, 7), Merge::Verified);
    assert!(matches!(read(4096, 512), Err(StoreError::Corrupt { .. })));
    apply(&store, &Op::Write(4096, 512, 7), Merge::Replaying);
    assert!(matches!(read(4096, 512), Err(StoreError::Corrupt { .. })));
    assert_eq!(store.disk().damaged.get(), 5);
    apply(&store, &Op::Write(4096, 4096, 8), Merge::Verified);
    assert_eq!(read(4096, 4096).expect("written whole"), vec![8; 4096]);
}

#[test]
fn a_damaged_block_is_mended_by_the_right_bytes_only() {
    let bench = Bench::new();
    let store = bench.store(&[]);
    apply(&store, &Op::Write(0, 16_384, 7), Merge::Verified);
    let file = OpenOptions::new().write(true).open(bench.chunks().join(file_name(id()))).expect("opens");
    file.write_all_at(&[8], DATA_AT + 4096 + 77).expect("damages");
    let read = || store.read(id(), range(0, 16_384), Patience::Blocking);
    assert!(matches!(read(), Err(StoreError::Corrupt { block: 1, .. })));
    for wrong in [vec![8; 4096], vec![7; 4095], vec![0; 4096], Vec::new()] {
        assert!(!store.mend(id(), 1, &wrong).expect("compares"));
    }
    assert!(!store.mend(id(), 9, &[0; 4096]).expect("was never written"));
    assert!(store.mend(id(), 1, &[7; 4096]).expect("writes"));
    assert_eq!(read().expect("is sound"), vec![7; 16_384]);

    // Of a block that was written in part while it was damaged nobody knows the checksum.
    file.write_all_at(&[8], DATA_AT + 4096 + 77).expect("damages");
    apply(&store, &Op::Write(4096, 512, 9), Merge::Verified);
    assert!(!store.mend(id(), 1, &[7; 4096]).expect("compares"));
}

#[test]
fn a_torn_header_loses_nothing_and_a_lost_one_is_seen() {
    let bench = Bench::new();
    let mut recorded = Vec::new();
    for byte in [1, 2] {
        let store = bench.store(&recorded);
        apply(&store, &Op::Write(0, 4096, byte), Merge::Verified);
        let unsynced = store.unsynced();
        unsynced.sync().expect("syncs");
        recorded = unsynced.present;
    }
    let file = OpenOptions::new().write(true).open(bench.chunks().join(file_name(id()))).expect("opens");
    // Generation 2 lies in slot 1.
    file.write_all_at(&[0xFF; 64], SLOT_BYTES + 60).expect("tears");
    let read = |at| bench.store(&recorded).read(id(), range(at, 4096), Patience::Blocking);
    assert_eq!(read(0).expect("slot 0 is sound"), vec![2; 4096]);
    assert_eq!(read(4096).expect("never written"), vec![0; 4096]);
    file.write_all_at(&[0xFF; 64], 60).expect("damages");
    assert_eq!(read(0).expect("matches its checksum"), vec![2; 4096]);
    assert!(matches!(read(4096), Err(StoreError::Corrupt { .. })));
}

#[test]
fn volumes_are_counted_and_deleted() {
    let bench = Bench::new();
    let store = bench.store(&[]);
    let chunk = |volume, index| ChunkId { volume: VolumeId::new(volume), index: ChunkIndex::new(index) };
    for (volume, index) in [(1, 0), (1, 1), (2, 0)] {
        let done = store.write(chunk(volume, index), range(0, 1), &[1], Merge::Verified, Patience::Blocking);
        done.expect("writes");
    }
    let bytes = u64::from(CHUNK_BYTES);
    assert_eq!(store.usage(), [(VolumeId::new(1), 2 * bytes), (VolumeId::new(2), bytes)]);
    store.delete_volume(VolumeId::new(1)).expect("deletes");
    assert_eq!(store.present(), [chunk(2, 0)]);
    assert_eq!(list(&bench.chunks()).expect("lists").len(), 1);
    let zeros = store.read(chunk(1, 0), range(0, 10), Patience::Blocking).expect("reads");
    assert_eq!(zeros, [0; 10]);
}

#[test]
fn a_chunk_that_is_discarded_in_part_keeps_its_space() {
    use std::os::unix::fs::MetadataExt;

    let bench = Bench::new();
    let store = bench.store(&[]);
    let space = || std::fs::metadata(bench.chunks().join(file_name(id()))).map(|file| file.blocks());
    apply(&store, &Op::Write(0, 1 << 20, 5), Merge::Verified);
    let before = space().expect("exists");
    apply(&store, &Op::Discard(4096, (1 << 20) - 4096), Merge::Verified);
    assert_eq!(space().expect("exists"), before);
    let read = store.read(id(), range(0, 8192), Patience::Blocking).expect("reads");
    assert!(read[..4096].iter().all(|byte| *byte == 5) && read[4096..].iter().all(|byte| *byte == 0));
    // A part of a block that was given up lies among zeros, whatever the file holds.
    apply(&store, &Op::Write(8192, 1, 6), Merge::Verified);
    let read = store.read(id(), range(8192, 4096), Patience::Blocking).expect("reads");
    assert!(read[0] == 6 && read[1..].iter().all(|byte| *byte == 0));
    apply(&store, &Op::Discard(0, 1 << 20), Merge::Verified);
    assert!(space().is_err(), "its last block is gone");
}
