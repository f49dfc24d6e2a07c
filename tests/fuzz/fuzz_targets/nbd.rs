//! A client's connection to nebd, fed with arbitrary bytes over a socket: the whole way from the greeting through the
//! handshake and the requests to the replies. Requests that come through must be inside the export and as long as they
//! say; what the server says must be a well-formed session, each request answered once.
//!
//! The first byte of an input says how the session starts ([`opening`]), the second in how large pieces the rest comes.
#![no_main]

#[path = "nbd/replies.rs"]
mod replies;

use libfuzzer_sys::fuzz_target;
use prometheus_client::registry::Registry;
use replies::{Expected, Replies};
use spline_nebd::budget::Budget;
use spline_nebd::export::Export;
use spline_nebd::inflight::{Inflight, Limits, Outcome};
use spline_nebd::metrics::Families;
use spline_nebd::nbd::connection::{Connection, ConnectionId, Cut};
use spline_nebd::receive::SCRATCH_BYTES;
use spline_nebd::volume::{Answer, Origin, Volume, area_for};
use spline_types::{BlockOp, BlockRequest, BlockSize, Completion, Extent, Fault, Geometry};
use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Bytes of the export: more than the longest request.
const SIZE: u64 = 1 << 30;
/// The gateway takes this much at once; small, so that requests have to wait.
const LIMITS: Limits = Limits { requests: 4, bytes: 1 << 20 };
/// Reads up to this length get data, longer ones an error: filling them would only cost time.
const DATA_MAX: u64 = 64 << 10;
/// A piece fits every socket's buffer.
const PIECE_MAX: usize = 4096;

thread_local! {
    static PARTS: RefCell<(Volume, Vec<u8>)> = RefCell::new((volume(), vec![0; SCRATCH_BYTES]));
}

fn volume() -> Volume {
    Volume {
        export: Export {
            name: "disk0".into(),
            description: "a disk".into(),
            geometry: Geometry { size: SIZE, block_size: BlockSize::B4096 },
            traits: Default::default(),
            read_only: false,
        },
        inflight: Inflight::new(LIMITS),
        budget: Budget::default(),
        area: area_for(1).expect("memory"),
        lost: false,
        metrics: Families::new(&mut Registry::default()).of("disk0", "nbd"),
        now: Instant::now(),
    }
}

