//! Both ends of a ring over memory that somebody else writes whatever they like into between their steps: errors, never a panic, and
//! what the gateway takes holds together.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spline_link::ring::{Cells, GatewayEnd, NebdEnd, Piece, Places, Position, RingAnswer};
use spline_types::{BlockOp, BlockRequest, ByteRange, Completion, RequestId};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::Ordering;

const PLACES: Places = Places { entries: 4, pieces: 8 };

#[derive(Clone)]
struct Memory(Rc<[Cell<u64>]>);

impl Cells for Memory {
    fn load(&self, cell: usize, _: Ordering) -> u64 {
        self.0[cell].get()
    }
    fn store(&self, cell: usize, value: u64, _: Ordering) {
        self.0[cell].set(value);
    }
    fn fence(&self) {}
}

fn request(seed: u64) -> (BlockRequest, Vec<Piece>) {
    let count = (seed % 9) as usize;
    let pieces: Vec<Piece> =
        (0..count).map(|i| Piece { region: i as u32, length: 512, offset: seed.rotate_left(i as u32) }).collect();
    let (op, length) = if count == 0 { (BlockOp::Flush, 0) } else { (BlockOp::Write, 512 * count as u64) };
    let range = ByteRange::new(seed >> 20, length).expect("fits");
    (BlockRequest { id: RequestId::new(seed), op, range, fua: false }, pieces)
}

fuzz_target!(|bytes: &[u8]| {
    let memory = Memory((0..PLACES.bytes() / 8).map(|_| Cell::new(0)).collect());
    let mut nebd = NebdEnd::new(memory.clone(), PLACES);
    let mut gateway = GatewayEnd::new(memory.clone(), PLACES, Position::default()).expect("ours");
    let mut pieces = Vec::new();
    let mut taken: Vec<RequestId> = Vec::new();
    for step in bytes.chunks_exact(10) {
        let value = u64::from_le_bytes(step[2..].try_into().expect("eight"));
        match step[0] % 8 {
            // The header's counters, near what they are or anything.
            0 => memory.0[usize::from(step[1] % 7) * 8].set(value % 16),
            1 => memory.0[usize::from(step[1] % 7) * 8].set(value),
            2 => {
                let cell = 512 + usize::from(step[1]) % (memory.0.len() - 512);
                memory.0[cell].set(value);
            }
            3 => {
                let (request, list) = request(value);
                if nebd.has_room(list.len()).unwrap_or(false) {
                    nebd.push(&request, &list);
                    let _ = nebd.publish();
                }
            }
            4 => {
                if let Ok(Some(request)) = gateway.pop(&mut pieces) {
                    let sum: u64 = pieces.iter().map(|piece| u64::from(piece.length)).sum();
                    assert!(pieces.iter().all(|piece| piece.length > 0));
                    if matches!(request.op, BlockOp::Read | BlockOp::Write) {
                        assert_eq!(sum, request.range.length());
                    }
                    taken.push(request.id);
                    assert!(taken.len() <= PLACES.entries as usize, "more than may be open");
                }
                let _ = gateway.publish();
            }
            5 => {
                if let Some(id) = taken.pop() {
                    let completion =
                        if value % 3 == 0 { Completion::Withdrawn } else { Completion::Done(()) };
                    let _ = gateway.push(&RingAnswer { id, completion, payload: 0 });
                    let _ = gateway.publish();
                }
            }
            6 => {
                let before = nebd.unanswered();
                if let Ok(Some(_)) = nebd.pop() {
                    assert_eq!(nebd.unanswered() + 1, before, "no more is heard than was asked");
                }
            }
            _ => {
                let _ = (nebd.sleep(), gateway.sleep());
                nebd.wake();
                gateway.wake();
            }
        }
    }
});
