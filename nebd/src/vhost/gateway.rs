//! The gateway's end of a link, for tests: says exactly what a test has it say, when it says it.

use spline_link::{
    Accepted, HEADER_BYTES, Header, Hello, Identity, InstanceId, LinkVersion, Message, Mode, Refusal,
    Refused, VersionRange, VolumeTraits, Welcome,
};
use spline_types::{BlockOp, BlockRequest, BlockSize, Completion, Epoch, Geometry, OnUnavailable, RequestId};
use std::io::{Read, Write};
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
pub(crate) struct GatewayLink(pub(crate) UnixStream);

impl Gateway {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let listener = UnixListener::bind(dir.path().join("gateway.sock")).expect("binds");
        Self { listener, dir, epochs: 0 }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("gateway.sock")
    }

    pub(crate) fn hello() -> Hello {
        Hello {
            versions: VersionRange::OURS,
            features: 0,
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

    fn greet(&self) -> (UnixStream, Hello) {
        let (mut stream, _) = self.listener.accept().expect("accepts");
        stream.set_read_timeout(Some(PATIENCE)).expect("sets");
        let mut bytes = [0; 512];
        let count = stream.read(&mut bytes).expect("reads");
        let (hello, _) = Hello::decode(&bytes[..count]).expect("valid").expect("whole");
        (stream, hello)
    }

    /// Takes the next link and refuses it.
    pub(crate) fn refuse(&self, refusal: Refusal) {
        let (mut stream, _) = self.greet();
        let refused = Refused { refusal, text: "refused by a test".into() };
        stream.write_all(&Welcome::Refused(refused).encode()).expect("writes");
    }

    /// Takes the next link and welcomes it; its hello's mode.
    pub(crate) fn accept(&mut self, on_unavailable: OnUnavailable) -> (GatewayLink, Mode) {
        let (mut stream, hello) = self.greet();
        self.epochs += 1;
        let accepted = Accepted {
            version: LinkVersion::V3,
            features: 0,
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
        (GatewayLink(stream), hello.mode)
    }
}

impl GatewayLink {
    fn message(&mut self) -> Message {
        let mut head = [0; HEADER_BYTES];
        self.0.read_exact(&mut head).expect("a frame comes");
        Header::decode(&head).expect("valid").message
    }

    /// The next request and its data.
    pub(crate) fn request(&mut self) -> (BlockRequest, Vec<u8>) {
        let Message::Request(request) = self.message() else { panic!("no request") };
        let length = if request.op == BlockOp::Write { request.range.length() } else { 0 };
        let mut data = vec![0; length as usize];
        self.0.read_exact(&mut data).expect("its data comes");
        (request, data)
    }

    pub(crate) fn says_goodbye(&mut self) -> bool {
        self.message() == Message::Detach
    }

    pub(crate) fn say(&mut self, message: Message) {
        self.0.write_all(&Header::bare(message).encode()).expect("writes");
    }

    pub(crate) fn done(&mut self, id: RequestId, data: &[u8]) {
        let mut bytes = Header::reply(id, Completion::Done(()), data.len() as u32).encode().to_vec();
        bytes.extend_from_slice(data);
        self.0.write_all(&bytes).expect("writes");
    }
}
