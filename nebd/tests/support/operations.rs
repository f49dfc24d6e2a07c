//! Each operation that a client can send, in flight when its gateway goes: the next one carries out the same request once, and the
//! client hears of that alone. Whether the link has a ring makes no difference.

use crate::cases::Place;
use crate::client::{Client, request};
use crate::gateway::{FakeGateway, Manner};
use spline_link::Message;
use spline_nebd::nbd::protocol::*;
use spline_types::{BlockOp, BlockRequest, ByteRange};
use std::io::Write;

/// A command with its flags, and what of it the gateway gets.
const EACH: [(u16, u16, BlockOp, bool); 11] = [
    (CMD_READ, 0, BlockOp::Read, false),
    (CMD_WRITE, 0, BlockOp::Write, false),
    (CMD_WRITE, CMD_FLAG_FUA, BlockOp::Write, true),
    (CMD_FLUSH, 0, BlockOp::Flush, false),
    (CMD_TRIM, 0, BlockOp::Discard, false),
    (CMD_TRIM, CMD_FLAG_FUA, BlockOp::Discard, true),
    (CMD_WRITE_ZEROES, 0, BlockOp::WriteZeroes { no_hole: false, fast: false }, false),
    (CMD_WRITE_ZEROES, CMD_FLAG_FUA, BlockOp::WriteZeroes { no_hole: false, fast: false }, true),
    (CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE, BlockOp::WriteZeroes { no_hole: true, fast: false }, false),
    (CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, BlockOp::WriteZeroes { no_hole: false, fast: true }, false),
    (CMD_CACHE, 0, BlockOp::Cache, false),
];

/// What the volume holds before, what a write writes, and where an operation lies within that.
static IMAGE: [u8; 32 << 10] = [0xaa; 32 << 10];
const WRITTEN: u8 = 0x55;
const PLACE: std::ops::Range<usize> = 4608..14336;

/// Has each operation come to a gateway that does as `manner` says, and this one `go`: from there on, `links` later, everything is
/// carried out.
pub(crate) fn each_is_carried_out_once(manner: Manner, links: usize, go: impl Fn(&FakeGateway)) {
    let (place, _nebd) = Place::serving();
    let gateway = &place.gateway;
    let mut client = Client::connect(&place.nbd());
    for what in EACH {
        let (command, flags, op, fua) = what;
        client.write(1, 0, &IMAGE);
        assert_eq!(client.reply(), (1, 0));
        let mut control = gateway.lock();
        control.manner = manner;
        let came = control.received.len();
        drop(control);
        let asked = match op {
            BlockOp::Flush => ByteRange::EMPTY,
            _ => ByteRange::new(PLACE.start as u64, PLACE.len() as u64).expect("fits"),
        };
        let mut bytes = request(command, 2, asked.offset(), asked.length() as u32);
        bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        bytes.resize(bytes.len() + if op == BlockOp::Write { PLACE.len() } else { 0 }, WRITTEN);
        client.stream.write_all(&bytes).expect("writes");
        gateway.wait("the gateway has it", |control| {
            let withdrawn = manner != Manner::Withdraw || control.answered == came + 1;
            control.received.len() == came + 1 && withdrawn
        });
        go(gateway);
        assert_eq!(client.reply(), (2, 0), "{what:?}");
        if op == BlockOp::Read {
            assert!(client.data(PLACE.len()) == IMAGE[PLACE]);
        }
        // A second answer would come before this one.
        let now = client.read(3, 0, IMAGE.len() as u32);
        let mut expected = IMAGE;
        match op {
            BlockOp::Write => expected[PLACE].fill(WRITTEN),
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => expected[PLACE].fill(0),
            BlockOp::Read | BlockOp::Flush | BlockOp::Cache | BlockOp::Status => {}
        }
        assert!(now == expected, "{what:?}");
        let control = gateway.lock();
        let [(before, first), (after, again), _] = control.received[came..] else {
            panic!("{what:?} came as {:?}", &control.received[came..])
        };
        assert_eq!(first, BlockRequest { id: first.id, op, range: asked, fua }, "{what:?}");
        assert_eq!((again, after), (first, before + links), "a replay is the same request");
    }
}

/// The next gateway, which answers.
fn next(gateway: &FakeGateway) {
    gateway.lock().manner = Manner::Answer;
    gateway.kill();
    gateway.listen();
}

#[test]
fn each_operation_of_a_lost_link_is_carried_out_once() {
    each_is_carried_out_once(Manner::Hold, 1, next);
}

#[test]
fn each_operation_that_a_leaving_gateway_withdraws_is_carried_out_once_by_the_next() {
    each_is_carried_out_once(Manner::Withdraw, 1, |gateway| {
        gateway.say(&Message::Leaving);
        next(gateway);
    });
}
