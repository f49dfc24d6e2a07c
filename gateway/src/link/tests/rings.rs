//! Links with a ring, from nebd's side: what is served, what cuts them, how they are given away and gone on with.

use super::*;
use crate::link::ring::{Freeze, Frozen};
use crate::upgrade::Reopening;
use crate::watchdog::progress;
use futures_util::FutureExt;
use spline_link::memory::SharedMemory;
use spline_link::ring::{ENTRIES, NebdRing, Piece, RingAnswer, RingFds};
use spline_link::{FEATURE_RING, passing};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::pin;
use std::time::Instant;
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of the region that every test has.
const REGION: usize = 8 << 20;

/// The other side of a link with a ring.
struct RingNebd {
    control: Nebd,
    ring: NebdRing,
    memory: SharedMemory,
}

/// Every link is another nebd's.
static INSTANCES: AtomicU64 = AtomicU64::new(1);

fn hello(volume: &str, versions: VersionRange) -> Hello {
    Hello {
        versions,
        features: FEATURE_RING | 1 << 40,
        mode: Mode::Open,
        read_only: false,
        force: false,
        instance: InstanceId(INSTANCES.fetch_add(1, Ordering::Relaxed)),
        identity: None,
        volume: volume.parse().expect("a name"),
    }
}

fn region_frame(number: u32, offset: u64, length: u64) -> Vec<u8> {
    Header::bare(Message::Region { number, offset, length }).encode().to_vec()
}

