//! Links over real sockets: with the file engine through a whole gateway, and with an engine whose requests end when
//! the test says so.

mod rings;

use super::*;
use crate::config::Config;
use crate::engine::{Engine, EngineTraits, OpenError, Opener, Standing, Wanted};
use crate::gateway::Gateway;
use crate::registry::SessionLimits;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use spline_link::{
    HEADER_BYTES, Header, Hello, Identity, InstanceId, Message, Mode, Refusal, VersionRange, Welcome,
};
use spline_types::{
    BlockOp, BlockSize, ByteRange, Completion, Epoch, Extent, Geometry, Invalid, OnUnavailable, RequestId,
    VolumeName,
};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

const SIZE: u64 = 4 << 20;
/// The session that a gated engine has.
const RESUME: Mode = Mode::Resume { epoch: Epoch::new(7) };

/// The volume that a gated engine is.
fn gated_volume() -> Identity {
    Identity::new(0, 11).expect("not 0")
}

/// The other side of a link.
struct Nebd {
    stream: UnixStream,
}

impl Nebd {
    /// Whoever resumes knows the gated engine's volume, whoever begins knows none.
    async fn hello(
        stream: UnixStream,
        volume: &str,
        instance: u64,
        mode: Mode,
        read_only: bool,
    ) -> (Self, Welcome) {
        let known = (mode != Mode::Open).then(gated_volume);
        Self::knowing(stream, volume, instance, (mode, known), read_only).await
    }

    async fn knowing(
        mut stream: UnixStream,
        volume: &str,
        instance: u64,
        (mode, identity): (Mode, Option<Identity>),
        read_only: bool,
    ) -> (Self, Welcome) {
        let volume: VolumeName = volume.parse().expect("a name");
        let instance = InstanceId(instance);
        let hello = Hello {
            versions: VersionRange::OURS,
            features: 0,
            mode,
            read_only,
            force: false,
            instance,
            identity,
            volume,
        };
        stream.write_all(&hello.encode()).await.expect("sends");
        let mut bytes = Vec::new();
        loop {
            if let Some((welcome, used)) = Welcome::decode(&bytes).expect("a welcome") {
                assert_eq!(used, bytes.len(), "nothing comes before a request");
                return (Self { stream }, welcome);
            }
            assert!(stream.read_buf(&mut bytes).await.expect("reads") > 0, "closed without a welcome");
        }
    }

    async fn open(stream: UnixStream, volume: &str, instance: u64, mode: Mode) -> Self {
        let (nebd, welcome) = Self::hello(stream, volume, instance, mode, false).await;
        assert!(matches!(welcome, Welcome::Accepted(_)), "{welcome:?}");
        nebd
    }

    async fn send(&mut self, message: Message, payload: &[u8]) {
        let header = Header { message, payload: payload.len() as u32 };
        self.stream.write_all(&[&header.encode(), payload].concat()).await.expect("sends");
    }

    async fn request(&mut self, id: u64, op: BlockOp, offset: u64, length: u64, payload: &[u8]) {
        self.send(Message::Request(request(id, op, offset, length)), payload).await;
    }

    /// The next frame; `None` once the gateway has closed the socket.
    async fn next(&mut self) -> Option<(Message, Vec<u8>)> {
        let mut bytes = [0; HEADER_BYTES];
        self.stream.read_exact(&mut bytes).await.ok()?;
        let header = Header::decode(&bytes).expect("a frame");
        let mut payload = vec![0; header.payload as usize];
        self.stream.read_exact(&mut payload).await.expect("a payload");
        Some((header.message, payload))
    }