/// What is sent before the input: nothing, or a handshake that ends in transmission.
fn opening(start: u8) -> Vec<u8> {
    let option = |option: u32, data: &[u8]| {
        [b"IHAVEOPT", &option.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
    };
    let flags = 3u32.to_be_bytes().to_vec();
    match start % 4 {
        0 => Vec::new(),
        1 => [flags, option(1, b"")].concat(),
        2 => [flags, option(7, &[0; 6])].concat(),
        _ => {
            let contexts = b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation";
            // GO asks for the block sizes too, and so is held to them.
            [flags, option(8, b""), option(10, contexts), option(7, b"\0\0\0\0\0\x01\0\x03")].concat()
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let [start, piece, rest @ ..] = bytes else { return };
    let stream = [opening(*start), rest.to_vec()].concat();
    let piece = if *piece == 0 { PIECE_MAX } else { usize::from(*piece) };
    PARTS.with_borrow_mut(|(volume, scratch)| {
        volume.inflight = Inflight::new(LIMITS);
        volume.export.read_only = start & 4 != 0;
        volume.budget = Budget::default();
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        ours.set_nonblocking(true).expect("non-blocking");
        theirs.set_nonblocking(true).expect("non-blocking");
        let connection = Connection::new(ConnectionId(16), ours.into(), volume.now, Duration::from_secs(10));
        let no_zeroes = stream.get(3).is_some_and(|flags| flags & 2 != 0);
        let replies = Replies::new(SIZE, no_zeroes);
        let mut session = Session { connection, theirs, replies, volume, scratch };
        session.hear(&[]);
        for piece in stream.chunks(piece) {
            session.theirs.write_all(piece).expect("the socket has room");
            if !session.turn() {
                return;
            }
        }
        session.connection.end();
        session.settle();
    });
});

/// One client and the server's side of it.
struct Session<'a> {
    connection: Connection,
    theirs: UnixStream,
    replies: Replies,
    volume: &'a mut Volume,
    scratch: &'a mut [u8],
}

impl Session<'_> {
    /// Lets the server act upon what was sent; false if that ended the session.
    fn turn(&mut self) -> bool {
        let received = self.connection.receive(self.volume, self.scratch);
        if let Err(cut) = received {
            return self.cut(&cut);
        }
        self.hear(&[]);
        self.settle() && !self.connection.is_finished()
    }

    /// Answers everything, and lets go on what waited for it.
    fn settle(&mut self) -> bool {
        loop {
            let answered = self.answer();
            self.hear(&answered);
            if !self.connection.is_stalled() {
                if answered.is_empty() {
                    return true;
                }
                continue;
            }
            self.volume.budget.settle(std::iter::once(self.connection.held()));
            let resumed = self.connection.resume(self.volume);
            if let Err(cut) = resumed {
                return self.cut(&cut);
            }
            self.hear(&[]);
            let idle = self.volume.inflight.is_empty();
            assert!(!(idle && self.connection.is_stalled()), "waits for nothing");
        }
    }

    fn cut(&mut self, cut: &Cut) -> bool {
        assert!(matches!(cut, Cut::Protocol(_)), "{cut}");
        self.connection.part();
        self.hear(&[]);
        false
    }

    /// Plays the gateway: takes what may be sent, answers it in turn with success and failure.
    fn answer(&mut self) -> Vec<Expected> {
        let mut requests: Vec<BlockRequest> = Vec::new();
        while let Some(entry) = self.volume.inflight.next_to_send(LIMITS) {
            let data = entry.context.data.as_ref().map_or(0, |data| data.length());
            check(&entry.request, data);
            requests.push(entry.request);
        }
        let mut expected = Vec::new();
        for request in requests {
            let Outcome::Answer(entry) = self.volume.inflight.complete(request.id, &Completion::Done(()))
            else {
                panic!("a sent request is answered once");
            };
            let Origin { ticket, .. } = entry.context.origin;
            assert_eq!((ticket.op, ticket.range), (request.op, request.range));
            let length = request.range.length();
            let fails = request.id.get() % 5 == 0 || (request.op == BlockOp::Read && length > DATA_MAX);
            // Every other answer is zeros, which may come as holes.
            let data = vec![
                (request.id.get() % 2) as u8;
                if request.op == BlockOp::Read && !fails { length as usize } else { 0 }
            ];
            let result = match request.op {
                _ if fails => Err(Fault::NoSpace),
                BlockOp::Read => {
                    let room = entry.context.data.expect("a read has room for its data");
                    room.write(0, &data);
                    Ok(Answer::Data(room))
                }
                BlockOp::Status => Ok(Answer::Extents(extents(length))),
                _ => Ok(Answer::Done),
            };
            self.connection.answer(&ticket, result, self.volume.now);
            expected.push(Expected { ticket, fails, data });
        }
        expected
    }

    /// Takes all that the server has said and checks it.
    fn hear(&mut self, expected: &[Expected]) {
        let mut said = Vec::new();
        let mut part = [0; 1 << 16];
        loop {
            self.connection.flush(true, self.volume.now).expect("the client is there");
            match self.theirs.read(&mut part) {
                Ok(0) => break,
                Ok(count) => said.extend_from_slice(&part[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        self.replies.check(&said, expected);
    }
}

/// What the gateway may rely upon.
fn check(request: &BlockRequest, room: usize) {
    assert!(request.range.end() <= SIZE, "{request:?}");
    let data = if request.op.carries_data() { request.range.length() } else { 0 };
    assert!(data <= 32 << 20, "{request:?}");
    assert!(request.op == BlockOp::Status || room as u64 == data, "{request:?}");
    assert!(!request.fua || request.op.modifies(), "{request:?}");
    assert!(request.range.is_empty() == (request.op == BlockOp::Flush), "{request:?}");
}

/// A hole and then data.
fn extents(length: u64) -> Vec<Extent> {
    let hole = length / 2;
    let parts = [
        Extent { length: hole, hole: true, zero: true },
        Extent { length: length - hole, hole: false, zero: false },
    ];
    parts.into_iter().filter(|extent| extent.length > 0).collect()
}