/// Sends a hello with descriptors; the socket and the features that were agreed on.
async fn greet(mut stream: UnixStream, hello: &Hello, fds: &[BorrowedFd<'_>]) -> (UnixStream, u64) {
    passing::send(stream.as_fd(), &hello.encode(), fds).expect("sends");
    let mut bytes = Vec::new();
    loop {
        if let Some((Welcome::Accepted(accepted), _)) = Welcome::decode(&bytes).expect("a welcome") {
            return (stream, accepted.features);
        }
        assert!(stream.read_buf(&mut bytes).await.expect("reads") > 0, "closed without a welcome");
    }
}

impl RingNebd {
    async fn open(stream: UnixStream, volume: &str) -> Self {
        let (ring, fds) = NebdRing::create().expect("creates");
        let list = [fds.memory.as_fd(), fds.to_gateway.as_fd(), fds.to_nebd.as_fd()];
        let (stream, features) = greet(stream, &hello(volume, VersionRange::OURS), &list).await;
        assert_eq!(features, FEATURE_RING);
        let memory = SharedMemory::create("guest", REGION).expect("creates");
        passing::send(stream.as_fd(), &region_frame(0, 0, REGION as u64), &[memory.fd()]).expect("sends");
        Self { control: Nebd { stream }, ring, memory }
    }

    fn push(&mut self, request: &BlockRequest, pieces: &[Piece]) {
        assert!(self.ring.has_room(pieces.len()).expect("valid"));
        self.ring.push(request, pieces);
    }

    async fn next(&mut self) -> RingAnswer {
        let wait = async {
            loop {
                if let Some(answer) = self.ring.pop().expect("valid") {
                    return answer;
                }
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("an answer comes")
    }

    async fn ask(
        &mut self,
        id: u64,
        op: BlockOp,
        offset: u64,
        length: u64,
        pieces: &[Piece],
    ) -> (Completion, u32) {
        self.push(&request(id, op, offset, length), pieces);
        self.ring.publish();
        let answer = self.next().await;
        assert_eq!(answer.id.get(), id);
        (answer.completion, answer.payload)
    }

    /// The gateway has closed the link.
    async fn is_cut(&mut self) {
        assert_eq!(tokio::time::timeout(PATIENCE, self.control.next()).await.expect("ends"), None);
    }
}

fn piece(region: u32, offset: u64, length: u32) -> Piece {
    Piece { region, length, offset }
}

const DONE: (Completion, u32) = (Completion::Done(()), 0);

#[tokio::test]
async fn a_file_is_served_from_shared_memory() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |_| {}).await;
    let mut nebd = RingNebd::open(connect(&gateway).await, &volume).await;
    // Aligned and not, in one piece and in many, none of them where the others are.
    let shapes: [(u64, Vec<Piece>); 4] = [
        (0, vec![piece(0, 0, 65536)]),
        (1 << 20, vec![piece(0, 100_000, 300_000)]),
        (2 << 20, (0..40).map(|i| piece(0, (1 << 20) + i * 8192, 4096)).collect()),
        ((3 << 20) + 512, vec![piece(0, (3 << 20) + 7, 100), piece(0, 4 << 20, 412)]),
    ];
    for (round, (offset, pieces)) in shapes.iter().enumerate() {
        let length = pieces.iter().map(|piece| u64::from(piece.length)).sum();
        let data: Vec<u8> = (0..length).map(|n| (n / 7 + round as u64) as u8).collect();
        let mut at = 0;
        for piece in pieces {
            nebd.memory.write(piece.offset, &data[at..at + piece.length as usize]).expect("fits");
            at += piece.length as usize;
        }
        assert_eq!(nebd.ask(1, BlockOp::Write, *offset, length, pieces).await, DONE, "{round}");
        assert_eq!(nebd.ask(2, BlockOp::Flush, 0, 0, &[]).await, DONE);
        let there = piece(0, 6 << 20, length as u32);
        assert_eq!(nebd.ask(3, BlockOp::Read, *offset, length, &[there]).await, DONE, "{round}");
        let mut back = vec![0; length as usize];
        nebd.memory.read(there.offset, &mut back).expect("fits");
        assert!(back == data, "{round}");
    }
    let zeroes = BlockOp::WriteZeroes { no_hole: false, fast: true };
    assert_eq!(nebd.ask(4, zeroes, 0, 8192, &[]).await, DONE);
    let (completion, bytes) = nebd.ask(5, BlockOp::Status, SIZE - 4096, 4096, &[piece(0, 64, 120)]).await;
    let mut extents = vec![0; bytes as usize];
    nebd.memory.read(64, &mut extents).expect("fits");
    let hole = Extent { length: 4096, hole: true, zero: true };
    assert_eq!(completion, Completion::Done(()));
    assert_eq!(spline_link::extents::decode(&extents, 4096), Ok(vec![hole]));
    let past_end = Completion::Failed(Fault::Invalid(Invalid::PastEnd));
    assert_eq!(nebd.ask(6, BlockOp::Read, SIZE - 512, 1024, &[piece(0, 0, 1024)]).await.0, past_end);
    gateway.shutdown().await;
    assert_eq!(nebd.control.next().await, Some((Message::Leaving, Vec::new())));
    nebd.is_cut().await;
}

/// Asks one at a time, or `together` at once, until the gateway says that its thread stays, or that it does not.
async fn ask_until(nebd: &mut RingNebd, stays: bool, together: u64) {
    let asking = async {
        let mut id = 0;
        while nebd.ring.gateway_processor().is_some() != stays {
            for _ in 0..together {
                id += 1;
                nebd.push(&request(id, BlockOp::Read, 0, 4096), &[piece(0, 0, 4096)]);
            }
            nebd.ring.publish();
            for _ in 0..together {
                nebd.next().await;
            }
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.expect("comes to it");
}

#[tokio::test]
async fn nebd_is_told_where_the_thread_stays_while_requests_are_few() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |_| {}).await;
    let mut nebd = RingNebd::open(connect(&gateway).await, &volume).await;
    ask_until(&mut nebd, true, 1).await;
    ask_until(&mut nebd, false, 64).await;
    ask_until(&mut nebd, true, 1).await;
    gateway.shutdown().await;

    let (gateway, volume) = file_gateway(dir.path(), |config| config.stay_on_processor = false).await;
    let mut nebd = RingNebd::open(connect(&gateway).await, &volume).await;
    let until = Instant::now() + Duration::from_millis(20);
    while Instant::now() < until {
        nebd.ask(1, BlockOp::Read, 0, 4096, &[piece(0, 0, 4096)]).await;
        assert_eq!(nebd.ring.gateway_processor(), None, "it was told not to stay");
    }
}

#[tokio::test]
async fn a_burst_in_a_ring_is_answered_once_each() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |config| config.inflight_requests = 8).await;
    let mut nebd = RingNebd::open(connect(&gateway).await, &volume).await;
    let mut open = std::collections::BTreeSet::new();
    for id in 0..600u64 {
        let op = if id % 2 == 0 { BlockOp::Write } else { BlockOp::Read };
        nebd.push(&request(id, op, id % 100 * 4096, 4096), &[piece(0, id * 4096, 4096)]);
        open.insert(id);
        if id % 50 == 49 {
            nebd.ring.publish();
        }
    }
    while !open.is_empty() {
        let answer = nebd.next().await;
        assert_eq!(answer.completion, Completion::Done(()));
        assert!(open.remove(&answer.id.get()), "answered twice: {}", answer.id);
    }
    assert_eq!(nebd.ring.unanswered(), 0);
}

