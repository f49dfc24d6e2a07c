//! Lanes over real files, direct and buffered, with the data in real shared memory.

use super::*;
use crate::buffer::BufferPool;
use crate::config::FileIo;
use crate::engine::file::job::Descriptors;
use crate::engine::file::{FileEngine, Files};
use crate::engine::{Engine, EngineAnswer, Wanted};
use crate::shared::Regions;
use bytes::Bytes;
use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use spline_link::memory::SharedMemory;
use spline_link::ring::Piece;
use spline_types::{ByteRange, RequestId};
use std::future::poll_fn;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

const SIZE: u64 = 4 << 20;
/// Bytes of shared memory.
const MEMORY: usize = 8 << 20;

fn open(dir: &Path, name: &str, io: FileIo) -> (PathBuf, FileEngine) {
    let path = dir.join(name);
    std::fs::File::create(&path).expect("creates").set_len(SIZE).expect("sizes");
    let files = Files::new(vec![dir.to_owned()], io, BufferPool::new());
    let engine = files.open(&path, Wanted::default()).expect("opens");
    (path, engine)
}

/// An engine of each kind with a lane; none where a sandbox forbids io_uring, which the general path is for.
fn lanes(dir: &Path) -> Vec<(PathBuf, FileEngine, FileLane)> {
    [(FileIo::Direct, "direct"), (FileIo::Buffered, "buffered")]
        .into_iter()
        .filter_map(|(io, name)| {
            let (path, engine) = open(dir, name, io);
            let lane = FileLane::start(&engine.disk);
            assert_eq!(lane.is_some(), matches!(engine.disk.executor, Executor::Ring(_)));
            Some((path, engine, lane?))
        })
        .collect()
}

/// An engine whose file is the reading end of a pipe: what is read from it stays in the kernel until something is written.
fn pipe(dir: &Path) -> Option<(FileEngine, FileLane, std::io::PipeWriter)> {
    let (_, mut engine) = open(dir, "pipe", FileIo::Buffered);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let disk = Arc::get_mut(&mut engine.disk).expect("nobody else has it");
    disk.files = Arc::new(Descriptors { buffered: reader.into(), direct: None });
    let lane = FileLane::start(&engine.disk)?;
    Some((engine, lane, writer))
}

fn memory() -> Arc<Regions> {
    let memory = SharedMemory::create("lane", MEMORY).expect("creates");
    Arc::new(Regions::default().with(1, memory).expect("new"))
}

fn data(regions: &Arc<Regions>, pieces: &[(u64, u32)]) -> SharedData {
    let pieces: Vec<Piece> =
        pieces.iter().map(|&(offset, length)| Piece { region: 1, length, offset }).collect();
    SharedData::new(regions, &pieces).expect("there")
}

fn request(op: BlockOp, offset: u64, length: u64) -> BlockRequest {
    let range = ByteRange::new(offset, length).expect("fits");
    BlockRequest { id: RequestId::new(1), op, range, fua: false }
}

fn bytes_of(data: &SharedData) -> Vec<u8> {
    let mut bytes = vec![0; data.len()];
    data.copy_out(&mut bytes).expect("there");
    bytes
}

/// Polls until `count` have ended.
async fn ended(lane: &mut FileLane, count: usize) -> Vec<Ended> {
    let mut all = Vec::new();
    while all.len() < count {
        poll_fn(|cx| lane.poll(cx, &mut all)).await;
    }
    assert_eq!(all.len(), count, "each ends once");
    all
}

/// Carries one request out in the lane.
async fn run(lane: &mut FileLane, request: BlockRequest, data: SharedData) -> Result<(), Fault> {
    assert!(lane.begin(7, &request, data).is_ok(), "is served: {request:?}");
    assert!(!lane.is_idle());
    let ended = ended(lane, 1).await;
    assert!(lane.is_idle());
    assert_eq!(ended[0].0, 7);
    ended[0].1
}

async fn read(engine: &FileEngine, offset: u64, length: u64) -> Vec<u8> {
    match engine.execute(request(BlockOp::Read, offset, length), Bytes::new()).await {
        Ok(EngineAnswer::Data(parts)) => parts.concat(),
        other => panic!("read answered {other:?}"),
    }
}

