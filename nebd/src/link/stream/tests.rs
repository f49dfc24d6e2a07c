//! Frames of a gateway, cut anywhere, and those that it must not send.

use super::*;
use crate::area::Area;
use crate::budget::Budget;
use crate::export::Export;
use crate::inflight::{Inflight, Limits};
use crate::link::tests::link;
use crate::metrics::Families;
use crate::nbd::connection::ConnectionId;
use crate::nbd::transmission::Ticket;
use crate::volume::Asked;
use prometheus_client::registry::Registry;
use proptest::prelude::*;
use spline_link::{VolumeTraits, extents};
use spline_types::{BlockSize, ByteRange, Extent, Geometry};
use std::time::Instant;

const LIMITS: Limits = Limits { requests: 64, bytes: u64::MAX };

/// A volume with requests on the link, which have the ids in the answer.
fn asked(requests: &[(BlockOp, u64)]) -> (Volume, Vec<RequestId>) {
    let area = Area::create(16 << 20).expect("creates");
    let mut volume = Volume {
        export: Export {
            name: "disk0".into(),
            description: String::new(),
            geometry: Geometry { size: 1 << 30, block_size: BlockSize::B4096 },
            traits: VolumeTraits::default(),
            read_only: false,
        },
        inflight: Inflight::new(LIMITS),
        budget: Budget::default(),
        area: Rc::clone(&area),
        lost: false,
        metrics: Families::new(&mut Registry::default()).of("disk0", "nbd"),
        now: Instant::now(),
    };
    let mut ids = Vec::new();
    for (op, length) in requests {
        let range = ByteRange::new(0, *length).expect("fits");
        let ticket = Ticket { cookie: 0, op: *op, range, one_chunk: false, one_extent: false };
        let origin = Origin { connection: ConnectionId(1), ticket };
        let data = (ticket.data_bytes() > 0).then(|| {
            let room = area.take(ticket.data_bytes() as usize).expect("fits");
            Rc::new(room)
        });
        ids.push(volume.inflight.admit((*op, range, false), Asked { origin, data }, volume.now));
        volume.inflight.next_to_send(LIMITS).expect("is sent");
    }
    (volume, ids)
}

fn reply(id: RequestId, payload: &[u8]) -> Vec<u8> {
    let head = Header::reply(id, Completion::Done(()), payload.len() as u32).encode();
    [&head[..], payload].concat()
}

/// What comes of bytes.
fn hear(stream: &mut Stream, volume: &mut Volume, bytes: &[u8]) -> Result<Vec<Answer>, LinkDown> {
    let mut answers = Vec::new();
    stream.take(bytes, &mut link(Instant::now()), volume, &mut |_, _, result| {
        answers.push(result.expect("done"))
    })?;
    Ok(answers)
}

#[test]
fn what_a_gateway_must_not_say_cuts_the_link() {
    let requests = [(BlockOp::Read, 4096), (BlockOp::Write, 4096), (BlockOp::Status, 4096)];
    let extent = extents::encode(&[Extent { length: 4096, hole: true, zero: true }]);
    let (mut volume, ids) = asked(&requests);
    let unsent = RequestId::new(ids[0].get() + (1 << 20));
    let wrong = [
        reply(unsent, &[]),
        reply(ids[0], &[0; 4095]),
        reply(ids[0], &[0; 4097]),
        reply(ids[0], &[]),
        reply(ids[1], &[0; 4096]),
        reply(ids[2], &[]),
        reply(ids[2], &extent[..11]),
        reply(ids[2], &vec![0; (96 << 10) + 12]),
        Header::bare(Message::Detach).encode().to_vec(),
        [vec![0x55], vec![0; 47]].concat(),
    ];
    for bytes in &wrong {
        assert!(hear(&mut Stream::default(), &mut volume, bytes).is_err(), "{:?}", &bytes[..16]);
    }
    let good = [reply(ids[2], &extent), reply(ids[1], &[]), reply(ids[0], &[3; 4096])].concat();
    let answers = hear(&mut Stream::default(), &mut volume, &good).expect("all is right");
    assert!(matches!(&answers[0], Answer::Extents(list) if list.len() == 1 && list[0].zero));
    assert!(matches!(&answers[2], Answer::Data(data) if data.to_vec() == [3; 4096]));
}

proptest! {
    #[test]
    fn answers_come_out_whole_however_frames_are_cut(
        lengths in proptest::collection::vec(1u64..40_000, 1..6),
        cuts in proptest::collection::vec(1usize..30_000, 1..50),
    ) {
        let requests: Vec<_> = lengths.iter().map(|length| (BlockOp::Read, *length)).collect();
        let (mut volume, ids) = asked(&requests);
        let bytes: Vec<u8> = ids.iter().zip(&lengths).enumerate()
            .flat_map(|(at, (id, length))| reply(*id, &vec![at as u8 + 1; *length as usize])).collect();
        let (mut stream, mut got, mut at) = (Stream::default(), Vec::new(), 0);
        for cut in cuts.iter().cycle() {
            let end = bytes.len().min(at + cut);
            let input = [std::mem::take(&mut stream.partial), bytes[at..end].to_vec()].concat();
            at = end;
            got.extend(hear(&mut stream, &mut volume, &input).expect("all is right"));
            prop_assert!(stream.partial.len() < HEADER_BYTES);
            if at == bytes.len() {
                break;
            }
        }
        prop_assert_eq!(got.len(), lengths.len());
        for (at, (answer, length)) in got.iter().zip(&lengths).enumerate() {
            let Answer::Data(data) = answer else { panic!("{answer:?}") };
            prop_assert!(data.to_vec() == vec![at as u8 + 1; *length as usize]);
        }
        prop_assert!(volume.inflight.is_empty());
    }
}