#[tokio::test]
async fn memory_that_could_vanish_is_served_and_what_has_vanished_fails() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |_| {}).await;
    let mut nebd = RingNebd::open(connect(&gateway).await, &volume).await;
    let loose = rustix::fs::memfd_create("loose", rustix::fs::MemfdFlags::CLOEXEC).expect("creates");
    rustix::fs::ftruncate(&loose, 1 << 20).expect("sizes");
    rustix::io::pwrite(&loose, &[7; 8192], 4096).expect("writes");
    let frame = region_frame(1, 4096, (1 << 20) - 4096);
    passing::send(nebd.control.stream.as_fd(), &frame, &[loose.as_fd()]).expect("sends");
    assert_eq!(nebd.ask(1, BlockOp::Write, 0, 8192, &[piece(1, 0, 8192)]).await, DONE);
    assert_eq!(nebd.ask(2, BlockOp::Read, 0, 512, &[piece(0, 3, 512)]).await, DONE);
    let mut back = [0; 512];
    nebd.memory.read(3, &mut back).expect("fits");
    assert_eq!(back, [7; 512]);
    rustix::fs::ftruncate(&loose, 8192).expect("truncates");
    for (id, offset, length) in [(3, 4096u64, 4096u32), (4, 4096, 512), (5, 3584, 1024)] {
        for op in [BlockOp::Read, BlockOp::Write] {
            let (completion, _) = nebd.ask(id, op, 0, length.into(), &[piece(1, offset, length)]).await;
            assert_eq!(completion, Completion::Failed(Fault::Internal), "{op:?} {offset} {length}");
        }
    }
    assert_eq!(nebd.ask(6, BlockOp::Flush, 0, 0, &[]).await, DONE, "nothing else has suffered");
}

#[tokio::test]
async fn what_makes_no_sense_cuts_the_link_and_no_other() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |_| {}).await;
    let mut other = RingNebd::open(connect(&gateway).await, &volume).await;
    type Act = fn(&mut RingNebd);
    let bad: [(&str, Act); 6] = [
        ("a region that is not there", |nebd| {
            nebd.push(&request(1, BlockOp::Read, 0, 512), &[piece(9, 0, 512)]);
        }),
        ("bytes behind a region", |nebd| {
            nebd.push(&request(1, BlockOp::Read, 0, 512), &[piece(0, REGION as u64 - 1, 512)]);
        }),
        ("a number that was used", |nebd| {
            let frame = region_frame(0, 0, 4096);
            passing::send(nebd.control.stream.as_fd(), &frame, &[nebd.memory.fd()]).expect("sends");
        }),
        ("a region without its file", |nebd| {
            passing::send(nebd.control.stream.as_fd(), &region_frame(1, 0, 4096), &[]).expect("sends");
        }),
        ("descriptors without frames", |nebd| {
            let socket = nebd.control.stream.as_fd();
            passing::send(socket, b"S", &[nebd.memory.fd(), nebd.memory.fd()]).expect("sends");
        }),
        ("a request on the socket", |nebd| {
            let flush = Header::request(request(1, BlockOp::Flush, 0, 0)).encode();
            passing::send(nebd.control.stream.as_fd(), &flush, &[]).expect("sends");
        }),
    ];
    for (number, (what, act)) in bad.into_iter().enumerate() {
        let mut nebd = RingNebd::open(connect(&gateway).await, &volume).await;
        act(&mut nebd);
        nebd.ring.publish();
        nebd.is_cut().await;
        assert_eq!(other.ask(number as u64, BlockOp::Flush, 0, 0, &[]).await, DONE, "{what}");
    }
}