    async fn ask(
        &mut self,
        id: u64,
        op: BlockOp,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> (Completion, Vec<u8>) {
        self.request(id, op, offset, length, payload).await;
        match self.next().await {
            Some((Message::Reply { id: answered, completion }, payload)) if answered.get() == id => {
                (completion, payload)
            }
            other => panic!("answered with {other:?}"),
        }
    }
}

fn request(id: u64, op: BlockOp, offset: u64, length: u64) -> BlockRequest {
    BlockRequest {
        id: RequestId::new(id),
        op,
        range: ByteRange::new(offset, length).expect("fits"),
        fua: false,
    }
}

fn done(id: u64) -> Option<(Message, Vec<u8>)> {
    Some((Message::Reply { id: RequestId::new(id), completion: Completion::Done(()) }, Vec::new()))
}

async fn file_gateway(dir: &Path, change: impl FnOnce(&mut Config)) -> (Gateway, String) {
    let image = dir.join("disk");
    std::fs::File::create(&image).expect("creates").set_len(SIZE).expect("sizes");
    let mut config = Config {
        link_socket: dir.join("gateway.sock"),
        admin_listen: None,
        mds: Vec::new(),
        file_roots: vec![dir.to_owned()],
        ..Config::default()
    };
    change(&mut config);
    let gateway = Gateway::start(config, &mut Default::default()).await.expect("starts");
    (gateway, format!("file:{}", image.display()))
}

async fn connect(gateway: &Gateway) -> UnixStream {
    UnixStream::connect(gateway.link_path()).await.expect("connects")
}

#[tokio::test]
async fn a_file_is_served() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |_| {}).await;
    let (mut nebd, welcome) = Nebd::hello(connect(&gateway).await, &volume, 1, Mode::Open, false).await;
    let Welcome::Accepted(accepted) = welcome else { panic!("{welcome:?}") };
    assert_eq!((accepted.geometry.size, accepted.traits.volatile_cache), (SIZE, true));
    let data: Vec<u8> = (0..300_000u32).map(|n| (n / 7) as u8).collect();
    let nothing = (Completion::Done(()), Vec::new());
    assert_eq!(nebd.ask(1, BlockOp::Write, 4096, 300_000, &data).await, nothing);
    assert_eq!(nebd.ask(2, BlockOp::Flush, 0, 0, &[]).await, nothing);
    let (completion, read) = nebd.ask(3, BlockOp::Read, 4096, 300_000, &[]).await;
    assert!(completion == Completion::Done(()) && read == data);
    assert_eq!(nebd.ask(4, BlockOp::WriteZeroes { no_hole: false, fast: true }, 0, 8192, &[]).await, nothing);
    assert_eq!(nebd.ask(5, BlockOp::Read, 8000, 192, &[]).await, (Completion::Done(()), vec![0; 192]));
    let (_, extents) = nebd.ask(6, BlockOp::Status, SIZE - 4096, 4096, &[]).await;
    let hole = Extent { length: 4096, hole: true, zero: true };
    assert_eq!(spline_link::extents::decode(&extents, 4096), Ok(vec![hole]));
    let past_end = Completion::Failed(Fault::Invalid(Invalid::PastEnd));
    assert_eq!(nebd.ask(7, BlockOp::Write, SIZE - 512, 1024, &[0; 1024]).await.0, past_end);
    assert_eq!(nebd.ask(8, BlockOp::Read, u64::MAX - 512, 512, &[]).await.0, past_end);
    let (mut reader, _) = Nebd::hello(connect(&gateway).await, &volume, 2, Mode::Open, true).await;
    let refused = reader.ask(1, BlockOp::Discard, 0, 4096, &[]).await.0;
    assert_eq!(refused, Completion::Failed(Fault::ReadOnly));
    gateway.shutdown().await;
    assert_eq!(nebd.next().await, Some((Message::Leaving, Vec::new())));
    assert_eq!(nebd.next().await, None);
}

