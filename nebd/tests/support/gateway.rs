//! A gateway for tests: speaks the link over a real unix socket, keeps the volume in memory, and does what a test tells
//! it to: hold answers, withdraw, refuse, lie, leave, die. With or without a ring.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use spline_link::memory::SharedMemory;
use spline_link::ring::{GatewayRing, Piece, Position, RingAnswer, RingFds};
use spline_link::{
    Accepted, FEATURE_RING, HEADER_BYTES, Header, Hello, Identity, LinkVersion, Message, Mode, Refusal,
    Refused, VolumeTraits, Welcome, extents, passing,
};
use spline_types::{
    BlockOp, BlockRequest, BlockSize, ByteRange, Completion, Epoch, Extent, Fault, Geometry, OnUnavailable,
    RequestId,
};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// What the gateway does with requests.
#[allow(dead_code, reason = "not every test that shares this file needs all of it")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Manner {
    Answer,
    /// Takes requests and says nothing.
    Hold,
    /// Over a ring: carries requests out once the manner is another.
    Delay,
    /// Over a ring: answers what is there, the newest first.
    Backwards,
    /// Over a ring: says that a read brought extents.
    Overpay,
    /// Over a ring: claims to have answered more than was asked.
    Miscount,
    Withdraw,
    Fail(Fault),
    /// Answers requests that nobody sent.
    Lie,
}

#[allow(dead_code, reason = "not every test that shares this file needs all of it")]
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) manner: Manner,
    pub(crate) refuse: Option<Refusal>,
    pub(crate) on_unavailable: OnUnavailable,
    /// Most data of requests that nebd may have unanswered.
    pub(crate) bytes_max: u64,
    /// The volume that has the name; a nebd that knows another is refused.
    pub(crate) identity: Identity,
    pub(crate) links: Vec<Mode>,
    /// Link number and request, as they came.
    pub(crate) received: Vec<(usize, BlockRequest)>,
    /// How many completions were sent.
    pub(crate) answered: usize,
    /// Over rings: what requests named, and the regions that were passed on.
    pub(crate) pieces: Vec<Piece>,
    pub(crate) regions: Vec<Arc<SharedMemory>>,
    pub(crate) detached: bool,
    ring: bool,
    epoch: u64,
    image: Vec<u8>,
    streams: Vec<UnixStream>,
    /// How often it died: who listened before is another one.
    deaths: u64,
}

#[derive(Clone)]
pub(crate) struct FakeGateway {
    path: PathBuf,
    shared: Arc<(Mutex<Control>, Condvar)>,
}

const PATIENCE: Duration = Duration::from_secs(20);

impl FakeGateway {
    /// A gateway that does not listen yet.
    pub(crate) fn new(path: &Path, size: u64, ring: bool) -> Self {
        let control = Control {
            manner: Manner::Answer,
            refuse: None,
            on_unavailable: OnUnavailable::Wait,
            bytes_max: 64 << 20,
            identity: Identity::new(0, 1).expect("not 0"),
            links: Vec::new(),
            received: Vec::new(),
            answered: 0,
            pieces: Vec::new(),
            regions: Vec::new(),
            detached: false,
            ring,
            epoch: 0,
            image: vec![0; size as usize],
            streams: Vec::new(),
            deaths: 0,
        };
        Self { path: path.to_owned(), shared: Arc::new((Mutex::new(control), Condvar::new())) }
    }

