//! Reads what an NBD server says and holds it against NBD proto.md. Numbers are the specification's.

use spline_nebd::nbd::transmission::Ticket;
use spline_types::BlockOp;

/// A request that was just answered.
pub struct Expected {
    pub ticket: Ticket,
    pub fails: bool,
    /// Of a successful read.
    pub data: Vec<u8>,
}

#[derive(PartialEq, Eq, Debug)]
enum Phase {
    Greeting,
    Options,
    Transmission,
    Over,
}

/// The state of a session as its client sees it.
pub struct Replies {
    phase: Phase,
    structured: bool,
    size: u64,
    no_zeroes: bool,
}

impl Replies {
    pub fn new(size: u64, no_zeroes: bool) -> Self {
        Self { phase: Phase::Greeting, structured: false, size, no_zeroes }
    }

    /// Checks whole messages. In transmission those of `expected` come first to last; without them the server speaks by
    /// itself, of requests that it did not pass on, and no data follows.
    pub fn check(&mut self, said: &[u8], expected: &[Expected]) {
        let mut bytes = Bytes(said);
        let mut expected = expected.iter();
        while !bytes.0.is_empty() {
            match self.phase {
                Phase::Greeting => {
                    assert_eq!(bytes.take(18), b"NBDMAGICIHAVEOPT\0\x03");
                    self.phase = Phase::Options;
                }
                Phase::Options => self.option(&mut bytes),
                Phase::Transmission => self.reply(&mut bytes, expected.next()),
                Phase::Over => panic!("speaks after the end"),
            }
        }
        assert!(expected.next().is_none(), "a request was not answered");
    }

    fn option(&mut self, bytes: &mut Bytes<'_>) {
        if bytes.0.starts_with(&self.size.to_be_bytes()) {
            assert_eq!(bytes.u64(), self.size);
            assert!(bytes.u16() & 1 == 1, "flags");
            if !self.no_zeroes {
                assert_eq!(bytes.take(124), [0; 124]);
            }
            self.phase = Phase::Transmission;
            return;
        }
        assert_eq!(bytes.u64(), 0x0003_e889_0455_65a9);
        let (option, kind, length) = (bytes.u32(), bytes.u32(), bytes.u32());
        let data = bytes.take(length as usize);
        let error = kind >> 31 == 1;
        assert!(error || (1..=4).contains(&kind), "reply type {kind:#x}");
        assert!(!error || std::str::from_utf8(data).is_ok(), "an error's text");
        assert!(kind != 1 || data.is_empty(), "ACK has no data");
        match (option, kind) {
            (2, 1) => self.phase = Phase::Over,
            (7, 1) => self.phase = Phase::Transmission,
            (8, 1) => self.structured = true,
            _ => {}
        }
    }

    fn reply(&mut self, bytes: &mut Bytes<'_>, expected: Option<&Expected>) {
        let read = expected.is_some_and(|expected| expected.ticket.op == BlockOp::Read);
        let status = expected.is_some_and(|expected| expected.ticket.op == BlockOp::Status);
        if bytes.0.starts_with(&0x668e_33efu32.to_be_bytes()) {
            assert!(self.structured, "structured replies were not agreed upon");
            return chunks(bytes, expected);
        }
        assert_eq!(bytes.u32(), 0x6744_6698);
        let (errno, cookie) = (bytes.u32(), bytes.u64());
        assert!([0, 1, 5, 22, 28, 95, 108].contains(&errno), "errno {errno}");
        assert!(!(self.structured && read) && !(status && errno == 0), "needs a structured reply");
        let Some(expected) = expected else { return };
        assert_eq!((cookie, errno != 0), (expected.ticket.cookie, expected.fails));
        assert_eq!(bytes.take(expected.data.len()), expected.data);
    }
}

/// One structured reply.
fn chunks(bytes: &mut Bytes<'_>, expected: Option<&Expected>) {
    let (mut covered, mut failed, mut count) = (0, false, 0);
    loop {
        assert_eq!(bytes.u32(), 0x668e_33ef);
        let (flags, kind, cookie, length) = (bytes.u16(), bytes.u16(), bytes.u64(), bytes.u32());
        assert!(flags <= 1, "reply flags {flags:#x}");
        assert!(expected.is_none_or(|expected| expected.ticket.cookie == cookie), "cookie {cookie:#x}");
        let mut data = Bytes(bytes.take(length as usize));
        count += 1;
        match kind {
            0 => assert!(length == 0 && flags == 1, "NONE is empty and last"),
            1 | 2 => covered += content(&mut data, kind, covered, expected),
            5 => extents(&mut data, expected),
            0x8001 | 0x8002 => {
                assert!(data.u32() != 0, "an error has a number");
                let text = data.u16();
                assert!(std::str::from_utf8(data.take(text.into())).is_ok());
                let offset = if kind == 0x8002 { Some(data.u64()) } else { None };
                if let (Some(offset), Some(expected)) = (offset, expected) {
                    let range = expected.ticket.range;
                    assert!((range.offset()..range.end()).contains(&offset), "offset outside the request");
                }
                failed = true;
            }
            other => panic!("chunk type {other:#x}"),
        }
        assert!(data.0.is_empty(), "a chunk is longer than its content");
        if flags == 1 {
            break;
        }
    }
    if let Some(expected) = expected {
        assert_eq!(failed, expected.fails);
        assert_eq!(covered, expected.data.len());
        assert!(!expected.ticket.one_chunk || count == 1, "may not be fragmented");
    }
}

/// Data or a hole; answers its length. Ours come in order.
fn content(data: &mut Bytes<'_>, kind: u16, covered: usize, expected: Option<&Expected>) -> usize {
    let expected = expected.expect("content is of a request that was passed on");
    assert_eq!(data.u64(), expected.ticket.range.offset() + covered as u64);
    let rest = &expected.data[covered..];
    let length = if kind == 1 { data.0.len() } else { data.u32() as usize };
    assert!(length > 0 && length <= rest.len());
    if kind == 1 {
        assert_eq!(data.take(length), &rest[..length]);
    } else {
        assert!(rest[..length].iter().all(|byte| *byte == 0), "a hole where data is");
        assert!(!expected.ticket.one_chunk, "a hole in a reply that must be one chunk of data");
    }
    length
}

fn extents(data: &mut Bytes<'_>, expected: Option<&Expected>) {
    let ticket = expected.expect("extents are of a request that was passed on").ticket;
    assert_eq!(ticket.op, BlockOp::Status);
    assert_eq!(data.u32(), 1, "the context's id");
    let (mut covered, mut count) = (0, 0);
    while !data.0.is_empty() {
        let (length, flags) = (data.u32(), data.u32());
        assert!(length > 0 && flags <= 3);
        covered += u64::from(length);
        count += 1;
    }
    assert!(count > 0 && covered <= ticket.range.length(), "{covered}");
    assert!(!ticket.one_extent || count == 1, "one extent was asked for");
}

/// Whole messages from the front.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at_checked(count).expect("a message is cut short");
        self.0 = rest;
        front
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.take(N).try_into().expect("as long as asked for")
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.array())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.array())
    }
}