#[tokio::test]
async fn every_request_of_a_burst_is_answered_once() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |config| config.inflight_requests = 8).await;
    let mut nebd = Nebd::open(connect(&gateway).await, &volume, 1, Mode::Open).await;
    let mut burst = Vec::new();
    for id in 0..500u64 {
        let block = id % 100 * 4096;
        let write = id < 100;
        let op = if write { BlockOp::Write } else { BlockOp::Read };
        let header = Header::request(request(id, op, block, 4096));
        burst.extend_from_slice(&header.encode());
        if write {
            burst.extend_from_slice(&[id as u8 + 1; 4096]);
        }
        if id == 99 {
            // Reads follow when the writes are answered: what overlaps may be carried out in any order.
            nebd.stream.write_all(&std::mem::take(&mut burst)).await.expect("sends");
            let mut ids: Vec<u64> = Vec::new();
            for _ in 0..100 {
                let Some((Message::Reply { id, completion: Completion::Done(()) }, _)) = nebd.next().await
                else {
                    panic!()
                };
                ids.push(id.get());
            }
            ids.sort_unstable();
            assert_eq!(ids, (0..100).collect::<Vec<_>>());
        }
    }
    nebd.stream.write_all(&burst).await.expect("sends");
    let mut seen = [false; 500];
    for _ in 100..500 {
        let Some((Message::Reply { id, completion: Completion::Done(()) }, payload)) = nebd.next().await
        else {
            panic!()
        };
        let id = id.get();
        assert!(!std::mem::replace(&mut seen[id as usize], true), "answered twice: id={id}");
        assert!(payload.len() == 4096 && payload.iter().all(|byte| *byte == (id % 100) as u8 + 1), "id={id}");
    }
    gateway.shutdown().await;
}

#[tokio::test]
async fn what_breaks_the_contract_cuts_only_its_own_link() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |_| {}).await;
    let mut good = Nebd::open(connect(&gateway).await, &volume, 1, Mode::Open).await;
    for bytes in [&b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n"[..], &[0; 300], &[0xff; 32]] {
        let mut stream = connect(&gateway).await;
        stream.write_all(bytes).await.expect("sends");
        assert_eq!(stream.read(&mut [0; 16]).await.unwrap_or(0), 0, "cut without a word");
    }
    let mut bad = Nebd::open(connect(&gateway).await, &volume, 2, Mode::Open).await;
    bad.send(Message::Leaving, &[]).await;
    assert_eq!(bad.next().await, None, "only a gateway leaves");
    let mut half = Nebd::open(connect(&gateway).await, &volume, 3, Mode::Open).await;
    half.request(1, BlockOp::Write, 0, 1 << 20, &[]).await;
    drop(half);
    for (name, refusal) in [("file:/etc/passwd", Refusal::NotFound), ("no-such-volume", Refusal::NotFound)] {
        let (_, welcome) = Nebd::hello(connect(&gateway).await, name, 4, Mode::Open, false).await;
        assert!(matches!(&welcome, Welcome::Refused(refused) if refused.refusal == refusal), "{welcome:?}");
    }
    assert_eq!(good.ask(1, BlockOp::Read, 0, 512, &[]).await, (Completion::Done(()), vec![0; 512]));
    gateway.shutdown().await;
}

/// An engine whose requests end when the test says so. What happens is written down in order.
struct Gated {
    /// 0: as a file, which knows no sessions.
    epoch: Epoch,
    log: Arc<Mutex<Vec<(&'static str, u64)>>>,
    /// One permit lets one request end; requests from id 1000 on need none.
    gate: Arc<Semaphore>,
    standing: watch::Sender<Standing>,
    /// Another gateway has the volume, which only the proof finds out; the next open takes it back.
    over: Arc<AtomicBool>,
    /// The volume has another name by now.
    renamed: Arc<AtomicBool>,
    /// One permit lets one proof end, without one the metadata server is away.
    proofs: Arc<Semaphore>,
    /// Nothing can be opened.
    away: Arc<AtomicBool>,
    size: Arc<AtomicU64>,
}

impl Engine for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn geometry(&self) -> Geometry {
        Geometry { size: self.size.load(Ordering::Acquire), block_size: BlockSize::B512 }
    }

    fn traits(&self) -> EngineTraits {
        EngineTraits {
            volatile_cache: false,
            read_only: false,
            fast_zero: true,
            rotational: false,
            identity: gated_volume(),
            epoch: self.epoch,
            run_since: Epoch::new(5),
            on_unavailable: OnUnavailable::Wait,
        }
    }

