//! Each operation that a guest can ask for, in flight when its gateway goes: the next one gets the same request once, and the guest
//! hears of that alone.

use super::*;
use spline_types::{BlockRequest, ByteRange};

/// The flag of a zeroing: the space may be given back.
const UNMAP: u32 = 1;
/// The feature of a driver that flushes; without it a write is to be durable at once.
const FLUSHES: u64 = 1 << 9;

/// Types with the flags of a range, and what of that the gateway gets.
const EACH: [(u32, u32, BlockOp); 6] = [
    (0, 0, BlockOp::Read),
    (1, 0, BlockOp::Write),
    (4, 0, BlockOp::Flush),
    (11, 0, BlockOp::Discard),
    (13, 0, BlockOp::WriteZeroes { no_hole: true, fast: false }),
    (13, UNMAP, BlockOp::WriteZeroes { no_hole: false, fast: false }),
];

/// How a gateway goes: it, or its link, is afterwards the next one. The id is of a request that it has.
type Go = fn(&mut Place, RequestId);

fn lose_link(place: &mut Place, _: RequestId) {
    place.link.hang_up();
    place.welcome(OnUnavailable::Wait);
}

fn withdraw_and_leave(place: &mut Place, id: RequestId) {
    place.link.withdraw(id);
    place.link.say(Message::Leaving);
    lose_link(place, id);
}

fn withdraw_and_hand_over(place: &mut Place, id: RequestId) {
    place.link.withdraw(id);
    place.link.say(Message::Renewed { epoch: Epoch::new(9) });
}

impl Place {
    /// Offers a request whose data lies at `BUFFERS`: sector 24, eight of them.
    fn ask(&mut self, head: u16, (kind, flags, op): (u32, u32, BlockOp)) {
        let header = self.header(head, kind, if op.carries_data() { 24 } else { 0 });
        let status = (STATUS + u64::from(head), 1, true);
        let header = (header, 16, false);
        match op {
            BlockOp::Flush => self.driver.chain(head, &[header, status]),
            BlockOp::Read => self.driver.chain(head, &[header, (BUFFERS, 4096, true), status]),
            BlockOp::Write => {
                self.driver.put(BUFFERS, &[5; 4096]);
                self.driver.chain(head, &[header, (BUFFERS, 4096, false), status]);
            }
            _ => {
                let range = [&24u64.to_le_bytes()[..], &8u32.to_le_bytes(), &flags.to_le_bytes()].concat();
                self.driver.put(BUFFERS, &range);
                self.driver.chain(head, &[header, (BUFFERS, 16, false), status]);
            }
        }
        self.kick_off(head);
    }
}

/// Has each operation come to a gateway, and that one `go`.
fn each_is_carried_out_once(go: Go) {
    for features in [FLUSHES, 0] {
        let mut place = Place::new(OnUnavailable::Wait);
        place.start_with(features, None);
        for (number, what) in EACH.into_iter().enumerate() {
            let (op, head) = (what.2, 4 * number as u16);
            place.ask(head, what);
            let (first, data) = place.link.request();
            let range = match op {
                BlockOp::Flush => ByteRange::EMPTY,
                _ => ByteRange::new(24 * 512, 4096).expect("fits"),
            };
            let fua = features == 0 && matches!(op, BlockOp::Write | BlockOp::WriteZeroes { .. });
            assert_eq!(first, BlockRequest { id: first.id, op, range, fua });
            go(&mut place, first.id);
            assert_eq!(place.link.request(), (first, data), "a replay is the same request");
            assert_eq!((place.driver.used(), place.status(head)), (vec![], 0xff), "{op:?} is not answered");
            let read = if op == BlockOp::Read { &[7; 4096][..] } else { &[] };
            place.link.done(first.id, read);
            let written = 1 + read.len() as u32;
            assert_eq!((place.used(), place.status(head)), (vec![(head.into(), written)], 0), "{op:?}");
            assert_eq!(place.driver.get(BUFFERS, read.len()), read);
            // Had it been sent or answered once more, that would come before.
            place.ask(60, EACH[2]);
            let (probe, _) = place.link.request();
            assert_eq!(probe.op, BlockOp::Flush);
            assert!(probe.id != first.id, "{op:?} is sent once more");
            place.link.done(probe.id, &[]);
            assert_eq!(place.used(), [(60, 1)], "{op:?}");
        }
    }
}

on_both!(each_operation_of_a_lost_link_is_carried_out_once, {
    each_is_carried_out_once(lose_link);
});

on_both!(each_operation_that_a_leaving_gateway_withdraws_is_carried_out_once_by_the_next, {
    each_is_carried_out_once(withdraw_and_leave);
});

#[test]
fn each_operation_that_is_withdrawn_for_a_hand_over_is_carried_out_once_on_the_same_link() {
    RING.set(true);
    each_is_carried_out_once(withdraw_and_hand_over);
}