#[tokio::test]
async fn a_nebd_that_takes_no_answers_is_cut_and_nothing_of_it_stays() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |_| {}).await;
    let (mut ring, fds) = NebdRing::create().expect("creates");
    let list = [fds.memory.as_fd(), fds.to_gateway.as_fd(), fds.to_nebd.as_fd()];
    let (stream, _) = greet(connect(&gateway).await, &hello(&volume, VersionRange::OURS), &list).await;
    let memory = SharedMemory::create("guest", 4096).expect("creates");
    passing::send(stream.as_fd(), &region_frame(0, 0, 4096), &[memory.fd()]).expect("sends");
    let mut control = Nebd { stream };
    // Refused, so that many end in one turn.
    for id in 0..ENTRIES {
        ring.push(&request(id, BlockOp::Read, 1 << 40, 512), &[piece(0, 0, 512)]);
    }
    ring.publish();
    // Nothing is ever heard; the same requests are shown once more.
    let bytes = fds.memory.try_clone().expect("clones");
    let cells = SharedMemory::map(bytes, 0, 4096).expect("maps");
    let (submitted, answered) = (64, 192);
    let all_answered = async {
        let mut count = [0; 8];
        while u64::from_le_bytes(count) != ENTRIES {
            tokio::time::sleep(Duration::from_micros(200)).await;
            cells.read(answered, &mut count).expect("is there");
        }
    };
    tokio::time::timeout(PATIENCE, all_answered).await.expect("they are refused");
    cells.write(submitted, &(2 * ENTRIES).to_le_bytes()).expect("is there");
    rustix::io::write(&fds.to_gateway, &1u64.to_ne_bytes()).expect("rings");
    assert_eq!(tokio::time::timeout(PATIENCE, control.next()).await.expect("it has ended"), None);
}

#[tokio::test]
async fn who_brings_no_good_ring_is_served_over_the_socket() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |_| {}).await;
    let fds = || NebdRing::create().expect("creates").1;
    let list = |fds: &RingFds| -> Vec<OwnedFd> {
        let all = [fds.memory.as_fd(), fds.to_gateway.as_fd(), fds.to_nebd.as_fd()];
        all.iter().map(|fd| fd.try_clone_to_owned().expect("clones")).collect()
    };
    let old = VersionRange { min: 3, max: 3 };
    let mut swapped = list(&fds());
    swapped.swap(0, 2);
    for (versions, fds) in [
        (old, list(&fds())),
        (VersionRange::OURS, Vec::new()),
        (VersionRange::OURS, list(&fds())[..2].iter().map(|fd| fd.try_clone().expect("clones")).collect()),
        (VersionRange::OURS, swapped),
    ] {
        let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let (stream, features) = greet(connect(&gateway).await, &hello(&volume, versions), &borrowed).await;
        assert_eq!(features, 0);
        assert_eq!(Nebd { stream }.ask(1, BlockOp::Flush, 0, 0, &[]).await.0, Completion::Done(()));
    }
}

#[tokio::test]
async fn a_hello_with_more_descriptors_than_a_ring_has_is_cut() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |_| {}).await;
    let fds = NebdRing::create().expect("creates").1;
    let four = [fds.memory.as_fd(), fds.to_gateway.as_fd(), fds.to_nebd.as_fd(), fds.memory.as_fd()];
    let mut stream = connect(&gateway).await;
    passing::send(stream.as_fd(), &hello(&volume, VersionRange::OURS).encode(), &four).expect("sends");
    let mut answer = [0; 16];
    let cut = tokio::time::timeout(PATIENCE, stream.read(&mut answer)).await.expect("in time");
    assert_eq!(cut.unwrap_or(0), 0, "without a word");
}