    fn prove(&self, by_name: bool) -> BoxFuture<'_, Result<(), OpenError>> {
        Box::pin(async move {
            self.log.lock().expect("unpoisoned").push(("prove", 0));
            self.proofs.acquire().await.expect("open").forget();
            if self.over.load(Ordering::Acquire) {
                self.standing.send_modify(|now| now.lost = true);
            }
            match by_name && self.renamed.load(Ordering::Acquire) {
                true => Err(OpenError::Unavailable("renamed".to_owned())),
                false => Ok(()),
            }
        })
    }

    fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    fn execute(&self, request: BlockRequest, _: Bytes) -> BoxFuture<'static, Result<EngineAnswer, Fault>> {
        let (log, gate, id) = (Arc::clone(&self.log), Arc::clone(&self.gate), request.id.get());
        Box::pin(async move {
            log.lock().expect("unpoisoned").push(("start", id));
            if id < 1000 {
                gate.acquire().await.expect("open").forget();
            }
            log.lock().expect("unpoisoned").push(("end", id));
            Ok(match request.op {
                BlockOp::Read => EngineAnswer::Data(vec![vec![7; request.range.length() as usize].into()]),
                _ => EngineAnswer::Done,
            })
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async { self.log.lock().expect("unpoisoned").push(("close", 0)) })
    }
}

struct One(Arc<Gated>);

impl Opener for One {
    fn open<'a>(&'a self, _: &'a VolumeName, _: Wanted) -> BoxFuture<'a, Result<Arc<dyn Engine>, OpenError>> {
        let (log, gate) = (Arc::clone(&self.0.log), Arc::clone(&self.0.gate));
        let (over, proofs) = (Arc::clone(&self.0.over), Arc::clone(&self.0.proofs));
        let (renamed, away) = (Arc::clone(&self.0.renamed), Arc::clone(&self.0.away));
        let (size, epoch) = (Arc::clone(&self.0.size), self.0.epoch);
        let standing = match over.swap(false, Ordering::AcqRel) {
            true => watch::Sender::new(Standing { size: SIZE, lost: false }),
            false => self.0.standing.clone(),
        };
        Box::pin(async move {
            if away.load(Ordering::Acquire) {
                log.lock().expect("unpoisoned").push(("away", 0));
                return Err(OpenError::Unavailable("away".to_owned()));
            }
            let engine = Gated { epoch, log, gate, standing, over, renamed, proofs, away, size };
            Ok(Arc::new(engine) as Arc<dyn Engine>)
        })
    }

    fn stop(&self) {}
}

/// Links to a gated engine.
struct Bench {
    engine: Arc<Gated>,
    links: Arc<Links>,
    leaving: CancellationToken,
}

impl Bench {
    fn new(requests: usize, grace: Duration) -> Self {
        Self::of_epoch(Epoch::new(7), requests, grace)
    }

    fn of_epoch(epoch: Epoch, requests: usize, grace: Duration) -> Self {
        let standing = watch::Sender::new(Standing { size: SIZE, lost: false });
        let (log, gate, over) = (Arc::default(), Arc::new(Semaphore::new(0)), Arc::default());
        let proofs = Arc::new(Semaphore::new(1000));
        let (renamed, away) = (Arc::default(), Arc::default());
        let size = Arc::new(AtomicU64::new(SIZE));
        let engine = Arc::new(Gated { epoch, log, gate, standing, over, renamed, proofs, away, size });
        let metrics = Arc::new(Metrics::new(&mut Default::default()));
        let leaving = CancellationToken::new();
        let limits = SessionLimits { requests, bytes: 64 << 20, grace };
        let opener = Box::new(One(Arc::clone(&engine)));
        let registry = Arc::new(Registry::new(opener, limits, Arc::clone(&metrics), leaving.clone()));
        let drain_limit = Duration::from_millis(200);
        let links = Arc::new(Links {
            registry,
            metrics,
            buffers: BufferPool::new(),
            drain_limit,
            threads: LaneThreads::new(true),
        });
        Self { engine, links, leaving }
    }

    async fn link(&self, instance: u64, mode: Mode) -> Nebd {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        tokio::spawn(serve(theirs, Arc::clone(&self.links)));
        Nebd::open(ours, "volume", instance, mode).await
    }

    /// What happened to requests and sessions.
    fn log(&self) -> Vec<(&'static str, u64)> {
        let log = self.engine.log.lock().expect("unpoisoned");
        log.iter().copied().filter(|(what, _)| *what != "prove").collect()
    }

