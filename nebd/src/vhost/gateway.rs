//! The gateway's end of a link, for tests: says exactly what a test has it say, when it says it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use spline_link::memory::SharedMemory;
use spline_link::ring::{GatewayRing, Piece, Position, RingAnswer, RingFds};
use spline_link::{
    Accepted, FEATURE_RING, HEADER_BYTES, Header, Hello, Identity, InstanceId, LinkVersion, Message, Mode,
    Refusal, Refused, VersionRange, VolumeTraits, Welcome, passing,
};
use spline_types::{BlockOp, BlockRequest, BlockSize, Completion, Epoch, Geometry, OnUnavailable, RequestId};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A gateway that listens.
pub(crate) struct Gateway {
    listener: UnixListener,
    dir: tempfile::TempDir,
    epochs: u64,
}

/// A link that it has accepted.
pub(crate) struct GatewayLink {
    pub(crate) socket: UnixStream,
    ring: Option<RingEnd>,
}

/// The ring of a link, and the memory that was passed on.
struct RingEnd {
    ring: GatewayRing,
    bell: OwnedFd,
    regions: BTreeMap<u32, SharedMemory>,
    /// Where the data of each request lies.
    pieces: BTreeMap<u64, Vec<Piece>>,
    fds: Vec<OwnedFd>,
    frames: Vec<u8>,
}

impl Gateway {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let listener = UnixListener::bind(dir.path().join("gateway.sock")).expect("binds");
        Self { listener, dir, epochs: 0 }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("gateway.sock")
    }

    /// What a nebd says that offers a ring, or does not.
    pub(crate) fn hello(ring: bool) -> Hello {
        Hello {
            versions: VersionRange::OURS,
            features: if ring { FEATURE_RING } else { 0 },
            mode: Mode::Open,
            read_only: false,
            force: false,
            instance: InstanceId(1),
            identity: None,
            volume: "disk0".parse().expect("a name"),
        }
    }

    /// Nobody can come any more.
    pub(crate) fn close(&self) {
        std::fs::remove_file(self.path()).expect("removes");
    }

    fn greet(&self) -> (UnixStream, Hello, Vec<OwnedFd>) {
        let (stream, _) = self.listener.accept().expect("accepts");
        stream.set_read_timeout(Some(PATIENCE)).expect("sets");
        await_readable(stream.as_fd());
        let (mut bytes, mut fds) = ([0; 512], Vec::new());
        let count = passing::receive(stream.as_fd(), &mut bytes, &mut fds).expect("reads");
        let (hello, _) = Hello::decode(&bytes[..count]).expect("valid").expect("whole");
        (stream, hello, fds)
    }

    /// Takes the next link and refuses it.
    pub(crate) fn refuse(&self, refusal: Refusal) {
        let (mut stream, _, _) = self.greet();
        let refused = Refused { refusal, text: "refused by a test".into() };
        stream.write_all(&Welcome::Refused(refused).encode()).expect("writes");
    }

    /// Takes the next link and welcomes it; its hello's mode.
    pub(crate) fn accept(&mut self, on_unavailable: OnUnavailable) -> (GatewayLink, Mode) {
        let (mut stream, hello, fds) = self.greet();
        let ring = (hello.features & FEATURE_RING != 0).then(|| RingEnd::new(fds));
        self.epochs += 1;
        let accepted = Accepted {
            version: LinkVersion::V4,
            features: if ring.is_some() { FEATURE_RING } else { 0 },
            epoch: Epoch::new(self.epochs),
            identity: Identity::new(0, 1).expect("not zero"),
            geometry: Geometry { size: 1 << 30, block_size: BlockSize::B4096 },
            traits: VolumeTraits::default(),
            on_unavailable,
            request_bytes_max: 32 << 20,
            requests_max: 1024,
            bytes_max: 64 << 20,
        };
        stream.write_all(&Welcome::Accepted(accepted).encode()).expect("writes");
        (GatewayLink { socket: stream, ring }, hello.mode)
    }
}

fn await_readable(fd: BorrowedFd<'_>) {
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    assert!(poll(&mut fds, Some(&patience)).expect("polls") > 0, "waited too long for nebd");
}

impl RingEnd {
    fn new(fds: Vec<OwnedFd>) -> Self {
        let Ok([memory, to_gateway, to_nebd]) = <[OwnedFd; 3]>::try_from(fds) else { panic!("no ring came") };
        let fds = RingFds { memory, to_gateway, to_nebd };
        let (ring, bell) = GatewayRing::adopt(fds, Position::default()).expect("a ring");
        let (regions, pieces) = (BTreeMap::new(), BTreeMap::new());
        Self { ring, bell, regions, pieces, fds: Vec::new(), frames: Vec::new() }
    }