#[tokio::test]
async fn a_volume_that_grows_while_its_link_goes_over_is_told() {
    let bench = Bench::new(64, Duration::from_secs(60));
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    tokio::spawn(serve(theirs, Arc::clone(&bench.links)));
    let mut nebd = RingNebd::open(ours, "volume").await;
    let frozen = freeze(&bench, Duration::from_millis(50)).await.expect("is given away");
    bench.engine.size.store(2 * SIZE, Ordering::Release);
    let session = Arc::clone(bench.links.registry.sessions().first().expect("is open"));
    let (begun, hears) = oneshot::channel();
    tokio::spawn(go_on(frozen, session, Arc::clone(&bench.links), begun));
    hears.await.expect("it is gone on with");
    assert_eq!(nebd.control.next().await, Some((Message::Renewed { epoch: Epoch::new(7) }, Vec::new())));
    assert_eq!(nebd.control.next().await, Some((Message::Resized { size: 2 * SIZE }, Vec::new())));
}

/// Freezes the only link of the bench's session.
async fn freeze(bench: &Bench, drain_limit: Duration) -> Option<Frozen> {
    let sessions = bench.links.registry.sessions();
    let orders = sessions.first().expect("is open").links_orders();
    let (reply, frozen) = oneshot::channel();
    let order = Order::Freeze(Freeze { drain_limit, reply });
    assert!(orders.first().expect("a link").send(order).is_ok());
    tokio::time::timeout(PATIENCE, frozen).await.expect("in time").ok()
}

/// What can be under way when a link is given away. No lane has any of it here, and none ever has the last three.
const EACH: [BlockOp; 6] = [
    BlockOp::Read,
    BlockOp::Write,
    BlockOp::Flush,
    BlockOp::Discard,
    BlockOp::WriteZeroes { no_hole: false, fast: false },
    BlockOp::WriteZeroes { no_hole: true, fast: false },
];

/// An operation of 512 bytes with an id, and where its data lies.
fn small(id: u64, op: BlockOp) -> (BlockRequest, Vec<Piece>) {
    let length = if op == BlockOp::Flush { 0 } else { 512 };
    let pieces = if op.carries_data() { vec![piece(0, 0, 512)] } else { Vec::new() };
    (request(id, op, 0, length), pieces)
}

/// A link on which each operation is under way, with ids from 1 on.
async fn busy(bench: &Bench) -> RingNebd {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    tokio::spawn(serve(theirs, Arc::clone(&bench.links)));
    let mut nebd = RingNebd::open(ours, "volume").await;
    for (id, op) in (1..).zip(EACH) {
        let (request, pieces) = small(id, op);
        nebd.push(&request, &pieces);
    }
    nebd.ring.publish();
    bench.until(|log| (1..).zip(EACH).all(|(id, _)| log.contains(&("start", id)))).await;
    nebd
}

#[tokio::test]
async fn a_link_is_given_away_and_gone_on_with() {
    let bench = Bench::new(64, Duration::from_secs(60));
    let mut nebd = busy(&bench).await;
    nebd.push(&request(1003, BlockOp::Write, 0, 512), &[piece(0, 0, 512)]);
    nebd.ring.publish();
    assert_eq!(nebd.next().await.id.get(), 1003);
    let frozen = freeze(&bench, Duration::from_millis(50)).await.expect("is given away");
    assert_eq!((frozen.withdrawn, frozen.position.taken, frozen.position.answered), (6, 7, 7));
    assert!(frozen.stopped <= Instant::now());
    // What comes meanwhile waits in the ring, and a region in the socket.
    nebd.push(&request(1004, BlockOp::Write, 0, 512), &[piece(1, 0, 512)]);
    nebd.ring.publish();
    let more = SharedMemory::create("more", 4096).expect("creates");
    passing::send(nebd.control.stream.as_fd(), &region_frame(1, 0, 4096), &[more.fd()]).expect("sends");
    for (id, op) in (1..).zip(EACH) {
        let answer = nebd.next().await;
        assert_eq!((answer.id.get(), answer.completion), (id, Completion::Withdrawn), "{op:?}");
    }
    // They could end now, if anybody still had them.
    bench.engine.gate.add_permits(EACH.len());
    let session = Arc::clone(bench.links.registry.sessions().first().expect("is open"));
    let (begun, hears) = oneshot::channel();
    tokio::spawn(go_on(frozen, session, Arc::clone(&bench.links), begun));
    hears.await.expect("it is gone on with");
    assert_eq!(nebd.control.next().await, Some((Message::Renewed { epoch: Epoch::new(7) }, Vec::new())));
    assert_eq!(nebd.control.next().await, Some((Message::Resized { size: SIZE }, Vec::new())));
    assert_eq!(nebd.next().await.id.get(), 1004);
    for (id, op) in (1..).zip(EACH) {
        let (request, pieces) = small(id, op);
        assert_eq!(nebd.ask(id, op, 0, request.range.length(), &pieces).await, DONE, "{op:?}");
    }
    assert_eq!((nebd.ring.pop().expect("valid"), nebd.ring.unanswered()), (None, 0), "complete_once");
    nebd.control.send(Message::Detach, &[]).await;
    nebd.is_cut().await;
}