    fn proofs_asked(&self) -> usize {
        self.engine.log.lock().expect("unpoisoned").iter().filter(|(what, _)| *what == "prove").count()
    }

    async fn until(&self, what: impl Fn(&[(&'static str, u64)]) -> bool) {
        let wait = async {
            while !what(&self.log()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
        assert!(waited.is_ok(), "does not come to pass: {:?}", self.log());
    }
}

#[tokio::test]
async fn a_new_link_waits_for_the_requests_of_the_old_one() {
    let bench = Bench::new(16, Duration::from_secs(60));
    // The same nebd comes back; and another one, after the first has died.
    for (old, new) in [(1, 1), (2, 3)] {
        bench.engine.log.lock().expect("unpoisoned").clear();
        let mut other = bench.link(99, Mode::Open).await;
        let mut first = bench.link(old, Mode::Open).await;
        first.request(1, BlockOp::Write, 0, 512, &[0; 512]).await;
        bench.until(|log| log == [("start", 1)]).await;
        drop(first);
        let mut second = bench.link(new, RESUME).await;
        second.request(2, BlockOp::Write, 0, 512, &[0; 512]).await;
        // Whoever was there before is served meanwhile, which also gives the second link all the time to go wrong.
        for id in 1000..1010 {
            assert_eq!(other.ask(id, BlockOp::Flush, 0, 0, &[]).await.0, Completion::Done(()));
        }
        assert!(!bench.log().contains(&("start", 2)), "served too early: {:?}", bench.log());
        bench.engine.gate.add_permits(2);
        assert_eq!(second.next().await, done(2));
        let ours: Vec<_> = bench.log().into_iter().filter(|(_, id)| *id < 1000).collect();
        assert_eq!(ours, [("start", 1), ("end", 1), ("start", 2), ("end", 2)]);
    }
}

#[tokio::test]
async fn a_link_from_before_another_gateway_had_the_volume_is_refused() {
    let bench = Bench::new(16, Duration::from_secs(60));
    bench.link(1, Mode::Open).await;
    for (epoch, fits) in [(4, false), (5, true), (7, true)] {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        tokio::spawn(serve(theirs, Arc::clone(&bench.links)));
        let mode = Mode::Resume { epoch: Epoch::new(epoch) };
        match Nebd::hello(ours, "volume", 2, mode, false).await.1 {
            Welcome::Accepted(_) => assert!(fits, "epoch={epoch}"),
            Welcome::Refused(refused) => {
                assert!(!fits && refused.refusal == Refusal::Held, "{refused:?}");
                assert!(refused.text.contains("resumed_epoch=4 run_since=5"), "{refused:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_link_that_knows_another_volume_by_the_name_is_refused() {
    let bench = Bench::new(16, Duration::from_secs(60));
    let mut first = bench.link(1, Mode::Open).await;
    for (mode, known, fits) in
        [(RESUME, 12, false), (Mode::Open, 12, false), (RESUME, 11, true), (Mode::Open, 11, true)]
    {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        tokio::spawn(serve(theirs, Arc::clone(&bench.links)));
        match Nebd::knowing(ours, "volume", 2, (mode, Identity::new(0, known)), false).await.1 {
            Welcome::Accepted(accepted) => assert!(fits && accepted.identity == gated_volume(), "{mode:?}"),
            Welcome::Refused(refused) => {
                assert!(!fits && refused.refusal == Refusal::Replaced, "{refused:?}");
                assert!(refused.text.contains("identity=11 known=12"), "{refused:?}");
            }
        }
    }
    // Renamed since, the session is its volume's still, but not that of whoever knows the name only.
    bench.engine.renamed.store(true, Ordering::Release);
    for (known, fits) in [(None, false), (Some(gated_volume()), true)] {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        tokio::spawn(serve(theirs, Arc::clone(&bench.links)));
        let welcome = Nebd::knowing(ours, "volume", 3, (Mode::Open, known), false).await.1;
        let refused = matches!(&welcome, Welcome::Refused(why) if why.refusal == Refusal::Unavailable);
        assert_eq!(refused, !fits, "{welcome:?}");
    }
    assert_eq!(first.ask(1000, BlockOp::Flush, 0, 0, &[]).await.0, Completion::Done(()));
}

#[tokio::test]
async fn a_link_that_begins_does_not_join_a_session_that_is_over() {
    let bench = Bench::new(16, Duration::from_secs(60));
    let mut first = bench.link(1, Mode::Open).await;
    bench.engine.over.store(true, Ordering::Release);
    // One that resumes is not held up by a metadata server that may be away.
    let mut resumed = bench.link(2, RESUME).await;
    assert_eq!(resumed.ask(1000, BlockOp::Flush, 0, 0, &[]).await.0, Completion::Done(()));
    let mut second = bench.link(3, Mode::Open).await;
    assert_eq!(second.ask(1001, BlockOp::Flush, 0, 0, &[]).await.0, Completion::Done(()));
    for lost in [&mut first, &mut resumed] {
        assert_eq!(lost.next().await, Some((Message::Lost, Vec::new())));
    }
    assert_eq!(second.ask(1002, BlockOp::Flush, 0, 0, &[]).await.0, Completion::Done(()));
    assert!(bench.log().contains(&("close", 0)), "{:?}", bench.log());
}

#[tokio::test]
async fn a_link_that_resumes_does_not_wait_for_anothers_proof() {
    let bench = Bench::new(16, Duration::from_secs(60));
    bench.link(1, Mode::Open).await;
    bench.engine.proofs.forget_permits(1000);
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    tokio::spawn(serve(theirs, Arc::clone(&bench.links)));
    let beginning = tokio::spawn(async move { Nebd::open(ours, "volume", 2, Mode::Open).await });
    bench.until(|_| bench.proofs_asked() == 1).await;
    let resumed = tokio::time::timeout(Duration::from_secs(20), bench.link(1, RESUME)).await;
    let mut resumed = resumed.expect("does not wait for the metadata server");
    assert_eq!(resumed.ask(1000, BlockOp::Flush, 0, 0, &[]).await.0, Completion::Done(()));
    assert!(!beginning.is_finished(), "its session is not proven yet");
    // The session is lost by the time the answer is there: the one that began gets a new one.
    bench.engine.over.store(true, Ordering::Release);
    bench.engine.proofs.add_permits(1);
    let mut begun = beginning.await.expect("no panic");
    assert_eq!(begun.ask(1001, BlockOp::Flush, 0, 0, &[]).await.0, Completion::Done(()));
    assert_eq!(resumed.next().await, Some((Message::Lost, Vec::new())));
}

#[tokio::test]
async fn an_older_nebd_is_told_which_versions_there_are() {
    let bench = Bench::new(16, Duration::from_secs(60));
    let (mut ours, theirs) = UnixStream::pair().expect("a pair");
    tokio::spawn(serve(theirs, Arc::clone(&bench.links)));
    // A hello of version 1, whole, and too short for version 3.
    ours.write_all(b"SPLH\x01\0\x01\0\0\0\0\0\0\0\0\0\x01\0\x01\0\0\0\0\0\x07\0\0\0\0\0\0\0v")
        .await
        .expect("sends");
    let mut bytes = Vec::new();
    while ours.read_buf(&mut bytes).await.unwrap_or(0) > 0 {}
    let Some((Welcome::Refused(refused), _)) = Welcome::decode(&bytes).expect("a welcome") else { panic!() };
    assert_eq!(refused.refusal, Refusal::Version);
    assert!(refused.text.contains("theirs_max=1 ours_min=3"), "{refused:?}");
}

#[tokio::test]
async fn admission_limits_what_is_started() {
    let bench = Bench::new(2, Duration::from_secs(60));
    let mut nebd = bench.link(1, Mode::Open).await;
    for id in 1..=4 {
        nebd.request(id, BlockOp::Write, 0, 512, &[0; 512]).await;
    }
    bench.until(|log| log.len() == 2).await;
    let session = bench.links.registry.sessions().pop().expect("open");
    assert_eq!(session.admission.inflight(), (2, 1024));
    bench.engine.gate.add_permits(1);
    nebd.next().await.expect("one is answered");
    bench.until(|log| log.iter().filter(|(what, _)| *what == "start").count() == 3).await;
    bench.engine.gate.add_permits(3);
    for _ in 0..3 {
        nebd.next().await.expect("an answer");
    }
}

#[tokio::test]
async fn a_gateway_that_leaves_answers_what_ends_and_withdraws_the_rest() {
    let bench = Bench::new(16, Duration::from_secs(60));
    let mut nebd = bench.link(1, Mode::Open).await;
    nebd.request(1, BlockOp::Flush, 0, 0, &[]).await;
    nebd.request(2, BlockOp::Flush, 0, 0, &[]).await;
    bench.until(|log| log.len() == 2).await;
    bench.leaving.cancel();
    bench.engine.gate.add_permits(1);
    assert_eq!(nebd.next().await, done(1));
    assert_eq!(nebd.next().await, Some((Message::Leaving, Vec::new())));
    assert_eq!(nebd.next().await, None);
    bench.links.registry.close_all().await;
    assert_eq!(bench.log().last(), Some(&("close", 0)));
    assert!(bench.links.registry.sessions().is_empty());
}

#[tokio::test]
async fn links_hear_of_a_new_size_and_of_a_lost_session() {
    let bench = Bench::new(16, Duration::from_secs(60));
    let mut nebd = bench.link(1, Mode::Open).await;
    bench.engine.standing.send_modify(|now| now.size = 2 * SIZE);
    assert_eq!(nebd.next().await, Some((Message::Resized { size: 2 * SIZE }, Vec::new())));
    bench.engine.standing.send_modify(|now| now.lost = true);
    assert_eq!(nebd.next().await, Some((Message::Lost, Vec::new())));
    assert_eq!(nebd.next().await, None);
    bench.until(|log| log == [("close", 0)]).await;
}

#[tokio::test]
async fn a_session_ends_with_its_last_link() {
    let bench = Bench::new(16, Duration::from_secs(600));
    let mut first = bench.link(1, Mode::Open).await;
    let second = bench.link(2, Mode::Open).await;
    first.request(1, BlockOp::Flush, 0, 0, &[]).await;
    first.send(Message::Detach, &[]).await;
    bench.engine.gate.add_permits(1);
    assert_eq!(first.next().await, done(1), "what came before the detach is answered");
    assert_eq!(first.next().await, None);
    assert!(!bench.log().contains(&("close", 0)), "another link is still there");
    drop(second);
    let mut last = bench.link(3, Mode::Open).await;
    last.send(Message::Detach, &[]).await;
    bench.until(|log| log.last() == Some(&("close", 0))).await;

    let bench = Bench::new(16, Duration::ZERO);
    drop(bench.link(1, Mode::Open).await);
    bench.until(|log| log == [("close", 0)]).await;
}

#[tokio::test]
async fn a_nebd_that_detaches_and_takes_nothing_does_not_keep_its_link() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (gateway, volume) = file_gateway(dir.path(), |config| config.session_grace = Duration::ZERO).await;
    let mut nebd = Nebd::open(connect(&gateway).await, &volume, 1, Mode::Open).await;
    // More than a socket holds.
    for id in 0..4 {
        nebd.request(id, BlockOp::Read, 0, SIZE, &[]).await;
    }
    nebd.send(Message::Detach, &[]).await;
    let image = std::fs::File::open(dir.path().join("disk")).expect("opens");
    let given_back = async {
        // The lock is the engine's, which ends with its last link.
        while image.try_lock().is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), given_back).await.expect("the link ends");
    drop(nebd);
    gateway.shutdown().await;
}

#[tokio::test]
async fn closing_a_volume_lets_its_links_leave() {
    let bench = Bench::new(16, Duration::from_secs(600));
    let mut nebd = bench.link(1, Mode::Open).await;
    let name: VolumeName = "volume".parse().expect("a name");
    assert!(bench.links.registry.close_volume(&name).await);
    assert_eq!(nebd.next().await, Some((Message::Leaving, Vec::new())));
    assert_eq!(bench.log(), [("close", 0)]);
    assert!(!bench.links.registry.close_volume(&name).await);
    bench.link(1, RESUME).await;
}