    /// Listens; after a [`kill`](Self::kill) this is the next gateway.
    pub(crate) fn listen(&self) {
        let _ = std::fs::remove_file(&self.path);
        let listener = UnixListener::bind(&self.path).expect("binds");
        let lived = self.lock().deaths;
        let gateway = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.expect("accepts");
                let mut control = gateway.lock();
                if control.deaths != lived {
                    return;
                }
                control.streams.push(stream.try_clone().expect("clones"));
                drop(control);
                let gateway = gateway.clone();
                std::thread::spawn(move || gateway.serve(stream));
            }
        });
    }

    /// Dies as by kill -9: every link drops, nobody listens.
    pub(crate) fn kill(&self) {
        let mut control = self.lock();
        control.deaths += 1;
        for stream in control.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(control);
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Control> {
        self.shared.0.lock().expect("no test thread panicked")
    }

    /// Waits until `holds` is true.
    pub(crate) fn wait(&self, what: &str, mut holds: impl FnMut(&Control) -> bool) {
        let guard = self.lock();
        let (_guard, late) =
            self.shared.1.wait_timeout_while(guard, PATIENCE, |control| !holds(control)).expect("no panic");
        assert!(!late.timed_out(), "waited too long until {what}");
    }

    /// Sends a message without a payload on every link.
    pub(crate) fn say(&self, message: &Message) {
        let bytes = Header::bare(message.clone()).encode();
        for stream in &mut self.lock().streams {
            stream.write_all(&bytes).expect("writes");
        }
    }

    fn serve(&self, mut stream: UnixStream) {
        let Some((number, ring)) = self.greet(&mut stream) else { return };
        if let Some(ring) = ring {
            return Ringed::new(self.clone(), number, stream, ring).serve();
        }
        let mut head = [0; HEADER_BYTES];
        while stream.read_exact(&mut head).is_ok() {
            let header = Header::decode(&head).expect("nebd keeps the contract");
            let mut payload = vec![0; header.payload as usize];
            if stream.read_exact(&mut payload).is_err() {
                return;
            }
            let request = match header.message {
                Message::Request(request) => request,
                Message::Detach => {
                    self.lock().detached = true;
                    self.shared.1.notify_all();
                    continue;
                }
                other => panic!("nebd said {other:?}"),
            };
            let manner = self.note(number, request);
            let Some((id, completion, data)) = self.answer(manner, &request, &payload) else { continue };
            let mut reply = Header::reply(id, completion, data.len() as u32).encode().to_vec();
            reply.extend_from_slice(&data);
            if stream.write_all(&reply).is_err() {
                return;
            }
            self.answered();
        }
    }

    fn greet(&self, stream: &mut UnixStream) -> Option<(usize, Option<RingFds>)> {
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        let hello = loop {
            // nebd waits for the welcome before it says more.
            let mut part = [0; 512];
            match receive(stream, &mut part, &mut fds, -1)? {
                0 => return None,
                count => bytes.extend_from_slice(&part[..count]),
            }
            if let Some((hello, _)) = Hello::decode(&bytes).expect("nebd keeps the contract") {
                break hello;
            }
        };
        let mut control = self.lock();
        control.links.push(hello.mode);
        control.epoch += 1;
        let ring = match <[OwnedFd; 3]>::try_from(fds) {
            Ok([memory, to_gateway, to_nebd]) if control.ring => {
                assert_eq!(hello.features & FEATURE_RING, FEATURE_RING);
                Some(RingFds { memory, to_gateway, to_nebd })
            }
            _ => None,
        };
        let replaced = hello.identity.is_some_and(|known| known != control.identity);
        let welcome = match control.refuse.or(replaced.then_some(Refusal::Replaced)) {
            Some(refusal) => Welcome::Refused(Refused { refusal, text: format!("refused as {refusal:?}") }),
            None => Welcome::Accepted(Accepted {
                version: if control.ring { LinkVersion::V4 } else { LinkVersion::V3 },
                features: if ring.is_some() { FEATURE_RING } else { 0 },
                epoch: Epoch::new(control.epoch),
                identity: control.identity,
                geometry: Geometry { size: control.image.len() as u64, block_size: BlockSize::B4096 },
                traits: VolumeTraits::default(),
                on_unavailable: control.on_unavailable,
                request_bytes_max: 32 << 20,
                requests_max: 1024,
                bytes_max: control.bytes_max,
            }),
        };
        let number = control.links.len() - 1;
        drop(control);
        self.shared.1.notify_all();
        stream.write_all(&welcome.encode()).ok()?;
        matches!(welcome, Welcome::Accepted(_)).then_some((number, ring))
    }

    /// A request has come; the manner of that moment.
    fn note(&self, link: usize, request: BlockRequest) -> Manner {
        let mut control = self.lock();
        control.received.push((link, request));
        self.shared.1.notify_all();
        control.manner
    }

    fn answered(&self) {
        self.lock().answered += 1;
        self.shared.1.notify_all();
    }

    /// Carries a request out, if the manner is such. How it ended, and what it brings.
    fn answer(
        &self,
        manner: Manner,
        request: &BlockRequest,
        payload: &[u8],
    ) -> Option<(RequestId, Completion, Vec<u8>)> {
        let mut control = self.lock();
        let (id, completion) = match manner {
            Manner::Hold | Manner::Delay => return None,
            Manner::Answer | Manner::Backwards | Manner::Overpay | Manner::Miscount => {
                (request.id, Completion::Done(()))
            }
            Manner::Withdraw => (request.id, Completion::Withdrawn),
            Manner::Fail(fault) => (request.id, Completion::Failed(fault)),
            Manner::Lie => (RequestId::new(request.id.get() + 1000), Completion::Done(())),
        };
        let data = match manner {
            Manner::Answer | Manner::Backwards => execute(&mut control.image, request, payload),
            _ => Vec::new(),
        };
        Some((id, completion, data))
    }
}