#[tokio::test]
async fn what_a_lane_writes_is_read_and_the_other_way_round() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (path, engine, mut lane) in lanes(dir.path()) {
        let regions = memory();
        // Pieces of the kind that guests have: any place, whole sectors.
        for pieces in [vec![(0, 8192)], vec![(65_536, 4096), (0, 512), (1024, 3584)], vec![(512, 8192)]] {
            let source = data(&regions, &pieces);
            let bytes: Vec<u8> = (0..8192).map(|i| (i * pieces.len() / 3) as u8).collect();
            source.copy_in(0, &bytes).expect("there");
            for fua in [false, true] {
                let write = BlockRequest { fua, ..request(BlockOp::Write, 12_288, 8192) };
                assert_eq!(run(&mut lane, write, data(&regions, &pieces)).await, Ok(()));
            }
            assert!(read(&engine, 12_288, 8192).await == bytes);
            let place: Vec<(u64, u32)> =
                pieces.iter().map(|(at, length)| (at + (1 << 20), *length)).collect();
            let target = request(BlockOp::Read, 12_288, 8192);
            assert_eq!(run(&mut lane, target, data(&regions, &place)).await, Ok(()));
            assert!(bytes_of(&data(&regions, &place)) == bytes);
        }
        // Not whole pages: through the page cache.
        data(&regions, &[(3, 700)]).copy_in(0, &[9; 700]).expect("there");
        let small = request(BlockOp::Write, 20_000, 700);
        assert_eq!(run(&mut lane, small, data(&regions, &[(3, 700)])).await, Ok(()));
        assert!(read(&engine, 20_000, 700).await == [9; 700]);
        assert_eq!(run(&mut lane, request(BlockOp::Flush, 0, 0), data(&regions, &[])).await, Ok(()));
        engine.close().await;
        assert!(std::fs::read(&path).expect("reads")[20_000..20_700] == [9; 700]);
        let late = lane.begin(1, &request(BlockOp::Read, 0, 4096), data(&regions, &[(0, 4096)]));
        assert_eq!(late.err().map(|data| data.len()), Some(4096), "closed");
    }
}

#[tokio::test]
async fn what_lies_behind_the_end_of_a_file_is_zeros() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (path, engine, mut lane) in lanes(dir.path()) {
        let regions = memory();
        let written = engine.execute(request(BlockOp::Write, 0, 16_384), vec![5; 16_384].into()).await;
        assert_eq!(written, Ok(EngineAnswer::Done));
        std::fs::File::options().write(true).open(&path).expect("opens").set_len(10_000).expect("shrinks");
        data(&regions, &[(0, 200_000)]).copy_in(0, &[7; 200_000]).expect("there");
        let pieces = [(0, 4096), (8192, 192_512)];
        let past = request(BlockOp::Read, 4096, 196_608);
        assert_eq!(run(&mut lane, past, data(&regions, &pieces)).await, Ok(()));
        let found = bytes_of(&data(&regions, &pieces));
        assert!(found[..5904].iter().all(|byte| *byte == 5) && found[5904..].iter().all(|byte| *byte == 0));
    }
}

#[tokio::test]
async fn what_is_not_for_a_lane_is_given_back() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (_, engine, mut lane) in lanes(dir.path()) {
        let regions = memory();
        let page = [(0, 4096)];
        let mut refused = |request, pieces: &[(u64, u32)]| {
            let data = data(&regions, pieces);
            let bytes = data.len();
            let back = lane.begin(1, &request, data).err();
            back.is_some_and(|back| back.len() == bytes)
        };
        let zeroes = BlockOp::WriteZeroes { no_hole: false, fast: false };
        for op in [BlockOp::Discard, zeroes, BlockOp::Cache, BlockOp::Status] {
            assert!(refused(request(op, 0, 4096), &page), "{op:?}");
        }
        assert!(refused(request(BlockOp::Read, 0, 8192), &page), "data of another length");
        assert!(refused(request(BlockOp::Write, 0, 0), &[]), "nothing to do");
        if engine.disk.files.direct.is_some() {
            let (address, length) =
                (engine.disk.alignment.address as u64, engine.disk.alignment.length as u32);
            assert!(
                refused(request(BlockOp::Read, 0, 4096), &[(address / 2, 4096)]),
                "no disk reads to there"
            );
            let odd = [(0, length / 2), (4096, 4096 - length / 2)];
            assert!(refused(request(BlockOp::Write, 0, 4096), &odd), "half a sector");
        }
        engine.disk.poison();
        assert!(
            refused(request(BlockOp::Write, 0, 4096), &page) && refused(request(BlockOp::Flush, 0, 0), &[])
        );
        assert!(lane.is_idle());
        let read = request(BlockOp::Read, 0, 4096);
        assert_eq!(run(&mut lane, read, data(&regions, &page)).await, Ok(()), "reads go on");
    }
}

