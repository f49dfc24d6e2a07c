//! nebd's link with a ring: all cases, and what only such a gateway can do.

#[path = "support/cases.rs"]
mod cases;
#[path = "support/client.rs"]
mod client;
#[path = "support/gateway.rs"]
mod gateway;
#[path = "support/operations.rs"]
mod operations;

use cases::Place;
use client::{Client, request};
use gateway::Manner;
use spline_link::{Message, Mode};
use spline_nebd::nbd::protocol::*;
use spline_types::Epoch;
use std::io::Write;
use std::time::{Duration, Instant};

const RING: bool = true;

#[test]
fn what_was_withdrawn_is_sent_again_on_the_same_link_before_what_is_new() {
    let (place, _nebd) = Place::serving();
    let gateway = &place.gateway;
    gateway.lock().manner = Manner::Withdraw;
    let mut client = Client::connect(&place.nbd());
    for cookie in 1..=3u64 {
        client.write(cookie, cookie * 4096, &[cookie as u8; 5000]);
    }
    gateway.wait("the old process withdrew them", |control| control.answered == 3);
    gateway.lock().manner = Manner::Answer;
    gateway.say(&Message::Renewed { epoch: Epoch::new(7) });
    client.write(4, 4 * 4096, &[4; 4096]);
    let mut answered: Vec<_> = (0..4).map(|_| client.reply()).collect();
    answered.sort_unstable();
    assert_eq!(answered, [(1, 0), (2, 0), (3, 0), (4, 0)], "complete_once");
    let control = gateway.lock();
    assert_eq!(control.links, [Mode::Open], "the link stayed");
    let blocks: Vec<u64> = control.received.iter().map(|(_, r)| r.range.offset() / 4096).collect();
    assert_eq!(blocks, [1, 2, 3, 1, 2, 3, 4]);
    drop(control);
    assert_eq!(client.read(5, 3 * 4096, 1), [3]);
    // A nebd that comes back names the session that it was told of last.
    gateway.kill();
    gateway.listen();
    assert_eq!(client.read(6, 4096, 4096), [1; 4096]);
    assert_eq!(gateway.lock().links, [Mode::Open, Mode::Resume { epoch: Epoch::new(7) }]);
}

#[test]
fn each_operation_that_is_withdrawn_for_a_hand_over_is_carried_out_once_on_the_same_link() {
    operations::each_is_carried_out_once(Manner::Withdraw, 0, |gateway| {
        gateway.lock().manner = Manner::Answer;
        gateway.say(&Message::Renewed { epoch: Epoch::new(7) });
    });
}

#[test]
fn answers_may_come_in_any_order() {
    let (place, _nebd) = Place::serving();
    let gateway = &place.gateway;
    let mut client = Client::connect(&place.nbd());
    for block in 0..8u64 {
        client.write(block, block * 4096, &[block as u8 + 1; 4096]);
        assert_eq!(client.reply(), (block, 0));
    }
    gateway.lock().manner = Manner::Delay;
    for block in 0..8u64 {
        client.send(CMD_READ, block, block * 4096, 4096);
    }
    gateway.wait("all came", |control| control.received.len() == 16);
    gateway.lock().manner = Manner::Backwards;
    for block in (0..8u64).rev() {
        assert_eq!(client.reply(), (block, 0));
        assert_eq!(client.data(4096), [block as u8 + 1; 4096]);
    }
}

#[test]
fn a_gateway_that_writes_nonsense_into_the_ring_is_left_and_tried_again() {
    let (place, _nebd) = Place::serving();
    let mut client = Client::connect(&place.nbd());
    for (round, manner) in [Manner::Lie, Manner::Overpay, Manner::Miscount].into_iter().enumerate() {
        place.gateway.lock().manner = manner;
        client.send(CMD_READ, round as u64, 0, 4096);
        place.gateway.wait("nebd comes back", |control| control.links.len() == round + 2);
        place.gateway.lock().manner = Manner::Answer;
        assert_eq!(client.reply(), (round as u64, 0));
        assert_eq!(client.data(4096), [0; 4096]);
    }
}