/// Bytes and descriptors that come within `wait_ms` (-1: for ever); `None` if the link has failed.
fn receive(stream: &UnixStream, into: &mut [u8], fds: &mut Vec<OwnedFd>, wait_ms: i64) -> Option<usize> {
    let timeout = Timespec { tv_sec: 0, tv_nsec: wait_ms.max(0) * 1_000_000 };
    let timeout = (wait_ms >= 0).then_some(&timeout);
    poll(&mut [PollFd::new(stream, PollFlags::IN)], timeout).ok()?;
    passing::receive(stream.as_fd(), into, fds).ok()
}

/// A link with a ring.
struct Ringed {
    gateway: FakeGateway,
    number: usize,
    stream: UnixStream,
    ring: GatewayRing,
    bell: OwnedFd,
    to_nebd: OwnedFd,
    memory: SharedMemory,
    regions: BTreeMap<u32, Arc<SharedMemory>>,
    /// Less than a frame.
    partial: Vec<u8>,
    fds: Vec<OwnedFd>,
    held: Vec<(BlockRequest, Vec<Piece>)>,
}

impl Ringed {
    fn new(gateway: FakeGateway, number: usize, stream: UnixStream, fds: RingFds) -> Self {
        let (memory, to_nebd) =
            (fds.memory.try_clone().expect("clones"), fds.to_nebd.try_clone().expect("clones"));
        let bytes = rustix::fs::fstat(&memory).expect("stats").st_size as u64;
        let memory = SharedMemory::map(memory, 0, bytes).expect("maps");
        let (ring, bell) = GatewayRing::adopt(fds, Position::default()).expect("a ring of ours");
        let regions = BTreeMap::new();
        let (partial, fds, held) = (Vec::new(), Vec::new(), Vec::new());
        Self { gateway, number, stream, ring, bell, to_nebd, memory, regions, partial, fds, held }
    }

    fn serve(mut self) {
        while self.take_frames() {
            let mut taken = Vec::new();
            let mut pieces = Vec::new();
            while let Some(request) = self.ring.pop(&mut pieces).expect("nebd keeps the contract") {
                taken.push((request, pieces.clone()));
            }
            // A region was announced before the first request that names it was shown.
            if !self.take_frames() {
                return;
            }
            for (request, pieces) in taken {
                self.gateway.lock().pieces.extend_from_slice(&pieces);
                if self.gateway.note(self.number, request) != Manner::Hold {
                    self.held.push((request, pieces));
                }
            }
            self.answer();
            self.ring.publish();
            if self.ring.sleep().expect("nebd keeps the contract") {
                let mut either =
                    [PollFd::new(&self.stream, PollFlags::IN), PollFd::new(&self.bell, PollFlags::IN)];
                // The manner may change meanwhile.
                let moment = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
                poll(&mut either, Some(&moment)).expect("polls");
                let _ = rustix::io::read(&self.bell, &mut [0; 8]);
                self.ring.wake();
            }
        }
    }