#[tokio::test]
async fn more_than_the_queue_holds_goes_with_the_next_call() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (_, _engine, mut lane) in lanes(dir.path()) {
        let regions = memory();
        let page = |number: u32| data(&regions, &[(u64::from(number) * 4096, 4096)]);
        let read = |number: u32| request(BlockOp::Read, u64::from(number) * 4096 % SIZE, 4096);
        for round in 0..2 {
            for number in 0..FLIGHTS_MAX as u32 {
                assert!(lane.begin(number, &read(number), page(number)).is_ok(), "{round} {number}");
            }
            assert!(lane.begin(0, &read(0), page(0)).is_err(), "bounded");
            let mut all = ended(&mut lane, FLIGHTS_MAX).await;
            all.sort_by_key(|(ticket, _)| *ticket);
            assert!(all.into_iter().zip(0..).all(|(ended, number)| ended == (number, Ok(()))));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_that_meet_keep_their_order_between_lanes_and_the_general_path() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (_, engine, mut lane) in lanes(dir.path()) {
        let mut other = FileLane::start(&engine.disk).expect("as the first");
        let regions = memory();
        for round in 0..50u8 {
            let source = [(0, 1 << 20)];
            data(&regions, &source).copy_in(0, &vec![round; 1 << 20]).expect("there");
            let first = request(BlockOp::Write, 0, 1 << 20);
            assert!(lane.begin(1, &first, data(&regions, &source)).is_ok());
            let second = request(BlockOp::Write, 4096 + 512, 512);
            assert!(other.begin(1, &second, data(&regions, &[(0, 512)])).is_err(), "would meet the first");
            let read = request(BlockOp::Read, 8192, 4096);
            assert!(
                lane.begin(2, &read, data(&regions, &[(2 << 20, 4096)])).is_err(),
                "would meet the first"
            );
            let apart = request(BlockOp::Write, 2 << 20, 4096);
            assert!(other.begin(3, &apart, data(&regions, &[(0, 4096)])).is_ok());
            // The first has not even been given to the kernel: whoever waits for it can not have run.
            let mut waiting = engine.execute(second, vec![round ^ 255; 512].into());
            assert!(futures_util::poll!(&mut waiting).is_pending());
            assert_eq!(ended(&mut lane, 1).await, [(1, Ok(()))]);
            assert_eq!(waiting.await, Ok(EngineAnswer::Done));
            assert_eq!(ended(&mut other, 1).await, [(3, Ok(()))]);
            let found = super::tests::read(&engine, 0, 1 << 20).await;
            assert!(found[4608..5120].iter().all(|byte| *byte == round ^ 255), "round={round}");
            assert!(found[..4608].iter().chain(&found[5120..]).all(|byte| *byte == round), "round={round}");
        }
    }
}

#[tokio::test]
async fn a_short_read_goes_on_where_it_ended() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let Some((_engine, mut lane, mut writer)) = pipe(dir.path()) else {
        return eprintln!("no io_uring here");
    };
    let regions = memory();
    let pieces = [(100, 60), (1000, 70), (0, 70)];
    let read = request(BlockOp::Read, 0, 200);
    assert!(lane.begin(1, &read, data(&regions, &pieces)).is_ok());
    let bytes: Vec<u8> = (0..200).collect();
    let mut all = Vec::new();
    for part in [&bytes[..10], &bytes[10..60], &bytes[60..135]] {
        assert!(poll_fn(|cx| Poll::Ready(lane.poll(cx, &mut all))).await.is_pending());
        writer.write_all(part).expect("writes");
        // The kernel has it when the pipe is empty.
        while bytes_left(&writer) > 0 {
            tokio::task::yield_now().await;
            let _ = poll_fn(|cx| Poll::Ready(lane.poll(cx, &mut all))).await;
        }
    }
    writer.write_all(&bytes[135..]).expect("writes");
    assert_eq!(ended(&mut lane, 1).await, [(1, Ok(()))]);
    assert_eq!(bytes_of(&data(&regions, &pieces)), bytes);
}

