//! Tests of the chunk codecs: golden bytes, round trips, hostile bytes.

use super::*;
use proptest::prelude::*;
use spline_types::Unavailable;

fn command() -> ChunkCommand {
    ChunkCommand {
        copyset: CopysetId::new(0x11),
        chunk: ChunkId { volume: VolumeId::new(0x22), index: ChunkIndex::new(0x33) },
        op: ChunkOp::Write,
        range: ChunkRange::new(0x1000, 0x200).expect("inside"),
        fence: FenceTag { epoch: Epoch::new(0x44), seq: Seq::new(0x66), floor: Seq::new(0x55) },
    }
}

#[test]
fn golden_request() {
    #[rustfmt::skip]
    let golden = [
        1, 2, 0, 0, 0x11, 0, 0, 0,   0x22, 0, 0, 0, 0, 0, 0, 0,
        0x33, 0, 0, 0, 0, 0x10, 0, 0,   0, 2, 0, 0, 0, 0, 0, 0,
        0x44, 0, 0, 0, 0, 0, 0, 0,   0x66, 0, 0, 0, 0, 0, 0, 0,
        0x55, 0, 0, 0, 0, 0, 0, 0,   0, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(encode_request(&command())[..], golden);
    assert_eq!(decode_request(&golden), Ok(command()));
}

#[test]
fn golden_replies_and_extents() {
    assert_eq!(Reply::DONE.encode()[..], [1, 0, 0, 0, 0, 0, 0, 0]);
    let fault = Fault::Unavailable(Unavailable::NotLeader);
    let hint = Reply { leader_hint: Some(ChunkserverId::new(9)), ..Reply::failed(fault) };
    assert_eq!(hint.encode()[..], [1, 0, 32, 0, 9, 0, 0, 0]);
    let extents =
        [Extent { length: 4096, hole: true, zero: true }, Extent { length: 1, hole: false, zero: false }];
    assert_eq!(encode_extents(&extents)[..], [0, 16, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn what_can_not_be_is_refused() {
    let with = |at: usize, value: u8| {
        let mut bytes = encode_request(&command()).to_vec();
        bytes[at] = value;
        decode_request(&bytes).expect_err("refused").to_string()
    };
    assert!(with(0, 9).contains("version=9"));
    assert!(with(1, 0).contains("operation"));
    assert!(with(2, 1).contains("reserved"));
    assert!(with(63, 1).contains("reserved"));
    assert!(with(23, 1).contains("range end"));
    assert!(with(48, 0x67).contains("floor above the seq"));
    assert_eq!(decode_request(&[1; 63]), Err(DecodeError::Length(63)));
    assert_eq!(
        Reply::decode(&[1, 0, 99, 0, 0, 0, 0, 0]),
        Err(DecodeError::Field { field: "fault", value: 99 })
    );
    assert_eq!(Reply::decode(&[2, 0, 0, 0, 0, 0, 0, 0]), Err(DecodeError::Version(2)));
    assert_eq!(Reply::decode(&[]), Err(DecodeError::Length(0)));
    let extents = |bytes: &[u8]| decode_extents(bytes).is_err();
    assert!(extents(&[0; 8]) && extents(&[1, 0, 0, 0, 4, 0, 0, 0]) && extents(&[1; 7]));
    assert!(extents(&[0, 0, 0, 2, 0, 0, 0, 0]), "longer than a chunk");
    assert!(extents(&vec![1; (EXTENTS_MAX + 1) * EXTENT_BYTES]));
}

fn ops() -> impl Strategy<Value = ChunkOp> {
    (1u8..=6).prop_map(|number| op_of(number).expect("known"))
}

proptest! {
    #[test]
    fn requests_survive_the_round_trip(
        op in ops(), copyset: u32, volume: u64, index: u32, offset in 0..CHUNK_BYTES, length in 0..CHUNK_BYTES,
        epoch: u64, seq: u64, below: u64,
    ) {
        let range = ChunkRange::new(offset, length.min(CHUNK_BYTES - offset)).expect("inside");
        let command = ChunkCommand {
            copyset: CopysetId::new(copyset),
            chunk: ChunkId { volume: VolumeId::new(volume), index: ChunkIndex::new(index) },
            op,
            range,
            fence: FenceTag { epoch: Epoch::new(epoch), seq: Seq::new(seq), floor: Seq::new(seq.saturating_sub(below)) },
        };
        prop_assert_eq!(decode_request(&encode_request(&command)), Ok(command));
    }

    #[test]
    fn replies_survive_the_round_trip(number: u16, hint: u32) {
        let reply = Reply {
            result: fault::fault_of(number).map_or(Ok(()), Err),
            leader_hint: (hint != 0).then(|| ChunkserverId::new(hint)),
        };
        prop_assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
    }

    #[test]
    fn extents_survive_the_round_trip(list in prop::collection::vec((1u64..5000, any::<bool>(), any::<bool>()), 0..100)) {
        let list: Vec<_> = list.into_iter().map(|(length, hole, zero)| Extent { length, hole, zero }).collect();
        prop_assert_eq!(decode_extents(&encode_extents(&list)), Ok(list));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let _ = decode_request(&bytes);
        let _ = Reply::decode(&bytes);
        let _ = decode_extents(&bytes);
        // Whatever is accepted is written back the same.
        if let Ok(command) = decode_request(&bytes) {
            prop_assert_eq!(&encode_request(&command)[..], &bytes[..]);
        }
    }
}