    /// False if the link has ended.
    fn take_frames(&mut self) -> bool {
        let is_up = loop {
            let mut part = [0; 4096];
            match passing::receive(self.stream.as_fd(), &mut part, &mut self.fds) {
                Ok(0) => break false,
                Ok(count) => self.partial.extend_from_slice(&part[..count]),
                Err(error) => break error.kind() == ErrorKind::WouldBlock,
            }
        };
        while let Some((head, rest)) = self.partial.split_first_chunk::<HEADER_BYTES>() {
            let header = Header::decode(head).expect("nebd keeps the contract");
            self.partial = rest.to_vec();
            let mut control = self.gateway.lock();
            match header.message {
                Message::Region { number, offset, length } => {
                    let memory = SharedMemory::map(self.fds.remove(0), offset, length).expect("maps");
                    assert!(memory.is_sealed());
                    let memory = Arc::new(memory);
                    control.regions.push(Arc::clone(&memory));
                    assert!(self.regions.insert(number, memory).is_none());
                }
                Message::RegionGone { number } => assert!(self.regions.remove(&number).is_some()),
                Message::Detach => control.detached = true,
                other => panic!("nebd said {other:?}"),
            }
            drop(control);
            self.gateway.shared.1.notify_all();
        }
        is_up
    }

    fn answer(&mut self) {
        let manner = self.gateway.lock().manner;
        if manner == Manner::Backwards {
            self.held.reverse();
        }
        for (request, pieces) in std::mem::take(&mut self.held) {
            let mut payload =
                vec![0; if request.op == BlockOp::Write { request.range.length() } else { 0 } as usize];
            let mut at = 0;
            for piece in pieces.iter().filter(|_| request.op == BlockOp::Write) {
                let end = at + piece.length as usize;
                self.regions[&piece.region].read(piece.offset, &mut payload[at..end]).expect("is there");
                at = end;
            }
            let Some((id, completion, data)) = self.gateway.answer(manner, &request, &payload) else {
                self.held.push((request, pieces));
                continue;
            };
            let mut rest = &data[..];
            for piece in &pieces {
                let (front, behind) = rest.split_at(rest.len().min(piece.length as usize));
                self.regions[&piece.region].write(piece.offset, front).expect("is there");
                rest = behind;
            }
            assert!(rest.is_empty(), "there is room");
            let is_status = request.op == BlockOp::Status || manner == Manner::Overpay;
            let payload = if is_status { data.len().max(12) as u32 } else { 0 };
            if manner == Manner::Miscount {
                // The count of completions, and nebd's bell.
                self.memory.write(24 * 8, &u64::MAX.to_le_bytes()).expect("is there");
                rustix::io::write(&self.to_nebd, b"!").expect("rings");
                continue;
            }
            let payload = if completion == Completion::Done(()) { payload } else { 0 };
            self.ring.push(&RingAnswer { id, completion, payload }).expect("nebd keeps the contract");
            self.ring.publish();
            self.gateway.answered();
        }
    }
}

fn execute(image: &mut [u8], request: &BlockRequest, payload: &[u8]) -> Vec<u8> {
    let place = request.range.offset() as usize..request.range.end() as usize;
    match request.op {
        BlockOp::Read => image[place].to_vec(),
        BlockOp::Write => {
            image[place].copy_from_slice(payload);
            Vec::new()
        }
        BlockOp::Discard | BlockOp::WriteZeroes { .. } => {
            image[place].fill(0);
            Vec::new()
        }
        BlockOp::Status => extents::encode(&allocation(image, request.range)),
        BlockOp::Flush | BlockOp::Cache => Vec::new(),
    }
}

fn allocation(image: &[u8], range: ByteRange) -> Vec<Extent> {
    let mut list = Vec::new();
    let mut at = range.offset();
    while at < range.end() {
        let end = ((at / 4096 + 1) * 4096).min(range.end());
        let zero = image[at as usize..end as usize].iter().all(|byte| *byte == 0);
        Extent::push_merged(&mut list, Extent { length: end - at, hole: zero, zero });
        at = end;
    }
    list
}
