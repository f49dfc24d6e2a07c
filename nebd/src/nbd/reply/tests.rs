//! Replies as bytes, and sparse reads put together again as a client would.

use super::*;
use crate::area::Area;
use proptest::prelude::*;
use spline_types::{BlockOp, ByteRange};

fn ticket(offset: u64, length: usize) -> Ticket {
    Ticket {
        cookie: 0x0102_0304_0506_0708,
        op: BlockOp::Read,
        range: ByteRange::new(offset, length as u64).expect("fits"),
        one_chunk: false,
        one_extent: false,
    }
}

#[derive(Debug, PartialEq)]
struct Chunk {
    last: bool,
    kind: u16,
    payload: Vec<u8>,
}

fn chunks(mut bytes: &[u8]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<20>() {
        assert_eq!(head[..4], STRUCTURED_REPLY_MAGIC.to_be_bytes());
        assert_eq!(head[8..16], [1, 2, 3, 4, 5, 6, 7, 8]);
        let length = u32::from_be_bytes([head[16], head[17], head[18], head[19]]) as usize;
        chunks.push(Chunk {
            last: u16::from_be_bytes([head[4], head[5]]) == REPLY_FLAG_DONE,
            kind: u16::from_be_bytes([head[6], head[7]]),
            payload: rest[..length].to_vec(),
        });
        bytes = &rest[length..];
    }
    assert!(bytes.is_empty());
    chunks
}

fn read_reply(structured: bool, ticket: &Ticket, bytes: &[u8]) -> Vec<u8> {
    let mut out = SendQueue::default();
    let buffer = Area::create(1 << 20).expect("creates").take(bytes.len()).expect("fits");
    buffer.write(0, bytes);
    data(&mut out, structured, ticket, &Rc::new(buffer));
    out.take()
}

#[test]
fn golden_simple_replies() {
    let mut out = SendQueue::default();
    done(&mut out, 5);
    failed(&mut out, false, (6, NbdError::NoSpace), "no space", None);
    assert_eq!(
        out.take(),
        b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x05\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x06"
    );
    let read = read_reply(false, &ticket(0, 3), b"abc");
    assert_eq!(read, b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08abc");
}

#[test]
fn golden_error_chunks() {
    let (mut out, cookie) = (SendQueue::default(), ticket(0, 0).cookie);
    failed(&mut out, true, (cookie, NbdError::Io), "why", Some(0x1000));
    failed(&mut out, true, (cookie, NbdError::Perm), "no", None);
    let chunks = chunks(&out.take());
    assert_eq!(
        (chunks[0].kind, &chunks[0].payload[..]),
        (REPLY_TYPE_ERROR_OFFSET, &b"\0\0\0\x05\0\x03why\0\0\0\0\0\0\x10\0"[..])
    );
    assert_eq!((chunks[1].kind, &chunks[1].payload[..]), (REPLY_TYPE_ERROR, &b"\0\0\0\x01\0\x02no"[..]));
    assert!(chunks.iter().all(|chunk| chunk.last));
}

#[test]
fn status_tells_extents_and_keeps_to_one_if_asked() {
    let extents =
        [Extent { length: 4096, hole: true, zero: true }, Extent { length: 512, hole: false, zero: false }];
    for (one_extent, expected) in [
        (false, &b"\0\0\0\x01\0\0\x10\0\0\0\0\x03\0\0\x02\0\0\0\0\0"[..]),
        (true, &b"\0\0\0\x01\0\0\x10\0\0\0\0\x03"[..]),
    ] {
        let mut out = SendQueue::default();
        status(&mut out, &Ticket { one_extent, ..ticket(0, 8192) }, &extents);
        let chunks = chunks(&out.take());
        assert_eq!((chunks[0].kind, &chunks[0].payload[..]), (REPLY_TYPE_BLOCK_STATUS, expected));
    }
}

#[test]
fn zeros_become_holes_unless_one_chunk_is_wanted() {
    let mut bytes = vec![0; 5 * 4096];
    bytes[4096] = 1;
    let sparse = chunks(&read_reply(true, &ticket(8192, bytes.len()), &bytes));
    let kinds: Vec<_> = sparse.iter().map(|chunk| (chunk.kind, chunk.last, chunk.payload.len())).collect();
    assert_eq!(kinds, [(2, false, 12), (1, false, 8 + 4096), (2, true, 12)]);
    let whole = Ticket { one_chunk: true, ..ticket(8192, bytes.len()) };
    let dense = chunks(&read_reply(true, &whole, &bytes));
    assert_eq!((dense.len(), dense[0].kind, dense[0].payload.len()), (1, 1, 8 + bytes.len()));
}

#[test]
fn a_read_of_nothing_is_answered_without_content() {
    let mut out = SendQueue::default();
    nothing(&mut out, true, ticket(0, 0).cookie);
    let chunks = chunks(&out.take());
    assert_eq!((chunks.len(), chunks[0].kind, chunks[0].last), (1, REPLY_TYPE_NONE, true));
    nothing(&mut out, false, 5);
    assert_eq!(out.take(), b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x05");
}

proptest! {
    #[test]
    fn a_client_gets_back_what_was_read(
        offset in 0u64..20_000,
        runs in proptest::collection::vec((any::<bool>(), 1usize..12_000), 1..12),
    ) {
        let bytes: Vec<u8> =
            runs.iter().flat_map(|(zero, length)| std::iter::repeat_n(u8::from(!zero), *length)).collect();
        let chunks = chunks(&read_reply(true, &ticket(offset, bytes.len()), &bytes));
        let (mut got, mut at) = (vec![0xee; bytes.len()], offset);
        for (number, chunk) in chunks.iter().enumerate() {
            prop_assert_eq!(chunk.last, number + 1 == chunks.len());
            let place = u64::from_be_bytes(chunk.payload[..8].try_into().expect("eight bytes"));
            prop_assert_eq!(place, at, "chunks follow each other");
            let from = (place - offset) as usize;
            let length = if chunk.kind == REPLY_TYPE_OFFSET_HOLE {
                let length = u32::from_be_bytes(chunk.payload[8..12].try_into().expect("four bytes"));
                got[from..from + length as usize].fill(0);
                u64::from(length)
            } else {
                let part = &chunk.payload[8..];
                got[from..from + part.len()].copy_from_slice(part);
                part.len() as u64
            };
            prop_assert!(length > 0);
            at += length;
        }
        prop_assert!(got == bytes);
    }
}
