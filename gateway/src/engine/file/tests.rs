//! The file engine over real files, by ring and by threads, direct and buffered.

use super::*;
use crate::config::FileIo;
use crate::engine::{OpenError, Wanted};
use proptest::prelude::*;
use spline_types::RequestId;
use std::path::Path;
use std::time::Duration;

const SIZE: u64 = 4 << 20;

fn image(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path).expect("creates").set_len(SIZE).expect("sizes");
    path
}

fn files(root: &Path, io: FileIo) -> Files {
    Files::new(vec![root.to_owned()], io, BufferPool::new()).waiting(Duration::from_millis(20))
}

fn request(op: BlockOp, offset: u64, length: u64) -> BlockRequest {
    BlockRequest {
        id: RequestId::new(1),
        op,
        range: ByteRange::new(offset, length).expect("fits"),
        fua: false,
    }
}

async fn read(engine: &FileEngine, offset: u64, length: u64) -> Vec<u8> {
    match engine.execute(request(BlockOp::Read, offset, length), Bytes::new()).await {
        Ok(EngineAnswer::Data(parts)) => parts.concat(),
        other => panic!("read answered {other:?}"),
    }
}

async fn write(engine: &FileEngine, offset: u64, data: Vec<u8>) {
    let written = engine.execute(request(BlockOp::Write, offset, data.len() as u64), data.into()).await;
    assert_eq!(written, Ok(EngineAnswer::Done));
}

/// Every way in which a file can be served here.
fn engines(dir: &Path) -> Vec<(&'static str, PathBuf, FileEngine)> {
    let ring = |files: &Arc<Descriptors>| Ring::start(files).map(Executor::Ring);
    let threads = |files: &Arc<Descriptors>| Threads::start(files).map(Executor::Threads);
    let mut engines = Vec::new();
    for (io, io_name) in [(FileIo::Direct, "direct"), (FileIo::Buffered, "buffered")] {
        let path = image(dir, &format!("ring-{io_name}"));
        // A sandbox may forbid io_uring; then the threads are what serves, and what is tested.
        match files(dir, io).open_with(&path, Wanted::default(), ring) {
            Ok(engine) => engines.push(("ring", path, engine)),
            Err(error) => eprintln!("no io_uring here: {error}"),
        }
        let path = image(dir, &format!("threads-{io_name}"));
        engines.push((
            "threads",
            path.clone(),
            files(dir, io).open_with(&path, Wanted::default(), threads).expect("opens"),
        ));
    }
    engines
}

#[tokio::test]
async fn what_is_written_is_read() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (way, path, engine) in engines(dir.path()) {
        write(&engine, 8192, vec![1; 8192]).await;
        write(&engine, 8192 + 511, vec![2; 1026]).await;
        let durable = BlockRequest { fua: true, ..request(BlockOp::Write, 4096, 4096) };
        let payload = Bytes::from(vec![3; 4096]);
        assert_eq!(engine.execute(durable, payload).await, Ok(EngineAnswer::Done), "{way}");
        let data = read(&engine, 4096, 12288).await;
        let expected = [vec![3; 4096], vec![1; 511], vec![2; 1026], vec![1; 8192 - 511 - 1026]].concat();
        assert!(data == expected, "{way} reads something else");
        assert!(read(&engine, 8191, 3).await == [3, 1, 1], "{way}");
        assert_eq!(engine.execute(request(BlockOp::Flush, 0, 0), Bytes::new()).await, Ok(EngineAnswer::Done));
        engine.close().await;
        assert!(std::fs::read(&path).expect("reads")[4096..16384] == expected, "{way}");
        let late = engine.execute(request(BlockOp::Read, 0, 512), Bytes::new()).await;
        assert_eq!(late, Err(Fault::Fenced), "{way}: nothing is served after the close");
    }
}

#[tokio::test]
async fn zeroed_and_discarded_ranges_read_as_zeros() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (way, _, engine) in engines(dir.path()) {
        for op in [
            BlockOp::Discard,
            BlockOp::WriteZeroes { no_hole: false, fast: false },
            BlockOp::WriteZeroes { no_hole: true, fast: false },
        ] {
            for (offset, length) in [(4096, 8192), (5000, 9000), (100, 10)] {
                write(&engine, 0, vec![9; 65536]).await;
                let done = engine.execute(request(op, offset, length), Bytes::new()).await;
                assert_eq!(done, Ok(EngineAnswer::Done), "{way} {op:?}");
                let mut expected = vec![9; 65536];
                expected[offset as usize..(offset + length) as usize].fill(0);
                assert!(read(&engine, 0, 65536).await == expected, "{way} {op:?} {offset} {length}");
            }
        }
    }
}

#[tokio::test]
async fn status_tells_data_from_holes() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (way, _, engine) in engines(dir.path()) {
        write(&engine, 1 << 20, vec![1; 1 << 20]).await;
        let status = |offset, length| engine.execute(request(BlockOp::Status, offset, length), Bytes::new());
        let (hole, data) = (Extent { length: 1 << 20, hole: true, zero: true }, 1 << 20);
        let data = Extent { length: data, hole: false, zero: false };
        let tail = Extent { length: 2 << 20, ..hole };
        assert_eq!(status(0, SIZE).await, Ok(EngineAnswer::Extents(vec![hole, data, tail])), "{way}");
        let inside = Extent { length: 4096, ..data };
        assert_eq!(status((1 << 20) + 4096, 4096).await, Ok(EngineAnswer::Extents(vec![inside])), "{way}");
    }
}

