//! The ring in memory of one process: what goes in comes out, counters of a hostile side are refused, and with loom every
//! interleaving of two threads loses neither a request nor a bell.

use super::*;
use crate::memory::SharedMemory;
use proptest::prelude::*;
use spline_types::{BlockOp, BlockRequest, ByteRange, Completion, Fault, RequestId};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, fence};

const SMALL: Places = Places { entries: 4, pieces: 8 };

#[derive(Clone, Debug)]
struct Plain(Arc<[AtomicU64]>);

impl Plain {
    fn new(places: Places) -> Self {
        Self((0..places.bytes() / 8).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Cells for Plain {
    fn load(&self, cell: usize, order: Ordering) -> u64 {
        self.0[cell].load(order)
    }
    fn store(&self, cell: usize, value: u64, order: Ordering) {
        self.0[cell].store(value, order);
    }
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

fn pair() -> (NebdEnd<Plain>, GatewayEnd<Plain>, Plain) {
    let cells = Plain::new(SMALL);
    let nebd = NebdEnd::new(cells.clone(), SMALL);
    let gateway = GatewayEnd::new(cells.clone(), SMALL, Position::default()).expect("ours");
    (nebd, gateway, cells)
}

fn request(id: u64, op: BlockOp, length: u64) -> BlockRequest {
    let range = ByteRange::new(id * 4096, length).expect("fits");
    BlockRequest { id: RequestId::new(id), op, range, fua: id % 2 == 1 }
}

fn done(id: u64) -> RingAnswer {
    RingAnswer { id: RequestId::new(id), completion: Completion::Done(()), payload: 0 }
}

fn pieces(count: usize) -> Vec<Piece> {
    (0..count).map(|i| Piece { region: i as u32, length: 512, offset: 7 * i as u64 }).collect()
}

#[test]
fn the_layout_is_as_written() {
    assert_eq!(Places::REAL.bytes(), 4096 + 1024 * 64 + 1024 * 16 + 8192 * 16);
    let (mut nebd, mut gateway, cells) = pair();
    nebd.push(&request(3, BlockOp::Write, 1024), &pieces(2));
    nebd.push(&request(4, BlockOp::Read, 1536), &pieces(3));
    assert!(!nebd.publish());
    let words = |from: usize, count: usize| -> Vec<u64> {
        (from..from + count).map(|cell| cells.load(cell, Ordering::Relaxed)).collect()
    };
    assert_eq!(words(0, 2), [0x1_524c_5053, 0x8_0000_0004]);
    assert_eq!(cells.load(8, Ordering::Relaxed), 2);
    assert_eq!(words(512, 8), [3, 0x2_0000_0102, 12288, 1024, 512 << 32, 0, 512 << 32 | 1, 7]);
    assert_eq!(words(520, 8), [4, 0x3_0000_0001, 16384, 1536, 0, 0, 0, 0]);
    let pieces_at = 512 + 4 * 8 + 4 * 2;
    assert_eq!(words(pieces_at, 6), [512 << 32, 0, 512 << 32 | 1, 7, 512 << 32 | 2, 14]);
    assert!(gateway.pop(&mut Vec::new()).expect("valid").is_some());
    let failed = Completion::Failed(Fault::NoSpace);
    gateway.push(&RingAnswer { id: RequestId::new(3), completion: failed, payload: 0 }).expect("room");
    assert!(!gateway.publish());
    assert_eq!(words(512 + 4 * 8, 2), [3, 48]);
    assert_eq!([16, 24, 32].map(|cell| cells.load(cell, Ordering::Relaxed)), [1, 1, 0]);
}

#[test]
fn requests_come_out_as_they_went_in_and_places_are_bounded() {
    let (mut nebd, mut gateway, _) = pair();
    let mut list = Vec::new();
    for round in 0..20u64 {
        for id in 0..4 {
            assert!(nebd.has_room(2).expect("valid"));
            let count = if id == 3 { 5 } else { (id % 3) as usize };
            assert!(nebd.has_room(count).expect("valid"), "{round} {id}");
            let op = if count == 0 { BlockOp::Flush } else { BlockOp::Read };
            nebd.push(&request(round * 4 + id, op, 512 * count as u64), &pieces(count));
        }
        assert!(!nebd.has_room(0).expect("valid"), "four is all there is");
        assert_eq!(gateway.pop(&mut list).expect("valid"), None, "nothing is published");
        let _ = nebd.publish();
        for id in 0..4 {
            let taken = gateway.pop(&mut list).expect("valid").expect("there");
            assert_eq!(taken.id.get(), round * 4 + id);
            assert_eq!(list, pieces(if id == 3 { 5 } else { (id % 3) as usize }));
            gateway.push(&done(taken.id.get())).expect("room");
        }
        assert_eq!(nebd.pop().expect("valid"), None, "nothing is published");
        let _ = gateway.publish();
        for id in 0..4 {
            assert_eq!(nebd.pop().expect("valid"), Some(done(round * 4 + id)));
        }
        assert_eq!((nebd.pop().expect("valid"), nebd.unanswered()), (None, 0));
    }
}

#[test]
fn pieces_wait_until_those_before_are_taken() {
    let (mut nebd, mut gateway, _) = pair();
    nebd.push(&request(0, BlockOp::Read, 512 * 5), &pieces(5));
    let _ = nebd.publish();
    assert!(nebd.has_room(3).expect("valid") && !nebd.has_room(4).expect("valid"));
    assert!(gateway.pop(&mut Vec::new()).expect("valid").is_some());
    assert!(!nebd.has_room(4).expect("valid"), "not given back yet");
    let _ = gateway.publish();
    assert!(nebd.has_room(8).expect("valid") && !nebd.has_room(9).expect("valid"));
}

#[test]
fn a_side_that_waits_is_woken_once() {
    let (mut nebd, mut gateway, _) = pair();
    nebd.push(&request(0, BlockOp::Flush, 0), &[]);
    assert!(gateway.sleep().expect("valid"), "nothing is there");
    assert!(nebd.publish(), "it sleeps");
    nebd.push(&request(1, BlockOp::Flush, 0), &[]);
    assert!(!nebd.publish(), "it was rung already");
    assert!(!gateway.sleep().expect("valid"), "there is work");
    assert!(gateway.pop(&mut Vec::new()).expect("valid").is_some());
    assert!(nebd.sleep().expect("valid"));
    gateway.push(&done(0)).expect("room");
    assert!(gateway.publish());
    nebd.wake();
    gateway.push(&done(1)).expect("room");
    assert!(!gateway.publish(), "it is awake");
}

#[test]
fn nebd_hears_where_the_gateway_stays_and_believes_nothing() {
    let (nebd, mut gateway, cells) = pair();
    assert_eq!(nebd.gateway_processor(), None, "a gateway that does not tell");
    for told in [Some(0), Some(63), Some(u32::MAX), None] {
        gateway.tell_processor(told);
        assert_eq!(nebd.gateway_processor(), told);
    }
    gateway.tell_processor(Some(2));
    assert_eq!([40, 41, 48].map(|cell| cells.load(cell, Ordering::Relaxed)), [0, 3, 0]);
    cells.store(41, u64::MAX, Ordering::Relaxed);
    assert_eq!(nebd.gateway_processor(), None);
}

#[test]
fn another_gateway_goes_on_from_the_position() {
    let (mut nebd, mut gateway, cells) = pair();
    for id in 0..3 {
        nebd.push(&request(id, BlockOp::Flush, 0), &[]);
    }
    let _ = nebd.publish();
    for id in 0..2 {
        assert!(gateway.pop(&mut Vec::new()).expect("valid").is_some());
        gateway.push(&done(id)).expect("room");
    }
    let _ = gateway.publish();
    let mut next = GatewayEnd::new(cells.clone(), SMALL, gateway.position()).expect("ours");
    assert_eq!(next.pop(&mut Vec::new()).expect("valid").map(|request| request.id.get()), Some(2));
    next.push(&done(2)).expect("room");
    let _ = next.publish();
    for id in 0..3 {
        assert_eq!(nebd.pop().expect("valid"), Some(done(id)));
    }
    let wrong = Position { taken: 1, answered: 2 };
    assert!(GatewayEnd::new(cells, SMALL, wrong).is_err());
}

#[test]
fn what_is_no_ring_is_refused() {
    for (cell, field) in [(0, "ring_magic"), (1, "ring_places")] {
        let (_, _, cells) = pair();
        cells.store(cell, 77, Ordering::Relaxed);
        let refused = GatewayEnd::new(cells, SMALL, Position::default()).expect_err("is no ring");
        assert!(refused.to_string().contains(field), "{refused}");
    }
    let (mut ring, fds) = NebdRing::create().expect("creates");
    ring.push(&request(1, BlockOp::Flush, 0), &[]);
    let (_, other) = NebdRing::create().expect("creates");
    let swapped = RingFds { memory: fds.to_nebd, to_gateway: fds.to_gateway, to_nebd: fds.memory };
    assert!(matches!(GatewayRing::adopt(swapped, Position::default()), Err(RingError::Memory(_))));
    let memory = SharedMemory::create("no ring", Places::REAL.bytes()).expect("creates");
    let memory = memory.fd().try_clone_to_owned().expect("clones");
    let no_ring = RingFds { memory, ..other };
    assert!(matches!(GatewayRing::adopt(no_ring, Position::default()), Err(RingError::Contract(_))));
    let (_, other) = NebdRing::create().expect("creates");
    let loose = rustix::fs::memfd_create("loose", rustix::fs::MemfdFlags::CLOEXEC).expect("creates");
    rustix::fs::ftruncate(&loose, Places::REAL.bytes() as u64).expect("sizes");
    let unsealed = RingFds { memory: loose, ..other };
    assert!(matches!(GatewayRing::adopt(unsealed, Position::default()), Err(RingError::NotSealed)));
    let (_, other) = NebdRing::create().expect("creates");
    let datagrams = OwnedFd::from(std::os::unix::net::UnixDatagram::unbound().expect("opens"));
    let tcp = OwnedFd::from(std::net::TcpListener::bind("127.0.0.1:0").expect("listens"));
    let (eventfd, socket) = (&other.to_gateway, &other.to_nebd);
    for (to_gateway, to_nebd) in
        [(socket, socket), (eventfd, eventfd), (eventfd, &datagrams), (eventfd, &tcp)]
    {
        let [to_gateway, to_nebd] = [to_gateway, to_nebd].map(|fd| fd.try_clone().expect("clones"));
        let (_, good) = NebdRing::create().expect("creates");
        let no_bell = RingFds { to_gateway, to_nebd, ..good };
        assert!(matches!(GatewayRing::adopt(no_bell, Position::default()), Err(RingError::Bell(_))));
    }
}

/// nebd has what it passed on, too: it fills a bell of its own and sets it to block.
#[test]
fn a_bell_that_nebd_has_filled_and_set_to_block_does_not_hold_the_gateway() {
    let (mut nebd, fds) = NebdRing::create().expect("creates");
    let kept = [fds.to_gateway.try_clone().expect("clones"), fds.to_nebd.try_clone().expect("clones")];
    let (mut gateway, _bell) = GatewayRing::adopt(fds, Position::default()).expect("adopts");
    for bell in kept {
        while rustix::io::write(&bell, &(u64::MAX - 1).to_ne_bytes()).is_ok() {}
        rustix::fs::fcntl_setfl(&bell, rustix::fs::OFlags::empty()).expect("is set to block");
    }
    let (rang, hears) = std::sync::mpsc::channel();
    nebd.push(&request(5, BlockOp::Write, 512), &pieces(1));
    nebd.publish();
    assert!(nebd.sleep().expect("valid"));
    std::thread::spawn(move || {
        gateway.pop(&mut Vec::new()).expect("valid");
        gateway.push(&done(5)).expect("room");
        let _ = rang.send(gateway.publish());
    });
    assert_eq!(hears.recv_timeout(std::time::Duration::from_secs(20)), Ok(true), "the gateway goes on");
}

#[test]
fn each_ring_of_a_bell_is_an_event_of_its_own_however_rarely_it_is_emptied() {
    use rustix::event::{Timespec, epoll};
    let (mut nebd, fds) = NebdRing::create().expect("creates");
    let (mut gateway, _bell) = GatewayRing::adopt(fds, Position::default()).expect("adopts");
    let watch = epoll::create(epoll::CreateFlags::CLOEXEC).expect("creates");
    let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&watch, nebd.bell(), epoll::EventData::new_u64(0), edges).expect("adds");
    let is_rung = || {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut events = Vec::with_capacity(4);
        epoll::wait(&watch, rustix::buffer::spare_capacity(&mut events), Some(&at_once)).expect("waits") == 1
    };
    for id in 0..1000 {
        nebd.push(&request(id, BlockOp::Flush, 0), &[]);
        nebd.publish();
        assert!(nebd.sleep().expect("valid") && !is_rung());
        gateway.pop(&mut Vec::new()).expect("valid");
        gateway.push(&done(id)).expect("room");
        assert!(gateway.publish() && is_rung(), "{id}");
        assert!(rustix::io::ioctl_fionread(nebd.bell()).expect("tells") <= 4, "it is emptied now and then");
        assert_eq!(nebd.pop().expect("valid"), Some(done(id)));
    }
}

#[test]
fn a_real_ring_carries_requests_and_bells() {
    let (mut nebd, fds) = NebdRing::create().expect("creates");
    let (mut gateway, bell) = GatewayRing::adopt(fds, Position::default()).expect("adopts");
    assert!(gateway.sleep().expect("valid"));
    nebd.push(&request(5, BlockOp::Write, 512), &pieces(1));
    nebd.publish();
    assert_eq!(rustix::io::read(&bell, &mut [0; 8]), Ok(8), "was rung");
    gateway.wake();
    let mut list = Vec::new();
    assert_eq!(gateway.pop(&mut list).expect("valid"), Some(request(5, BlockOp::Write, 512)));
    assert!(nebd.sleep().expect("valid"));
    gateway.push(&done(5)).expect("room");
    assert!(gateway.publish());
    assert_eq!(rustix::io::read(nebd.bell(), &mut [0; 8]), Ok(1), "was rung");
    assert_eq!(nebd.pop().expect("valid"), Some(done(5)));
    assert_eq!(nebd.bells(), 1);
    let again = gateway.fds(bell.as_fd()).expect("clones");
    GatewayRing::adopt(again, gateway.position()).expect("another goes on");
}

proptest! {
    /// Whatever lies in the cells: an error or a request that holds together, never a panic.
    #[test]
    fn a_gateway_survives_any_cells(
        writes in prop::collection::vec((0usize..600, any::<u64>()), 0..40),
        counters in prop::collection::vec((prop::sample::select(vec![8usize, 16, 24, 32]), 0u64..12), 0..8),
        op in 0u64..9,
        count in 0u64..6,
    ) {
        let (_, mut gateway, cells) = pair();
        cells.store(513, op | count << 32, Ordering::Relaxed);
        for (cell, value) in writes.iter().chain(&counters) {
            if let Some(place) = cells.0.get(*cell) {
                place.store(*value, Ordering::Relaxed);
            }
        }
        let mut list = Vec::new();
        for _ in 0..8 {
            let Ok(Some(taken)) = gateway.pop(&mut list) else { break };
            let bytes: u64 = list.iter().map(|piece| u64::from(piece.length)).sum();
            if taken.op.carries_data() && taken.op != BlockOp::Status {
                prop_assert_eq!(bytes, taken.range.length());
            }
            if gateway.push(&done(taken.id.get())).is_err() { break }
            let _ = gateway.publish();
        }
        let _ = gateway.sleep();
    }

    #[test]
    fn a_nebd_survives_any_cells(writes in prop::collection::vec((0usize..600, 0u64..40), 0..40)) {
        let (mut nebd, _, cells) = pair();
        nebd.push(&request(0, BlockOp::Read, 512 * 5), &pieces(5));
        let _ = nebd.publish();
        for (cell, value) in writes {
            if let Some(place) = cells.0.get(cell) {
                place.store(value, Ordering::Relaxed);
            }
        }
        let _ = nebd.has_room(4);
        let heard = std::iter::from_fn(|| nebd.pop().ok().flatten()).count();
        prop_assert!(heard <= 1, "no more than were asked");
        let _ = nebd.sleep();
    }
}

/// Two threads under loom: each step of one may fall anywhere between those of the other.
mod model {
    use super::*;
    use loom::sync::atomic::{AtomicBool, AtomicU64 as LoomU64, fence as loom_fence};
    use loom::sync::{Arc as LoomArc, Condvar, Mutex};

    const TINY: Places = Places { entries: 2, pieces: 2 };

    /// Only the cells that matter: loom explores every one of them.
    #[derive(Clone)]
    struct LoomCells(LoomArc<Vec<(usize, LoomU64)>>);

    impl LoomCells {
        fn new() -> Self {
            let counters = [0, 1, 8, 16, 24, 32, 40, 48];
            let ids = (0..2).map(|place| CELL_REQUESTS + place * SUBMISSION_CELLS);
            let answers = (0..2 * ANSWER_CELLS).map(|cell| CELL_REQUESTS + 2 * SUBMISSION_CELLS + cell);
            let all = counters.into_iter().chain(ids).chain(answers);
            Self(LoomArc::new(all.map(|cell| (cell, LoomU64::new(0))).collect()))
        }
        fn find(&self, cell: usize) -> Option<&LoomU64> {
            self.0.iter().find(|(index, _)| *index == cell).map(|(_, value)| value)
        }
    }

    impl Cells for LoomCells {
        fn load(&self, cell: usize, order: Ordering) -> u64 {
            // The rest of a flush: its code, no pieces, no bytes.
            let flush = if cell % SUBMISSION_CELLS == 1 && cell < CELL_REQUESTS + 2 * SUBMISSION_CELLS {
                3
            } else {
                0
            };
            self.find(cell).map_or(flush, |value| value.load(order))
        }
        fn store(&self, cell: usize, value: u64, order: Ordering) {
            if let Some(place) = self.find(cell) {
                place.store(value, order);
            }
        }
        fn fence(&self) {
            loom_fence(Ordering::SeqCst);
        }
    }

    /// What wakes the side that waits for it, once for as often as it was rung.
    #[derive(Default)]
    struct Bell {
        rung: Mutex<bool>,
        changed: Condvar,
    }

    impl Bell {
        fn ring(&self) {
            *self.rung.lock().expect("unpoisoned") = true;
            self.changed.notify_one();
        }
        fn wait(&self) {
            let mut rung = self.rung.lock().expect("unpoisoned");
            while !*rung {
                rung = self.changed.wait(rung).expect("unpoisoned");
            }
            *rung = false;
        }
        fn empty(&self) {
            *self.rung.lock().expect("unpoisoned") = false;
        }
    }

    fn flush(id: u64) -> BlockRequest {
        BlockRequest { id: RequestId::new(id), op: BlockOp::Flush, range: ByteRange::EMPTY, fua: false }
    }

    /// Nebd's bell is the second.
    type Bells = LoomArc<(Bell, Bell)>;

    /// A gateway that takes requests until it has `until` of them, and sleeps whenever it may. Each that it takes is `noted`, and
    /// answered at once if it `answers`.
    fn serve(
        gateway: &mut GatewayEnd<LoomCells>,
        bells: &Bells,
        until: u64,
        answers: bool,
        noted: &mut Vec<u64>,
    ) {
        let mut list = Vec::new();
        while gateway.position().taken < until {
            match gateway.pop(&mut list).expect("valid") {
                Some(request) => {
                    noted.push(request.id.get());
                    if answers {
                        gateway.push(&done(request.id.get())).expect("room");
                    }
                    if gateway.publish() {
                        bells.1.ring();
                    }
                }
                None if gateway.sleep().expect("valid") => {
                    bells.0.wait();
                    gateway.wake();
                }
                None => {}
            }
        }
    }

    /// nebd waits for an answer: it empties its bell before it says that it sleeps.
    fn await_answer(nebd: &mut NebdEnd<LoomCells>, bells: &Bells) {
        bells.1.empty();
        if nebd.sleep().expect("valid") {
            bells.1.wait();
            nebd.wake();
        }
    }

    /// nebd asks for `count` things, a place at a time, and both sides sleep whenever they may: if a bell were lost, loom would find
    /// the deadlock; if an order were too weak, a stale id.
    fn run(count: u64) {
        let cells = LoomCells::new();
        let mut nebd = NebdEnd::new(cells.clone(), TINY);
        let bells = Bells::default();
        let gateway = loom::thread::spawn({
            let bells = Bells::clone(&bells);
            let mut gateway = GatewayEnd::new(cells, TINY, Position::default()).expect("ours");
            move || serve(&mut gateway, &bells, count, true, &mut Vec::new())
        });
        let (mut asked, mut heard) = (0, 0);
        while heard < count {
            while asked < count && nebd.has_room(0).expect("valid") {
                nebd.push(&flush(100 + asked), &[]);
                asked += 1;
                if nebd.publish() {
                    bells.0.ring();
                }
            }
            match nebd.pop().expect("valid") {
                Some(answer) => {
                    assert_eq!(answer.id.get(), 100 + heard);
                    heard += 1;
                }
                None => await_answer(&mut nebd, &bells),
            }
        }
        gateway.join().expect("ends");
    }

    /// Where the old process of an upgrade stops.
    #[derive(Clone, Copy, Debug)]
    struct Stop {
        answered: u64,
        /// Taken after those; they are withdrawn.
        held: u64,
        /// It has said that it sleeps, unless it saw a request then.
        asleep: bool,
    }

    /// As the gateway's link does it: the old process withdraws what it has taken, shows that (`RingLink::freeze`) and gives its
    /// position away; the next one goes on from there (`link::go_on`) and looks before it sleeps. Both are one thread here, because
    /// what the one has done happens before it passes the link on. Which requests they took.
    fn freeze_and_go_on(cells: LoomCells, bells: &Bells, count: u64, stop: Stop) -> Vec<u64> {
        let mut taken = Vec::new();
        let mut old = GatewayEnd::new(cells.clone(), TINY, Position::default()).expect("ours");
        serve(&mut old, bells, stop.answered, true, &mut taken);
        serve(&mut old, bells, stop.answered + stop.held, false, &mut taken);
        if stop.asleep {
            // The order to freeze comes instead of a bell, which nobody answers any more.
            let _ = old.sleep().expect("valid");
        }
        for id in &taken[stop.answered as usize..] {
            old.push(&RingAnswer { completion: Completion::Withdrawn, ..done(*id) }).expect("room");
        }
        if old.publish() {
            bells.1.ring();
        }
        let mut new = GatewayEnd::new(cells, TINY, old.position()).expect("ours");
        new.wake();
        serve(&mut new, bells, count + stop.held, true, &mut taken);
        taken
    }

    /// nebd asks for `count` things and once more for what was withdrawn, which it does at once: it does not know whether anybody
    /// is there. Whatever is lost between the two processes, loom finds as a deadlock.
    fn run_over(count: u64, stop: Stop) {
        let cells = LoomCells::new();
        let mut nebd = NebdEnd::new(cells.clone(), TINY);
        let bells = Bells::default();
        let gateways = loom::thread::spawn({
            let bells = Bells::clone(&bells);
            move || freeze_and_go_on(cells, &bells, count, stop)
        });
        let mut to_ask: Vec<u64> = (100..100 + count).rev().collect();
        let (mut asked, mut answered, mut withdrawn) = (Vec::new(), Vec::new(), Vec::new());
        while answered.len() < count as usize {
            while nebd.has_room(0).expect("valid")
                && let Some(id) = to_ask.pop()
            {
                nebd.push(&flush(id), &[]);
                asked.push(id);
                if nebd.publish() {
                    bells.0.ring();
                }
            }
            match nebd.pop().expect("valid") {
                Some(RingAnswer { id, completion: Completion::Withdrawn, .. }) => {
                    withdrawn.push(id.get());
                    to_ask.push(id.get());
                }
                Some(answer) => answered.push(answer.id.get()),
                None => await_answer(&mut nebd, &bells),
            }
        }
        let taken = gateways.join().expect("ends");
        assert_eq!(taken, asked, "each is taken once");
        answered.sort_unstable();
        assert_eq!(answered, (100..100 + count).collect::<Vec<_>>(), "each is answered once");
        assert_eq!(withdrawn.len() as u64, stop.held);
        assert_eq!((nebd.pop().expect("valid"), nebd.unanswered()), (None, 0));
    }

    #[test]
    fn no_interleaving_loses_a_request_or_a_bell() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| run(3));
    }

    #[test]
    fn no_interleaving_loses_anything_between_two_processes_of_a_gateway() {
        for (count, answered, held) in [(3, 0, 0), (3, 1, 0), (2, 0, 1), (2, 1, 1), (2, 0, 2)] {
            for asleep in [false, true] {
                let mut model = loom::model::Builder::new();
                model.preemption_bound = Some(2);
                model.check(move || run_over(count, Stop { answered, held, asleep }));
            }
        }
    }

    /// The model finds what it is there for: with the fence between showing and looking taken away both sides sleep.
    #[test]
    fn the_model_finds_a_missing_fence() {
        struct NoFence(LoomCells, LoomArc<AtomicBool>);
        impl Cells for NoFence {
            fn load(&self, cell: usize, order: Ordering) -> u64 {
                self.0.load(cell, order)
            }
            fn store(&self, cell: usize, value: u64, order: Ordering) {
                self.0.store(cell, value, order);
            }
            fn fence(&self) {
                self.1.store(true, Ordering::Relaxed);
            }
        }
        let both_slept = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let seen = std::sync::Arc::clone(&both_slept);
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let cells = LoomCells::new();
            let unused = LoomArc::new(AtomicBool::new(false));
            let mut nebd = NebdEnd::new(NoFence(cells.clone(), LoomArc::clone(&unused)), TINY);
            let mut gateway =
                GatewayEnd::new(NoFence(cells, unused), TINY, Position::default()).expect("ours");
            let sleeper = loom::thread::spawn(move || gateway.sleep().expect("valid"));
            nebd.push(&flush(1), &[]);
            let rings = nebd.publish();
            let sleeps = sleeper.join().expect("ends");
            if sleeps && !rings {
                seen.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        });
        assert!(both_slept.load(std::sync::atomic::Ordering::Relaxed));
    }
}