fn bytes_left(pipe: &std::io::PipeWriter) -> u64 {
    rustix::io::ioctl_fionread(pipe).expect("tells")
}

#[tokio::test]
async fn a_lane_that_is_dropped_keeps_memory_and_file_until_the_kernel_has_ended() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let Some((engine, mut lane, mut writer)) = pipe(dir.path()) else { return eprintln!("no io_uring here") };
    let regions = memory();
    let kept = Arc::downgrade(&regions);
    let read = |at: u64| request(BlockOp::Read, at, 4096);
    assert!(lane.begin(1, &read(0), data(&regions, &[(0, 4096)])).is_ok());
    let mut none = Vec::new();
    assert!(poll_fn(|cx| Poll::Ready(lane.poll(cx, &mut none))).await.is_pending());
    // This one the kernel is never given.
    assert!(lane.begin(2, &read(4096), data(&regions, &[(0, 4096)])).is_ok());
    drop((lane, regions));
    let alone = |at| engine.disk.overlaps.claim(ByteRange::new(at, 4096).expect("fits"), true);
    let free = alone(4096).expect("was given back");
    engine.disk.overlaps.release([free].into_iter());
    assert!(alone(0).is_none(), "is still read");
    assert!(kept.upgrade().is_some(), "the kernel will write to it");
    let closing = tokio::spawn(async move { engine.close().await });
    // Until something can be read, nothing ends.
    writer.write_all(&[1; 4096]).expect("writes");
    closing.await.expect("ends");
    while kept.upgrade().is_some() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_file_is_not_handed_over_while_the_kernel_has_what_a_lane_left() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let Some((engine, mut lane, mut writer)) = pipe(dir.path()) else { return eprintln!("no io_uring here") };
    let regions = memory();
    let read = request(BlockOp::Read, 0, 4096);
    assert!(lane.begin(1, &read, data(&regions, &[(0, 4096)])).is_ok());
    assert!(poll_fn(|cx| Poll::Ready(lane.poll(cx, &mut Vec::new()))).await.is_pending());
    drop(lane);
    let engine = Arc::new(engine);
    let releasing = tokio::spawn({
        let engine = Arc::clone(&engine);
        async move { engine.release().await }
    });
    // It has begun when nobody is let in any more.
    let elsewhere = ByteRange::new(8192, 1).expect("fits");
    while let Some(claim) = engine.disk.overlaps.claim(elsewhere, false) {
        engine.disk.overlaps.release([claim].into_iter());
        assert!(!releasing.is_finished(), "the kernel still has the file");
        tokio::task::yield_now().await;
    }
    assert!(!releasing.is_finished());
    writer.write_all(&[1; 4096]).expect("writes");
    assert!(releasing.await.expect("ends"), "can be gone on with");
}

#[tokio::test]
async fn the_engine_closes_when_its_lanes_have_ended() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (path, engine, mut lane) in lanes(dir.path()) {
        let regions = memory();
        let write = request(BlockOp::Write, 0, 4096);
        assert!(lane.begin(1, &write, data(&regions, &[(0, 4096)])).is_ok());
        let engine = Arc::new(engine);
        let closing = tokio::spawn({
            let engine = Arc::clone(&engine);
            async move { engine.close().await }
        });
        let refused = || {
            engine.disk.overlaps.claim(ByteRange::new(8192, 1).expect("fits"), false).map(|claim| {
                engine.disk.overlaps.release([claim].into_iter());
            })
        };
        while refused().is_some() {
            tokio::task::yield_now().await;
        }
        assert!(!closing.is_finished());
        assert!(std::fs::File::open(&path).expect("opens").try_lock().is_err(), "is still locked");
        assert_eq!(ended(&mut lane, 1).await, [(1, Ok(()))]);
        closing.await.expect("ends");
        std::fs::File::open(&path).expect("opens").try_lock().expect("was given back");
    }
}

