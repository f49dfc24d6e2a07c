//! Golden bytes of versions 3 and 4, round trips, and arbitrary bytes against every decoder.

use crate::extents;
use crate::fault::fault_from_code;
use crate::frame::{HEADER_BYTES, Header, Message};
use crate::hello::{Hello, Identity, InstanceId, Mode};
use crate::version::{LinkVersion, VersionRange};
use crate::welcome::{Accepted, Refusal, Refused, VolumeTraits, Welcome};
use proptest::prelude::*;
use spline_types::{
    BlockOp, BlockRequest, BlockSize, ByteRange, Completion, Epoch, Extent, Fault, Geometry, OnUnavailable,
    RequestId,
};
use std::time::Duration;

fn hello() -> Hello {
    Hello {
        versions: VersionRange { min: 3, max: 4 },
        features: 0x0102,
        mode: Mode::Resume { epoch: Epoch::new(9) },
        read_only: true,
        force: false,
        instance: InstanceId(0x1122_3344_5566_7788),
        identity: Identity::new(0xa1, 0xb2),
        volume: "vm/disk0".parse().expect("a volume name"),
    }
}

fn accepted() -> Accepted {
    Accepted {
        version: LinkVersion::V3,
        features: 0,
        epoch: Epoch::new(7),
        identity: Identity::new(0xa1, 0xb2).expect("not 0"),
        geometry: Geometry { size: 1 << 30, block_size: BlockSize::B4096 },
        traits: VolumeTraits { volatile_cache: true, fast_zero: true, ..VolumeTraits::default() },
        on_unavailable: OnUnavailable::FailAfter(Duration::from_secs(30)),
        request_bytes_max: 32 << 20,
        requests_max: 1024,
        bytes_max: 64 << 20,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn golden_hello_v3() {
    assert_eq!(
        hex(&hello().encode()),
        "53504c48030004000201000000000000020108000000000088776655443322110900000000000000\
         b200000000000000a100000000000000766d2f6469736b30"
    );
}

#[test]
fn only_a_first_link_may_force() {
    let first = Hello { mode: Mode::Open, force: true, ..hello() };
    let bytes = first.encode();
    assert_eq!(bytes[17], 3);
    assert_eq!(Hello::decode(&bytes).expect("decodes"), Some((first.clone(), bytes.len())));
    let resumed = Hello { mode: Mode::Resume { epoch: Epoch::new(1) }, ..first };
    let mut bytes = resumed.encode();
    assert_eq!(bytes[17], 1);
    bytes[17] = 3;
    assert!(Hello::decode(&bytes).is_err());
}

#[test]
fn a_hello_of_another_version_is_refused_before_the_rest_is_read() {
    for (min, max) in [(1u16, 1u16), (1, 3), (2, 2), (2, 3), (5, 6)] {
        let hello = Hello { versions: VersionRange { min, max }, ..hello() };
        let refused = Hello::decode(&hello.encode()[..8]).expect_err("another layout");
        assert!(refused.to_string().contains(&format!("theirs_min={min} theirs_max={max}")), "{refused}");
    }
}

#[test]
fn a_first_link_resumes_nothing() {
    let mut bytes = Hello { mode: Mode::Open, ..hello() }.encode();
    bytes[32] = 9;
    assert!(Hello::decode(&bytes).is_err());
}

#[test]
fn whoever_resumes_names_the_volume() {
    let known = Hello { mode: Mode::Open, ..hello() };
    let first = Hello { identity: None, ..known.clone() };
    for fine in [known, first] {
        let bytes = fine.encode();
        assert_eq!(Hello::decode(&bytes), Ok(Some((fine, bytes.len()))));
    }
    assert!(Hello::decode(&Hello { identity: None, ..hello() }.encode()).is_err());
    let mut nameless = Welcome::Accepted(accepted()).encode();
    nameless[64..].fill(0);
    assert!(Welcome::decode(&nameless).is_err());
}

#[test]
fn golden_welcome_v3() {
    assert_eq!(
        hex(&Welcome::Accepted(accepted()).encode()),
        "53504c57030000000000000000000000070000000000000000000040000000000010000006000000\
         307500000000000200040000000000000000000400000000b200000000000000a100000000000000"
    );
    let refused = Refused { refusal: Refusal::NotFound, text: "no".to_owned() };
    assert_eq!(
        hex(&Welcome::Refused(refused).encode()),
        format!("53504c5704000200{}02000000{}6e6f", "0".repeat(88), "0".repeat(16))
    );
}

#[test]
fn golden_frames_v3() {
    let zeroes = BlockRequest {
        id: RequestId::new(9),
        op: BlockOp::WriteZeroes { no_hole: true, fast: false },
        range: ByteRange::new(4096, 8192).expect("fits"),
        fua: true,
    };
    let tail = "0".repeat(20);
    assert_eq!(
        hex(&Header::request(zeroes).encode()),
        format!("53504c4601050300090000000000000000100000000000000020000000000000000000000000{tail}")
    );
    let write = BlockRequest { op: BlockOp::Write, fua: false, ..zeroes };
    assert_eq!(
        hex(&Header::request(write).encode()),
        format!("53504c4601020000090000000000000000100000000000000020000000000000002000000000{tail}")
    );
    let fenced = Header::reply(RequestId::new(9), Completion::Failed(Fault::Fenced), 0);
    assert_eq!(
        hex(&fenced.encode()),
        format!("53504c46020000000900000000000000{}4000{tail}", "0".repeat(40))
    );
    let resized = Header::bare(Message::Resized { size: 1 << 20 });
    assert_eq!(
        hex(&resized.encode()),
        format!("53504c4603000000{}0000100000000000{}", "0".repeat(32), "0".repeat(32))
    );
}

#[test]
fn golden_frames_v4() {
    let region = Header::bare(Message::Region { number: 7, offset: 4096, length: 1 << 20 });
    assert_eq!(
        hex(&region.encode()),
        format!("53504c4607000000070000000000000000100000000000000000100000000000{}", "0".repeat(32))
    );
    let gone = Header::bare(Message::RegionGone { number: 7 });
    assert_eq!(hex(&gone.encode()), format!("53504c46080000000700000000000000{}", "0".repeat(64)));
    let renewed = Header::bare(Message::Renewed { epoch: Epoch::new(12) });
    assert_eq!(hex(&renewed.encode()), format!("53504c46090000000c00000000000000{}", "0".repeat(64)));
    let mut too_many = gone.encode();
    too_many[12] = 1;
    assert!(Header::decode(&too_many).is_err(), "numbers have 32 bits");
}

#[test]
fn golden_extents_v3() {
    let list =
        [Extent { length: 4096, hole: true, zero: true }, Extent { length: 1, hole: false, zero: false }];
    assert_eq!(hex(&extents::encode(&list)), "001000000000000003000000010000000000000000000000");
}

#[test]
fn an_unknown_version_is_refused_with_its_number() {
    let mut bytes = Welcome::Accepted(accepted()).encode();
    bytes[4] = 42;
    let refused = Welcome::decode(&bytes).expect_err("version 42");
    assert!(refused.to_string().contains("theirs_max=42"), "{refused}");
}

#[test]
fn hostile_headers_are_refused() {
    let read = BlockRequest {
        id: RequestId::new(1),
        op: BlockOp::Read,
        range: ByteRange::new(0, 512).expect("fits"),
        fua: false,
    };
    let good = Header::request(read).encode();
    assert!(Header::decode(&good).is_ok());
    // (position, value): magic, kind, op, flags, offset overflow with length, payload of a read, status, reserved.
    for (at, value) in
        [(0, 0), (4, 99), (5, 99), (6, 8), (33, 1), (36, 1), (38, 1), (40, 1), (47, 1), (28, 1)]
    {
        let mut bad = good;
        bad[at] = value;
        assert!(Header::decode(&bad).is_err(), "byte {at}");
    }
    let mut overflow = good;
    overflow[16..24].fill(0xff);
    assert!(Header::decode(&overflow).is_err());
    let mut failed_with_data = Header::reply(RequestId::new(1), Completion::Withdrawn, 0).encode();
    failed_with_data[32] = 1;
    assert!(Header::decode(&failed_with_data).is_err());
}

#[test]
fn a_long_refusal_is_cut_at_a_character() {
    let text = "ä".repeat(1000);
    let bytes = Welcome::Refused(Refused { refusal: Refusal::Held, text }).encode();
    let (decoded, _) = Welcome::decode(&bytes).expect("decodes").expect("whole");
    assert_eq!(decoded, Welcome::Refused(Refused { refusal: Refusal::Held, text: "ä".repeat(512) }));
}

fn block_op() -> impl Strategy<Value = BlockOp> {
    prop_oneof![
        Just(BlockOp::Read),
        Just(BlockOp::Write),
        Just(BlockOp::Flush),
        Just(BlockOp::Discard),
        (any::<bool>(), any::<bool>()).prop_map(|(no_hole, fast)| BlockOp::WriteZeroes { no_hole, fast }),
        Just(BlockOp::Cache),
        Just(BlockOp::Status),
    ]
}

fn message() -> impl Strategy<Value = Header> {
    let request = (any::<u64>(), block_op(), 0u64..1 << 46, 0u64..=32 << 20, any::<bool>()).prop_map(
        |(id, op, offset, length, fua)| {
            let range = ByteRange::new(offset, length).expect("fits");
            Header::request(BlockRequest { id: RequestId::new(id), op, range, fua })
        },
    );
    let done = (any::<u64>(), 0u32..=32 << 20)
        .prop_map(|(id, payload)| Header::reply(RequestId::new(id), Completion::Done(()), payload));
    let failed = (any::<u64>(), 0u16..200).prop_map(|(id, code)| {
        let completion = fault_from_code(code).map_or(Completion::Withdrawn, Completion::Failed);
        Header::reply(RequestId::new(id), completion, 0)
    });
    let bare = prop_oneof![
        (0u64..1 << 46).prop_map(|size| Message::Resized { size }),
        Just(Message::Leaving),
        Just(Message::Lost),
        Just(Message::Detach),
        (any::<u32>(), any::<u64>(), any::<u64>()).prop_map(|(number, offset, length)| Message::Region {
            number,
            offset,
            length
        }),
        any::<u32>().prop_map(|number| Message::RegionGone { number }),
        any::<u64>().prop_map(|epoch| Message::Renewed { epoch: Epoch::new(epoch) }),
    ];
    prop_oneof![request, done, failed, bare.prop_map(Header::bare)]
}

proptest! {
    #[test]
    fn headers_round_trip(header in message()) {
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn headers_never_panic(mut bytes in any::<[u8; HEADER_BYTES]>(), magic in any::<bool>(), kind in 0u8..8) {
        if magic {
            bytes[..4].copy_from_slice(b"SPLF");
            bytes[4] = kind;
        }
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
        }
    }

    #[test]
    fn hellos_decode_only_when_whole(cut in 0usize..70) {
        let bytes = hello().encode();
        let expected = if cut < bytes.len() { None } else { Some((hello(), bytes.len())) };
        prop_assert_eq!(Hello::decode(&bytes[..cut.min(bytes.len())]), Ok(expected));
    }

    #[test]
    fn welcomes_decode_only_when_whole(cut in 0usize..=80, epoch in any::<u64>()) {
        let welcome = Welcome::Accepted(Accepted { epoch: Epoch::new(epoch), ..accepted() });
        let bytes = welcome.encode();
        let expected = if cut < bytes.len() { None } else { Some((welcome, bytes.len())) };
        prop_assert_eq!(Welcome::decode(&bytes[..cut]), Ok(expected));
    }

    #[test]
    fn greetings_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..128), side in 0u8..3) {
        if bytes.len() >= 4 && side < 2 {
            bytes[..4].copy_from_slice(if side == 0 { b"SPLH" } else { b"SPLW" });
        }
        if bytes.len() >= 8 && side == 0 {
            bytes[4..8].copy_from_slice(&[3, 0, 3, 0]);
        }
        let _ = Hello::decode(&bytes);
        let _ = Welcome::decode(&bytes);
    }

    #[test]
    fn extents_round_trip(
        list in proptest::collection::vec((1u64..1 << 30, any::<bool>(), any::<bool>()), 1..50),
        noise in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let list: Vec<Extent> =
            list.into_iter().map(|(length, hole, zero)| Extent { length, hole, zero }).collect();
        let asked = list.iter().map(|extent| extent.length).sum();
        prop_assert_eq!(extents::decode(&extents::encode(&list), asked), Ok(list.clone()));
        prop_assert!(extents::decode(&extents::encode(&list), asked - 1).is_err());
        let _ = extents::decode(&noise, u64::MAX);
    }
}