/// What a killed gateway leaves: a lock that the kernel lets go of a little after the process is gone.
#[test]
fn a_ring_that_ends_with_its_runtime_does_not_say_that_all_is_done() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    // Nothing is ever written to it: a read stays in the kernel.
    let (pipe, _writer) = std::io::pipe().expect("a pipe");
    let files = Arc::new(Descriptors { buffered: pipe.into(), direct: None });
    let start = || {
        let _inside = runtime.enter();
        Ring::start(&files)
    };
    let (Ok(idle), Ok(busy)) = (start(), start()) else { return eprintln!("no io_uring here") };
    assert!(idle.close(), "an idle one has done everything");
    let (done, ended) = oneshot::channel();
    let range = ByteRange::new(0, 4096).expect("fits");
    busy.submit(Job { action: Action::Read(BufferPool::new().take(4096)), range, direct: false, done });
    runtime.shutdown_background();
    assert!(!busy.close());
    assert!(ended.blocking_recv().is_err(), "it never was");
}

#[tokio::test]
async fn a_lock_that_is_let_go_of_soon_is_waited_for() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = image(dir.path(), "disk");
    let held = std::fs::File::open(&path).expect("opens");
    held.lock().expect("locks");
    let files = files(dir.path(), FileIo::Direct);
    assert!(matches!(files.open(&path, Wanted::default()), Err(OpenError::Held(_))));
    let files = files.waiting(Duration::from_secs(60));
    let (begun, opening) = std::sync::mpsc::channel();
    let opener = std::thread::spawn(move || {
        begun.send(()).expect("the test waits");
        files.open(&path, Wanted::default()).map(drop)
    });
    opening.recv().expect("begins");
    assert!(!opener.is_finished(), "nothing is opened while it is locked");
    drop(held);
    opener.join().expect("ends").expect("opens when the lock is free");
}

#[tokio::test]
async fn a_file_is_opened_once_and_only_below_a_root() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
    std::fs::create_dir(&root).expect("creates");
    std::fs::create_dir(&outside).expect("creates");
    let path = image(&root, "disk");
    let secret = image(&outside, "secret");
    std::os::unix::fs::symlink("../outside/secret", root.join("link")).expect("links");
    std::os::unix::fs::symlink("disk", root.join("alias")).expect("links");
    let files = files(&root, FileIo::Direct);
    let engine = files.open(&path, Wanted::default()).expect("opens");
    assert!(matches!(files.open(&root.join("alias"), Wanted::default()), Err(OpenError::Held(_))));
    assert!(matches!(
        files.open(&path, Wanted { read_only: true, ..Wanted::default() }),
        Err(OpenError::Held(_))
    ));
    engine.close().await;
    files.open(&path, Wanted::default()).expect("opens again").close().await;
    for bad in [&secret, &root.join("link"), &root.join("none"), &root.join("../outside/secret"), &root] {
        let refused = files.open(bad, Wanted::default()).err();
        assert!(matches!(refused, Some(OpenError::NotFound(_))), "{} {refused:?}", bad.display());
    }
    std::fs::write(root.join("small"), "x").expect("writes");
    assert!(matches!(files.open(&root.join("small"), Wanted::default()), Err(OpenError::NotFound(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_writes_to_one_place_the_last_to_come_wins() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (way, path, engine) in engines(dir.path()) {
        for round in 0..100u8 {
            // Long ones first, which take longer.
            let lengths = [1 << 20, 256 << 10, 65_536, 4096, 512];
            let writes = (1..).zip(lengths).map(|(number, length)| {
                let data = vec![round.wrapping_mul(7) ^ number; length as usize];
                engine.execute(request(BlockOp::Write, 0, length), data.into())
            });
            for written in futures_util::future::join_all(writes).await {
                assert_eq!(written, Ok(EngineAnswer::Done));
            }
            let found = read(&engine, 0, 1 << 20).await;
            for (number, from, to) in [
                (5, 0, 512),
                (4, 512, 4096),
                (3, 4096, 65_536),
                (2, 65_536, 256 << 10),
                (1, 256 << 10, 1 << 20),
            ] {
                let right = found[from..to].iter().all(|byte| *byte == round.wrapping_mul(7) ^ number);
                assert!(right, "{way} {} round={round} number={number}", path.display());
            }
        }
        engine.close().await;
    }
}

#[tokio::test]
async fn a_file_that_took_the_name_of_another_is_not_the_known_one() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (path, other) = (image(dir.path(), "disk"), image(dir.path(), "other"));
    let files = files(dir.path(), FileIo::Direct);
    let engine = files.open(&path, Wanted::default()).expect("opens");
    let known = Wanted { known: Some(engine.traits().identity), ..Wanted::default() };
    engine.close().await;
    files.open(&path, known).expect("opens again").close().await;
    let moved = dir.path().join("moved");
    std::fs::rename(&path, &moved).expect("renames");
    std::fs::rename(&other, &path).expect("renames");
    let refused = files.open(&path, known).map(drop);
    assert!(
        matches!(&refused, Err(OpenError::Replaced(why)) if why.contains("another volume")),
        "{refused:?}"
    );
    files.open(&moved, known).expect("is the known one, wherever it is").close().await;
    files.open(&path, Wanted::default()).expect("was not kept").close().await;
}

/// Writes of one file under way at once must leave what the last writer of each byte wrote: neighbours in a page must
/// not undo each other, whichever of them goes past the page cache.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_and_direct_writes_of_neighbours_do_not_undo_each_other() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (way, _, engine) in engines(dir.path()) {
        for round in 1..30u8 {
            // Overlapping pairs are issued in order of their answers; neighbours all at once.
            let page = |at: u64| request(BlockOp::Write, at * 4096, 4096);
            let small = |at: u64| request(BlockOp::Write, at * 4096 + 3584, 1024);
            let pages = (0..8).filter(|at| at % 2 == 0).map(|at| (page(at), vec![round; 4096]));
            let smalls = (0..8).filter(|at| at % 2 == 1).map(|at| (small(at - 1), vec![round | 128; 1024]));
            let first: Vec<_> = pages.map(|(r, data)| engine.execute(r, data.into())).collect();
            futures_util::future::join_all(first).await;
            let mixed: Vec<_> = smalls
                .map(|(r, data)| engine.execute(r, data.into()))
                .chain((8..16).map(|at| engine.execute(page(at), vec![round; 4096].into())))
                .collect();
            futures_util::future::join_all(mixed).await;
            let data = read(&engine, 0, 16 * 4096).await;
            for at in (0..8usize).step_by(2) {
                let start = at * 4096;
                assert!(
                    data[start..start + 3584].iter().all(|b| *b == round),
                    "{way} round={round} page={at}"
                );
                assert!(
                    data[start + 3584..start + 4608].iter().all(|b| *b == round | 128),
                    "{way} page={at}"
                );
            }
            assert!(data[8 * 4096..].iter().all(|b| *b == round), "{way} round={round}");
        }
    }
}