    /// Takes in regions that were passed on, and what was taken back.
    fn hear(&mut self, socket: &UnixStream) {
        let mut bytes = [0; 4096];
        while let Ok(count) = passing::receive(socket.as_fd(), &mut bytes, &mut self.fds)
            && count > 0
        {
            self.frames.extend_from_slice(&bytes[..count]);
        }
        while let Some(head) = self.frames.first_chunk::<HEADER_BYTES>() {
            match Header::decode(head).expect("valid").message {
                Message::Region { number, offset, length } => {
                    let memory = SharedMemory::map(self.fds.remove(0), offset, length).expect("maps");
                    assert!(self.regions.insert(number, memory).is_none(), "a number is used once");
                }
                Message::RegionGone { number } => {
                    assert!(self.regions.remove(&number).is_some(), "known");
                }
                _ => return,
            }
            self.frames.drain(..HEADER_BYTES);
        }
    }

    fn request(&mut self, socket: &UnixStream) -> (BlockRequest, Vec<u8>) {
        let mut pieces = Vec::new();
        let request = loop {
            if let Some(request) = self.ring.pop(&mut pieces).expect("valid") {
                break request;
            }
            if self.ring.sleep().expect("valid") {
                await_readable(self.bell.as_fd());
                let _ = rustix::io::read(&self.bell, &mut [0; 8]);
                self.ring.wake();
            }
        };
        self.ring.publish();
        self.hear(socket);
        let mut data = Vec::new();
        if request.op == BlockOp::Write {
            for piece in &pieces {
                let mut part = vec![0; piece.length as usize];
                self.regions[&piece.region].read(piece.offset, &mut part).expect("there");
                data.extend(part);
            }
        }
        self.pieces.insert(request.id.get(), pieces);
        (request, data)
    }

    fn answer(&mut self, id: RequestId, completion: Completion, mut data: &[u8]) {
        for piece in self.pieces.remove(&id.get()).unwrap_or_default() {
            let (part, rest) = data.split_at(data.len().min(piece.length as usize));
            self.regions[&piece.region].write(piece.offset, part).expect("there");
            data = rest;
        }
        self.ring.push(&RingAnswer { id, completion, payload: 0 }).expect("room");
        self.ring.publish();
    }
}

impl GatewayLink {
    /// One that nobody is at the other end of.
    pub(crate) fn unconnected() -> Self {
        Self { socket: UnixStream::pair().expect("a pair").0, ring: None }
    }

    /// Ends without a word.
    pub(crate) fn hang_up(&self) {
        self.socket.shutdown(std::net::Shutdown::Both).expect("shuts");
    }

    /// Numbers of the regions that requests may name.
    pub(crate) fn regions(&mut self) -> Vec<u32> {
        let Some(ring) = &mut self.ring else { return Vec::new() };
        ring.hear(&self.socket);
        ring.regions.keys().copied().collect()
    }

    fn message(&mut self) -> Message {
        let mut head = [0; HEADER_BYTES];
        self.socket.read_exact(&mut head).expect("a frame comes");
        Header::decode(&head).expect("valid").message
    }

    /// The next request and its data.
    pub(crate) fn request(&mut self) -> (BlockRequest, Vec<u8>) {
        if let Some(ring) = &mut self.ring {
            return ring.request(&self.socket);
        }
        let Message::Request(request) = self.message() else { panic!("no request") };
        let length = if request.op == BlockOp::Write { request.range.length() } else { 0 };
        let mut data = vec![0; length as usize];
        self.socket.read_exact(&mut data).expect("its data comes");
        (request, data)
    }

    pub(crate) fn says_goodbye(&mut self) -> bool {
        self.message() == Message::Detach
    }

    pub(crate) fn say(&mut self, message: Message) {
        self.socket.write_all(&Header::bare(message).encode()).expect("writes");
    }

    pub(crate) fn done(&mut self, id: RequestId, data: &[u8]) {
        self.answer(id, Completion::Done(()), data);
    }

    /// It is to be sent again.
    pub(crate) fn withdraw(&mut self, id: RequestId) {
        self.answer(id, Completion::Withdrawn, &[]);
    }

    fn answer(&mut self, id: RequestId, completion: Completion, data: &[u8]) {
        if let Some(ring) = &mut self.ring {
            return ring.answer(id, completion, data);
        }
        let mut bytes = Header::reply(id, completion, data.len() as u32).encode().to_vec();
        bytes.extend_from_slice(data);
        self.socket.write_all(&bytes).expect("writes");
    }
}