#[tokio::test]
async fn memory_that_vanishes_fails_its_request_and_not_the_file() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (_, engine, mut lane) in lanes(dir.path()) {
        let fd = rustix::fs::memfd_create("loose", MemfdFlags::CLOEXEC).expect("creates");
        rustix::fs::ftruncate(&fd, 65_536).expect("sizes");
        let loose = SharedMemory::map(fd.try_clone().expect("clones"), 0, 65_536).expect("maps");
        let regions = Arc::new(Regions::default().with(1, loose).expect("new"));
        rustix::fs::ftruncate(&fd, 4096).expect("truncates");
        for op in [BlockOp::Read, BlockOp::Write] {
            for fua in [false, op == BlockOp::Write] {
                let request = BlockRequest { fua, ..request(op, 0, 4096) };
                let gone = run(&mut lane, request, data(&regions, &[(8192, 4096)])).await;
                assert_eq!(gone, Err(Fault::Internal), "{op:?}");
                assert_eq!(run(&mut lane, request, data(&regions, &[(0, 4096)])).await, Ok(()), "{op:?}");
            }
        }
        // Behind the end of the file nobody but us writes there.
        let beyond = request(BlockOp::Read, SIZE, 4096);
        let gone = run(&mut lane, beyond, data(&regions, &[(8192, 4096)])).await;
        assert_eq!(gone, Err(Fault::Internal));
        assert!(!engine.disk.poisoned.load(Ordering::Acquire));
    }
}

#[tokio::test]
async fn a_sync_that_fails_poisons_the_file() {
    let dir = tempfile::tempdir().expect("temporary directory");
    // A pipe has nothing to sync.
    let Some((engine, mut lane, _writer)) = pipe(dir.path()) else { return eprintln!("no io_uring here") };
    let regions = memory();
    let flush = request(BlockOp::Flush, 0, 0);
    assert_eq!(run(&mut lane, flush, data(&regions, &[])).await, Err(Fault::Internal));
    assert!(engine.disk.poisoned.load(Ordering::Acquire));
    assert!(lane.begin(1, &request(BlockOp::Write, 0, 4096), data(&regions, &[(0, 4096)])).is_err());
}

/// Nothing more can be given to a lane's ring.
fn break_ring(lane: &FileLane) {
    let null = std::fs::File::open("/dev/null").expect("opens");
    let ring = lane.work.as_ref().expect("works").ring.as_raw_fd();
    // SAFETY: the number stays the ring's, which closes it; it is only another file from now on.
    let mut place = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(ring) });
    rustix::io::dup2(&null, &mut place).expect("replaces");
}

#[tokio::test]
async fn a_ring_that_breaks_fails_what_it_has_and_takes_nothing_more() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (_, engine, mut lane) in lanes(dir.path()) {
        let regions = memory();
        let read = request(BlockOp::Read, 0, 4096);
        assert!(lane.begin(5, &read, data(&regions, &[(0, 4096)])).is_ok());
        break_ring(&lane);
        assert_eq!(ended(&mut lane, 1).await, [(5, Err(Fault::Internal))]);
        assert!(lane.is_idle() && lane.begin(6, &read, data(&regions, &[(0, 4096)])).is_err());
        assert!(poll_fn(|cx| Poll::Ready(lane.poll(cx, &mut Vec::new()))).await.is_pending());
        assert_eq!(super::tests::read(&engine, 0, 4096).await.len(), 4096, "the general path serves");
        engine.close().await;
    }
}

