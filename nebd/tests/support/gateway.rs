//! A gateway for tests: speaks the link over a real unix socket, keeps the volume in memory, and does what a test tells
//! it to: hold answers, withdraw, refuse, lie, leave, die.

use spline_link::{
    Accepted, HEADER_BYTES, Header, Hello, Identity, LinkVersion, Message, Mode, Refusal, Refused,
    VolumeTraits, Welcome, extents,
};
use spline_types::{
    BlockOp, BlockRequest, BlockSize, ByteRange, Completion, Epoch, Extent, Fault, Geometry, OnUnavailable,
};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// What the gateway does with requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Manner {
    Answer,
    /// Takes requests and says nothing.
    Hold,
    Withdraw,
    Fail(Fault),
    /// Answers requests that nobody sent.
    Lie,
}

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
    pub(crate) detached: bool,
    epoch: u64,
    image: Vec<u8>,
    streams: Vec<UnixStream>,
    dead: bool,
}

#[derive(Clone)]
pub(crate) struct FakeGateway {
    path: PathBuf,
    shared: Arc<(Mutex<Control>, Condvar)>,
}

const PATIENCE: Duration = Duration::from_secs(20);

impl FakeGateway {
    /// A gateway that does not listen yet.
    pub(crate) fn new(path: &Path, size: u64) -> Self {
        let control = Control {
            manner: Manner::Answer,
            refuse: None,
            on_unavailable: OnUnavailable::Wait,
            bytes_max: 64 << 20,
            identity: Identity::new(0, 1).expect("not 0"),
            links: Vec::new(),
            received: Vec::new(),
            detached: false,
            epoch: 0,
            image: vec![0; size as usize],
            streams: Vec::new(),
            dead: false,
        };
        Self { path: path.to_owned(), shared: Arc::new((Mutex::new(control), Condvar::new())) }
    }

    /// Listens; after a [`kill`](Self::kill) this is the next gateway.
    pub(crate) fn listen(&self) {
        let _ = std::fs::remove_file(&self.path);
        let listener = UnixListener::bind(&self.path).expect("binds");
        self.lock().dead = false;
        let gateway = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.expect("accepts");
                let mut control = gateway.lock();
                if control.dead {
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
        control.dead = true;
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
        let Some(number) = self.greet(&mut stream) else { return };
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
            let reply = self.answer(number, &request, &payload);
            self.shared.1.notify_all();
            if reply.is_some_and(|reply| stream.write_all(&reply).is_err()) {
                return;
            }
        }
    }

    fn greet(&self, stream: &mut UnixStream) -> Option<usize> {
        let mut bytes = Vec::new();
        let hello = loop {
            let mut byte = [0];
            stream.read_exact(&mut byte).ok()?;
            bytes.push(byte[0]);
            if let Some((hello, _)) = Hello::decode(&bytes).expect("nebd keeps the contract") {
                break hello;
            }
        };
        let mut control = self.lock();
        control.links.push(hello.mode);
        control.epoch += 1;
        let replaced = hello.identity.is_some_and(|known| known != control.identity);
        let welcome = match control.refuse.or(replaced.then_some(Refusal::Replaced)) {
            Some(refusal) => Welcome::Refused(Refused { refusal, text: format!("refused as {refusal:?}") }),
            None => Welcome::Accepted(Accepted {
                version: LinkVersion::V3,
                features: 0,
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
        matches!(welcome, Welcome::Accepted(_)).then_some(number)
    }

    fn answer(&self, link: usize, request: &BlockRequest, payload: &[u8]) -> Option<Vec<u8>> {
        let mut control = self.lock();
        control.received.push((link, *request));
        let (id, completion) = match control.manner {
            Manner::Hold => return None,
            Manner::Answer => (request.id, Completion::Done(())),
            Manner::Withdraw => (request.id, Completion::Withdrawn),
            Manner::Fail(fault) => (request.id, Completion::Failed(fault)),
            Manner::Lie => (spline_types::RequestId::new(request.id.get() + 1000), Completion::Done(())),
        };
        let data = if control.manner == Manner::Answer {
            execute(&mut control.image, request, payload)
        } else {
            Vec::new()
        };
        let mut reply = Header::reply(id, completion, data.len() as u32).encode().to_vec();
        reply.extend_from_slice(&data);
        Some(reply)
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