/// Nobody fences what a file's old process still does: its operations end before the link is another's.
#[tokio::test]
async fn a_link_to_a_file_is_given_away_when_what_it_does_has_ended() {
    let file = Bench::of_epoch(Epoch::new(0), 64, Duration::from_secs(60));
    let mut nebd = busy(&file).await;
    let mut given_away = pin!(freeze(&file, Duration::ZERO));
    assert!(given_away.as_mut().now_or_never().is_none(), "the order is given");
    // A link of the cluster that is told later, and has as long, is given away by now.
    let cluster = Bench::new(64, Duration::from_secs(60));
    let _other = busy(&cluster).await;
    assert_eq!(freeze(&cluster, Duration::ZERO).await.expect("is given away").withdrawn, EACH.len());
    assert!(given_away.as_mut().now_or_never().is_none(), "it is waited for");
    assert_eq!(nebd.ring.pop().expect("valid"), None);
    file.engine.gate.add_permits(EACH.len());
    let frozen = given_away.await.expect("is given away");
    let all = EACH.len() as u64;
    assert_eq!((frozen.withdrawn, frozen.position.taken, frozen.position.answered), (0, all, all));
    let mut answered = Vec::new();
    while let Some(answer) = nebd.ring.pop().expect("valid") {
        assert_eq!((answer.completion, answer.payload), DONE);
        answered.push(answer.id.get());
    }
    answered.sort_unstable();
    assert_eq!(answered, (1..=all).collect::<Vec<_>>(), "complete_once");
    let ended = file.log().iter().filter(|(what, _)| *what == "end").count();
    assert_eq!(ended, EACH.len());
}

#[tokio::test]
async fn what_is_read_when_the_connection_is_cut_is_not_a_failure() {
    let bench = Bench::new(64, Duration::from_secs(60));
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let cut = theirs.as_fd().try_clone_to_owned().expect("clones");
    let served = tokio::spawn(serve(theirs, Arc::clone(&bench.links)));
    let mut nebd = RingNebd::open(ours, "volume").await;
    nebd.push(&request(1, BlockOp::Read, 0, 512), &[piece(0, 0, 512)]);
    nebd.ring.publish();
    bench.until(|log| log.contains(&("start", 1))).await;
    // The read has ended before the link hears that its connection has.
    bench.engine.gate.add_permits(1);
    rustix::net::shutdown(&cut, rustix::net::Shutdown::Both).expect("is cut");
    served.await.expect("ends");
    // A nebd that lives takes what was answered, and sends the rest again.
    let answer = nebd.ring.pop().expect("valid");
    assert!(answer.as_ref().is_none_or(|answer| answer.completion == Completion::Withdrawn), "{answer:?}");
}

#[tokio::test]
async fn what_is_read_for_a_nebd_that_has_left_goes_nowhere() {
    let bench = Bench::new(64, Duration::from_secs(60));
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let served = tokio::spawn(serve(theirs, Arc::clone(&bench.links)));
    let mut nebd = RingNebd::open(ours, "volume").await;
    let mut found = [0; 512];
    bench.engine.gate.add_permits(1);
    assert_eq!(nebd.ask(1, BlockOp::Read, 0, 512, &[piece(0, 0, 512)]).await, DONE);
    nebd.memory.read(0, &mut found).expect("fits");
    assert_eq!(found, [7; 512], "as long as it is there");
    nebd.push(&request(2, BlockOp::Read, 0, 512), &[piece(0, 512, 512)]);
    nebd.ring.publish();
    bench.until(|log| log.contains(&("start", 2))).await;
    let RingNebd { control, memory, .. } = nebd;
    drop(control);
    bench.engine.gate.add_permits(1);
    served.await.expect("ends");
    assert!(bench.engine.log.lock().expect("unpoisoned").contains(&("end", 2)));
    memory.read(512, &mut found).expect("fits");
    assert_eq!(found, [0; 512], "the memory may be of another use by now");
}