#[tokio::test]
async fn what_the_kernel_has_of_a_ring_that_breaks_is_answered_when_it_has_ended() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let Some((engine, mut lane, mut writer)) = pipe(dir.path()) else { return eprintln!("no io_uring here") };
    let regions = memory();
    let read = |at: u64| request(BlockOp::Read, at, 4096);
    assert!(lane.begin(1, &read(0), data(&regions, &[(0, 4096)])).is_ok());
    let mut none = Vec::new();
    assert!(poll_fn(|cx| Poll::Ready(lane.poll(cx, &mut none))).await.is_pending());
    assert!(lane.begin(2, &read(4096), data(&regions, &[(4096, 4096)])).is_ok());
    break_ring(&lane);
    assert_eq!(ended(&mut lane, 1).await, [(2, Err(Fault::Internal))], "was not begun");
    assert!(lane.begin(3, &read(8192), data(&regions, &[(8192, 4096)])).is_err(), "takes nothing more");
    assert!(poll_fn(|cx| Poll::Ready(lane.poll(cx, &mut none))).await.is_pending() && none.is_empty());
    let alone = |at| engine.disk.overlaps.claim(ByteRange::new(at, 4096).expect("fits"), true);
    assert!(alone(0).is_none() && !lane.is_idle(), "the kernel has it");
    let free = alone(4096).expect("was given back");
    engine.disk.overlaps.release([free].into_iter());
    writer.write_all(&[9; 4096]).expect("writes");
    assert_eq!(ended(&mut lane, 1).await, [(1, Ok(()))]);
    assert!(bytes_of(&data(&regions, &[(0, 4096)])) == [9; 4096] && lane.is_idle());
    assert!(alone(0).is_some());
}

#[derive(Clone, Debug)]
struct Step {
    writes: bool,
    offset: u64,
    /// Of the pieces, bytes.
    lengths: Vec<u32>,
    fill: u8,
}

fn step() -> impl Strategy<Value = Step> {
    let lengths = prop_oneof![
        prop::collection::vec((1u32..5).prop_map(|pages| pages * 4096), 1..4),
        prop::collection::vec((1u32..40).prop_map(|sectors| sectors * 512), 1..6),
        prop::collection::vec(1u32..5000, 1..4),
    ];
    let offset = prop_oneof![(0u64..32).prop_map(|page| page * 4096), 0u64..131_072];
    (any::<bool>(), offset, lengths, 1u8..255).prop_map(|(writes, offset, lengths, fill)| Step {
        writes,
        offset,
        lengths,
        fill,
    })
}

/// Carries a step out, by the lane if it will; the bytes of its memory afterwards.
async fn carry_out(engine: &FileEngine, lane: &mut FileLane, regions: &Arc<Regions>, step: &Step) -> Vec<u8> {
    let Step { writes, offset, lengths, fill } = step;
    let pieces: Vec<(u64, u32)> =
        lengths.iter().zip(0..).map(|(length, at)| (at * 65_536, *length)).collect();
    let shared = data(regions, &pieces);
    let bytes: Vec<u8> = (0..shared.len()).map(|at| fill.wrapping_add(at as u8)).collect();
    shared.copy_in(0, &bytes).expect("there");
    let op = if *writes { BlockOp::Write } else { BlockOp::Read };
    let request = request(op, *offset, bytes.len() as u64);
    match lane.begin(1, &request, shared) {
        Ok(()) => assert_eq!(ended(lane, 1).await, [(1, Ok(()))]),
        Err(shared) => {
            let payload = if *writes { bytes.into() } else { Bytes::new() };
            if let EngineAnswer::Data(parts) = engine.execute(request, payload).await.expect("is done") {
                shared.copy_in(0, &parts.concat()).expect("there");
            }
        }
    }
    bytes_of(&data(regions, &pieces))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_lane_behaves_like_memory(steps in prop::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let dir = tempfile::tempdir().expect("temporary directory");
            for (path, engine, mut lane) in lanes(dir.path()) {
                let regions = memory();
                let mut model = vec![0u8; 512 << 10];
                for step in &steps {
                    let found = carry_out(&engine, &mut lane, &regions, step).await;
                    let range = step.offset as usize..step.offset as usize + found.len();
                    if step.writes {
                        model[range].copy_from_slice(&found);
                    } else {
                        assert!(found == model[range], "{} {step:?}", path.display());
                    }
                }
                engine.close().await;
                let mut file = vec![0; model.len()];
                std::fs::File::open(&path).expect("opens").read_exact(&mut file).expect("reads");
                assert!(file == model);
            }
        });
    }
}
