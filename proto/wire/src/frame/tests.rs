//! Tests of the frame: golden bytes, round trip, hostile headers.

use super::*;
use proptest::prelude::*;

fn parts(frame: &Frame) -> ([u8; HEADER_BYTES], Bytes) {
    (frame.header(1).expect("within limits"), frame.meta.clone())
}

#[test]
fn golden_bytes() {
    let frame = Frame {
        kind: Kind::ChunkRequest,
        request: 0x0102_0304_0506_0708,
        meta: Bytes::from_static(b"meta"),
        payload: vec![Bytes::from_static(b"1234"), Bytes::from_static(b"56789")],
    };
    let (header, _) = parts(&frame);
    #[rustfmt::skip]
    let golden = [
        b'S', b'P', b'L', b'F', 1, 0, 1, 0,
        8, 7, 6, 5, 4, 3, 2, 1,
        4, 0, 0, 0, 9, 0, 0, 0,
        HEADER_CRC[0], HEADER_CRC[1], HEADER_CRC[2], HEADER_CRC[3], 0x83, 0x92, 0x06, 0xe3,
    ];
    // 0xe3069283 is the check value of CRC-32/ISCSI for "123456789".
    assert_eq!(header, golden);
}

/// Computed once, bit by bit, from the polynomial 0x82f63b78.
const HEADER_CRC: [u8; 4] = bitwise_crc32c(
    b"SPLF\x01\x00\x01\x00\x08\x07\x06\x05\x04\x03\x02\x01\x04\0\0\0\x09\0\0\0\0\0\0\0\x83\x92\x06\xe3meta",
)
.to_le_bytes();

const fn bitwise_crc32c(bytes: &[u8]) -> u32 {
    let (mut crc, mut at) = (u32::MAX, 0);
    while at < bytes.len() {
        crc ^= bytes[at] as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
            bit += 1;
        }
        at += 1;
    }
    !crc
}

#[test]
fn lengths_have_limits_both_ways() {
    let mut frame = Frame { kind: Kind::Ping, request: 0, meta: Bytes::new(), payload: Vec::new() };
    let fine = frame.header(1).expect("empty");
    frame.meta = vec![0; META_BYTES_MAX as usize + 1].into();
    assert_eq!(frame.header(1), None);
    frame.meta = Bytes::new();
    frame.payload = vec![vec![0; PAYLOAD_BYTES_MAX as usize].into(), Bytes::from_static(b"x")];
    assert_eq!(frame.header(1), None);

    let refused = |at: usize, value: u32| {
        let mut header = fine;
        header[at..at + 4].copy_from_slice(&value.to_le_bytes());
        Head::parse(&header, 1).expect_err("hostile").to_string()
    };
    assert!(refused(16, META_BYTES_MAX + 1).contains("meta is longer"));
    assert!(refused(20, u32::MAX).contains("payload is longer"));
    assert!(refused(0, 7).contains("magic: value=0x7"));
    assert!(refused(4, 0x0007_0001).contains("unknown kind: value=0x7"));
    assert!(refused(4, 0x0001_0009).contains("version"));
}

proptest! {
    #[test]
    fn a_header_survives_the_round_trip(
        kind in 1u16..=6, request: u64, meta in prop::collection::vec(any::<u8>(), 0..200),
        payload in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..4),
    ) {
        let kind = Kind::from_number(kind).expect("known");
        let frame = Frame {
            kind, request, meta: meta.into(), payload: payload.into_iter().map(Bytes::from).collect(),
        };
        let (header, meta) = parts(&frame);
        let head = Head::parse(&header, 1).expect("own header");
        prop_assert!(Head::verify(&header, &meta).is_ok());
        prop_assert_eq!((head.kind, head.request), (kind, request));
        prop_assert_eq!(head.payload_bytes, frame.payload_bytes());
        prop_assert_eq!(head.payload_crc, crc32c([&frame.into_payload()[..]]));
    }

    #[test]
    fn a_flipped_bit_is_noticed(request: u64, bit in 0usize..(HEADER_BYTES + 5) * 8) {
        let meta = Bytes::from_static(b"hello");
        let frame = Frame { kind: Kind::RaftReply, request, meta, payload: Vec::new() };
        let (mut header, meta) = parts(&frame);
        let mut meta = meta.to_vec();
        let byte = bit / 8;
        let place = if byte < HEADER_BYTES { &mut header[byte] } else { &mut meta[byte - HEADER_BYTES] };
        *place ^= 1 << (bit % 8);
        prop_assert!(Head::parse(&header, 1).is_err() || Head::verify(&header, &meta).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic(header: [u8; HEADER_BYTES], meta in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = Head::parse(&header, 1);
        let _ = Head::verify(&header, &meta);
    }
}
