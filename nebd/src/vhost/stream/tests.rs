use super::*;
use crate::inflight::Limits;
use crate::poller::Poller;
use crate::vhost::driver::{BASE, BUFFERS, Driver};
use crate::vhost::gateway::Gateway;
use proptest::prelude::*;
use spline_types::{ByteRange, OnUnavailable};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// A link that is up, and the gateway's end of it.
struct Pair {
    link: Link,
    gateway: UnixStream,
    stream: Stream,
    table: Inflight<Asked>,
    driver: Driver,
    scratch: Vec<u8>,
    _poller: Poller,
    _listener: Gateway,
}

impl Pair {
    fn new() -> Self {
        let mut listener = Gateway::new();
        let now = Instant::now();
        let mut link = Link::new(listener.path(), Gateway::hello(false), now);
        let poller = Poller::new().expect("poller");
        link.tick(now, &poller, 0).expect("connects");
        let (gateway, _) = listener.accept(OnUnavailable::Wait);
        let gateway = gateway.socket;
        assert!(link.greet(now).expect("accepts").is_some());
        Self {
            link,
            gateway,
            stream: Stream::default(),
            table: Inflight::new(Limits { requests: 1024, bytes: u64::MAX }),
            driver: Driver::new(64),
            scratch: vec![0; 8192],
            _poller: poller,
            _listener: listener,
        }
    }

    fn ask(&mut self, op: BlockOp, data: Vec<Segment>) -> RequestId {
        let length = data.iter().map(|segment| u64::from(segment.length)).sum();
        let status = Segment { region: 0, offset: 0, length: 1 };
        let memory = Arc::clone(&self.driver.memory);
        let guest = GuestRequest { queue: 0, head: 0, memory, data, status, abandoned: false };
        let range = ByteRange::new(4096, length).expect("fits");
        self.table.admit((op, range, false), Asked::Guest(guest), Instant::now())
    }

    fn flush(&mut self) {
        self.stream.flush(&self.link, &mut self.table).expect("sends");
    }

    /// Receives until there is nothing more; the ids of what ended well.
    fn receive(&mut self) -> Result<Vec<RequestId>, LinkDown> {
        let mut done = Vec::new();
        self.stream.receive(&mut self.link, &mut self.table, &mut self.scratch, Instant::now(), |event| {
            match event {
                Event::Ended(entry, result) => {
                    result.expect("done");
                    done.push(entry.request.id);
                }
                Event::Resized(size) => panic!("resized to {size}"),
                Event::Renewed => panic!("renewed"),
            }
        })?;
        Ok(done)
    }
}

fn segment(address: u64, length: u32) -> Segment {
    Segment { region: 0, offset: address - BASE, length }
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length)
        .map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8).wrapping_add(seed))
        .collect()
}

/// Cuts `length` bytes into segments that lie apart.
fn scattered(mut address: u64, length: u32, cut: u32) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut left = length;
    while left > 0 {
        let part = left.min(cut);
        segments.push(segment(address, part));
        (address, left) = (address + u64::from(part) + 13, left - part);
    }
    segments
}