#[derive(Clone, Debug)]
struct Step {
    op: u8,
    offset: usize,
    length: usize,
    fill: u8,
}

fn step() -> impl Strategy<Value = Step> {
    let place = prop_oneof![
        (0usize..32, 1usize..9).prop_map(|(page, pages)| (page * 4096, pages * 4096)),
        (0usize..256, 1usize..64).prop_map(|(block, blocks)| (block * 512, blocks * 512)),
        (0usize..131_072, 1usize..10_000),
    ];
    (0u8..4, place, 1u8..255).prop_map(|(op, (offset, length), fill)| Step { op, offset, length, fill })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn a_file_behaves_like_memory(steps in prop::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let dir = tempfile::tempdir().expect("temporary directory");
            for (way, _, engine) in engines(dir.path()) {
                let mut model = vec![0u8; 256 << 10];
                for Step { op, offset, length, fill } in steps.clone() {
                    let range = offset..offset + length;
                    match op {
                        0 => {
                            model[range].fill(fill);
                            write(&engine, offset as u64, vec![fill; length]).await;
                        }
                        1 => {
                            let data = read(&engine, offset as u64, length as u64).await;
                            assert!(data == model[range], "{way} offset={offset} length={length}");
                        }
                        _ => {
                            model[range].fill(0);
                            let op = BlockOp::WriteZeroes { no_hole: op == 2, fast: false };
                            let done = engine.execute(request(op, offset as u64, length as u64), Bytes::new()).await;
                            assert_eq!(done, Ok(EngineAnswer::Done));
                        }
                    }
                }
                assert!(read(&engine, 0, model.len() as u64).await == model, "{way}");
            }
        });
    }
}

#[tokio::test]
async fn a_file_that_grows_is_a_larger_volume_and_one_that_shrinks_is_not_smaller() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (name, path, engine) in engines(dir.path()) {
        let mut standing = engine.standing();
        engine.disk.look_at_size();
        assert!(!standing.has_changed().expect("is there"), "{name}: nothing has happened");
        let file = std::fs::File::options().write(true).open(&path).expect("opens");
        // A tail of less than a block is not counted.
        file.set_len(2 * SIZE + 100).expect("grows");
        engine.disk.look_at_size();
        assert_eq!(standing.borrow_and_update().size, 2 * SIZE, "{name}");
        assert_eq!(engine.geometry().size, 2 * SIZE, "{name}");
        write(&engine, 2 * SIZE - 4096, vec![7; 4096]).await;
        assert_eq!(read(&engine, 2 * SIZE - 4096, 4096).await, [7; 4096], "{name}");
        file.set_len(SIZE).expect("shrinks");
        engine.disk.look_at_size();
        assert!(!standing.has_changed().expect("is there"), "{name}");
        assert_eq!(engine.geometry().size, 2 * SIZE, "{name}");
    }
}