#[test]
fn no_late_duplicate() {
    let (place, _nebd) = Place::serving();
    let gateway = &place.gateway;
    gateway.lock().manner = Manner::Hold;
    let mut client = Client::connect(&place.nbd());
    client.send(CMD_READ, 1, 0, 64 << 10);
    client.write(2, 1 << 20, &[2; 64 << 10]);
    gateway.wait("both came", |control| control.received.len() == 2);
    let late = gateway.lock().regions[0].clone();
    gateway.kill();
    gateway.lock().manner = Manner::Answer;
    gateway.listen();
    assert_eq!(client.reply(), (1, 0));
    assert_eq!(client.data(64 << 10), vec![0; 64 << 10]);
    assert_eq!(client.reply(), (2, 0));
    // What they held is free. A newer write must not lie where the gateway of the first link still puts the data of its read.
    gateway.lock().manner = Manner::Delay;
    client.write(3, 2 << 20, &[3; 64 << 10]);
    gateway.wait("the newer one came", |control| control.received.len() == 5);
    late.write(0, &vec![0xee; 64 << 10]).expect("its memory is still there");
    gateway.lock().manner = Manner::Answer;
    assert_eq!(client.reply(), (3, 0));
    assert!(client.read(4, 2 << 20, 64 << 10) == vec![3; 64 << 10]);
    assert!(client.read(5, 1 << 20, 64 << 10) == vec![2; 64 << 10]);
}

#[test]
fn data_that_changes_under_a_reply_can_not_break_the_stream() {
    let (place, nebd) = Place::serving();
    let gateway = &place.gateway;
    let mut client = Client::connect_structured(&place.nbd());
    client.send(CMD_READ, 1, 0, 256 << 10);
    assert_eq!(client.chunks(1), 256 << 10);
    let memory = gateway.lock().regions[0].clone();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0u64.. {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                let byte = (round % 2) as u8;
                memory.write(round * 4096 % (1 << 20), &[byte; 4096]).expect("is there");
            }
        });
        for cookie in 0..200 {
            client.send(CMD_READ, cookie, 0, 256 << 10);
            assert_eq!(client.chunks(cookie), 256 << 10, "whatever it is, it is as long as was asked for");
            client.stream.write_all(&request(CMD_WRITE, cookie, 0, 4096)).expect("writes");
            client.stream.write_all(&[1; 4096]).expect("writes");
            assert_eq!(client.reply(), (cookie, 0));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    nebd.shutdown().expect("it is alive");
}

#[test]
fn data_lies_where_direct_io_takes_it_and_leaves_nothing_behind() {
    let (place, _nebd) = Place::serving();
    let gateway = &place.gateway;
    let mut client = Client::connect(&place.nbd());
    for (cookie, length) in [(1, 512), (2, 4096), (3, 3 << 20), (4, 32 << 20)] {
        let data = vec![cookie as u8; length];
        client.write(cookie, 0, &data);
        assert_eq!(client.reply(), (cookie, 0));
        assert!(client.read(cookie, 0, length as u32) == data);
    }
    let control = gateway.lock();
    assert!(control.pieces.iter().all(|piece| piece.offset % 4096 == 0), "{:?}", control.pieces);
    assert_eq!(control.pieces.len(), 8, "each request has one piece of an area where nothing else is");
    let memory = control.regions[0].clone();
    drop(control);
    let resident = || rustix::fs::fstat(memory.fd()).expect("stats").st_blocks * 512;
    let late = Instant::now() + Duration::from_secs(20);
    while resident() > 0 {
        assert!(Instant::now() < late, "memory that is not used is given back: bytes={}", resident());
        std::thread::sleep(Duration::from_millis(10));
    }
}