/// An upgrade was given up, and nobody knows which epoch is the newest.
#[tokio::test]
async fn a_link_goes_over_to_a_session_that_is_opened_anew_and_is_served_until_then() {
    let bench = Bench::new(64, Duration::from_secs(60));
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    tokio::spawn(serve(theirs, Arc::clone(&bench.links)));
    let mut nebd = RingNebd::open(ours, "volume").await;
    let old = Arc::clone(bench.links.registry.sessions().first().expect("is open"));
    bench.engine.away.store(true, Ordering::Release);
    let reopening = Reopening::new(Arc::clone(&bench.links), TaskTracker::new(), bench.leaving.clone());
    reopening.begin(vec![Arc::clone(&old)]);
    bench.until(|log| log.contains(&("away", 0))).await;
    let page = [piece(0, 0, 512)];
    assert_eq!(nebd.ask(1000, BlockOp::Write, 0, 512, &page).await, DONE, "served meanwhile");
    nebd.push(&request(1, BlockOp::Write, 0, 512), &page);
    nebd.ring.publish();
    bench.until(|log| log.contains(&("start", 1))).await;
    bench.engine.away.store(false, Ordering::Release);
    reopening.ended().await;
    let answer = nebd.next().await;
    assert_eq!((answer.id.get(), answer.completion), (1, Completion::Withdrawn));
    assert_eq!(nebd.control.next().await, Some((Message::Renewed { epoch: Epoch::new(7) }, Vec::new())));
    assert_eq!(nebd.control.next().await, Some((Message::Resized { size: SIZE }, Vec::new())));
    bench.engine.gate.add_permits(1);
    assert_eq!(nebd.ask(1, BlockOp::Write, 0, 512, &page).await, DONE);
    let new = Arc::clone(bench.links.registry.sessions().first().expect("is open"));
    assert!(!Arc::ptr_eq(&old, &new) && (old.links(), new.links()) == (0, 1));
}

#[tokio::test]
async fn a_link_over_its_socket_can_not_be_given_away() {
    let bench = Bench::new(64, Duration::from_secs(60));
    let mut nebd = bench.link(1, Mode::Open).await;
    assert!(freeze(&bench, Duration::ZERO).await.is_none());
    assert_eq!(nebd.ask(1000, BlockOp::Flush, 0, 0, &[]).await.0, Completion::Done(()), "it is served on");
}

#[tokio::test]
async fn progress_is_what_every_link_makes_and_nothing_less() {
    let bench = Bench::new(64, Duration::from_secs(60));
    let mut nebd = bench.link(1, Mode::Open).await;
    nebd.request(1, BlockOp::Write, 0, 512, &[0; 512]).await;
    bench.until(|log| log.contains(&("start", 1))).await;
    let served = tokio::time::timeout(PATIENCE, progress(&bench.links.registry)).await;
    served.expect("a request that waits for its disk is no reason");
    // Its nebd goes: the link waits for the request, and is asked all the same.
    drop(nebd);
    let links = Arc::clone(&bench.links);
    for _ in 0..50 {
        let asked = tokio::time::timeout(PATIENCE, progress(&links.registry)).await;
        asked.expect("a link that winds up is no reason");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // A member whose task does nothing.
    let session = Arc::clone(bench.links.registry.sessions().first().expect("is open"));
    let (socket, _theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let socket = Arc::new(socket.into());
    let hangs = session.join(Caller { instance: InstanceId(77), socket: &socket, ring: true });
    let hung = tokio::time::timeout(Duration::from_millis(50), progress(&bench.links.registry)).await;
    assert!(hung.is_err(), "it has not answered");
    drop(hangs);
    tokio::time::timeout(PATIENCE, progress(&bench.links.registry)).await.expect("it is gone");
}