#[test]
fn writes_of_every_shape_arrive_whole_through_a_small_socket() {
    let mut pair = Pair::new();
    rustix::net::sockopt::set_socket_send_buffer_size(pair.link.socket().expect("up"), 4096)
        .expect("shrinks");
    let shapes = [(512, 512), (4096, 100), (1 << 20, 4096), (300_000, 1000), (4096, 4096), (65536, 512)];
    let mut expected = Vec::new();
    for (number, (length, cut)) in shapes.into_iter().enumerate() {
        // 300,000 bytes in pieces of 1,000 are more pieces than one call takes.
        let segments = scattered(BUFFERS, length, cut);
        let id = pair.ask(BlockOp::Write, segments.clone());
        let data = pattern(length as usize, number as u8);
        let mut rest = &data[..];
        for segment in &segments {
            let (part, behind) = rest.split_at(segment.length as usize);
            pair.driver.put(BASE + segment.offset, part);
            rest = behind;
        }
        // The same memory serves them all, so each goes out before the next is put there.
        let mut got = Vec::new();
        let mut buffer = vec![0; 70_000];
        pair.gateway.set_nonblocking(true).expect("nonblocking");
        while got.len() < HEADER_BYTES + length as usize {
            pair.flush();
            match pair.gateway.read(&mut buffer) {
                Ok(count) => got.extend_from_slice(&buffer[..count]),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        let head = got.first_chunk::<HEADER_BYTES>().expect("a header");
        let Message::Request(request) = Header::decode(head).expect("valid").message else {
            panic!("no request")
        };
        assert_eq!((request.id, request.range.length()), (id, u64::from(length)));
        assert!(got[HEADER_BYTES..] == data, "length={length} cut={cut}");
        assert!(!pair.stream.is_within_a_frame());
        expected.push(id);
    }
    pair.gateway.set_nonblocking(false).expect("blocking");
    for id in &expected {
        pair.gateway.write_all(&Header::reply(*id, Completion::Done(()), 0).encode()).expect("writes");
    }
    assert_eq!(pair.receive().expect("answers"), expected);
    assert!(pair.table.is_empty());
}

#[test]
fn a_wrong_answer_cuts_the_link() {
    for lie in 0..4 {
        let mut pair = Pair::new();
        let id = pair.ask(BlockOp::Read, vec![segment(BUFFERS, 512)]);
        if lie < 3 {
            pair.flush();
        }
        let (id, payload) = match lie {
            0 => (RequestId::new(id.get() + 4096), 512),
            1 => (id, 511),
            2 => (id, 513),
            // Right, but it was never asked.
            _ => (id, 512),
        };
        pair.gateway.write_all(&Header::reply(id, Completion::Done(()), payload).encode()).expect("writes");
        assert!(matches!(pair.receive(), Err(LinkDown::WrongAnswer(_))), "lie={lie}");
    }
}

#[test]
fn what_is_read_for_an_abandoned_guest_touches_nothing() {
    for length in [512, 200_000] {
        let mut pair = Pair::new();
        pair.driver.put(BUFFERS, &[7; 512]);
        let id = pair.ask(BlockOp::Read, vec![segment(BUFFERS, length)]);
        let next = pair.ask(BlockOp::Read, vec![segment(BUFFERS + (1 << 20), 512)]);
        pair.flush();
        pair.table.contexts_mut(|asked| {
            if let Asked::Guest(guest) = asked {
                guest.abandoned = guest.data[0].offset == BUFFERS - BASE;
            }
        });
        let mut bytes = Header::reply(id, Completion::Done(()), length).encode().to_vec();
        bytes.extend(vec![9; length as usize]);
        bytes.extend(Header::reply(next, Completion::Done(()), 512).encode());
        bytes.extend([5; 512]);
        let mut gateway = pair.gateway.try_clone().expect("duplicates");
        let sender = std::thread::spawn(move || gateway.write_all(&bytes).expect("writes"));
        let mut done = Vec::new();
        while done.len() < 2 {
            done.extend(pair.receive().expect("answers"));
        }
        sender.join().expect("sends");
        assert_eq!(done, [id, next]);
        assert!(pair.driver.get(BUFFERS, 512) == [7; 512]);
        assert!(pair.driver.get(BUFFERS + (1 << 20), 512) == [5; 512]);
    }
}

#[test]
fn memory_that_vanishes_costs_no_link() {
    let mut pair = Pair::new();
    pair.driver.put(BUFFERS, &[7; 8192]);
    let write = pair.ask(BlockOp::Write, vec![segment(BUFFERS, 512), segment(BUFFERS + 4096, 512)]);
    let read = pair.ask(BlockOp::Read, vec![segment(BUFFERS + 8192, 200_000)]);
    pair.driver.truncate(BUFFERS + 4096);
    pair.flush();
    let mut sent = vec![0; 2 * HEADER_BYTES + 1024];
    pair.gateway.read_exact(&mut sent).expect("comes whole");
    assert!(sent[HEADER_BYTES..][..512] == [7; 512] && sent[HEADER_BYTES + 512..][..512] == [0; 512]);
    let mut bytes = Header::reply(read, Completion::Done(()), 200_000).encode().to_vec();
    bytes.extend(vec![9; 200_000]);
    bytes.extend(Header::reply(write, Completion::Done(()), 0).encode());
    let mut gateway = pair.gateway.try_clone().expect("duplicates");
    let sender = std::thread::spawn(move || gateway.write_all(&bytes).expect("writes"));
    let mut done = Vec::new();
    while done.len() < 2 {
        done.extend(pair.receive().expect("answers"));
    }
    sender.join().expect("sends");
    assert_eq!(done, [read, write]);
    assert!(pair.driver.memory.is_damaged());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn reads_land_where_the_guest_wants_them(
        shapes in proptest::collection::vec((1u32..150_000, 1u32..9_000), 1..6),
        cuts in proptest::collection::vec(1usize..40_000, 1..10),
    ) {
        let mut pair = Pair::new();
        let (mut bytes, mut wanted, mut address) = (Vec::new(), Vec::new(), BUFFERS);
        for (number, (length, cut)) in shapes.into_iter().enumerate() {
            let segments = scattered(address, length, cut.max(length / 60));
            address += 400_000;
            let id = pair.ask(BlockOp::Read, segments.clone());
            let data = pattern(length as usize, number as u8);
            bytes.extend(Header::reply(id, Completion::Done(()), length).encode());
            bytes.extend(&data);
            wanted.push((id, segments, data));
        }
        pair.flush();
        let mut gateway = pair.gateway.try_clone().expect("duplicates");
        let sender = std::thread::spawn(move || {
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                let (part, behind) = rest.split_at(rest.len().min(*cut));
                gateway.write_all(part).expect("writes");
                rest = behind;
                if rest.is_empty() {
                    return;
                }
            }
        });
        let mut done = Vec::new();
        while done.len() < wanted.len() {
            done.extend(pair.receive().expect("answers"));
        }
        sender.join().expect("sends");
        for ((id, segments, data), ended) in wanted.into_iter().zip(done) {
            prop_assert_eq!(id, ended);
            let mut got = Vec::new();
            for segment in segments {
                got.extend(pair.driver.get(BASE + segment.offset, segment.length as usize));
            }
            prop_assert!(got == data);
        }
    }
}
