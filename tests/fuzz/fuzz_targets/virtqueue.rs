//! A virtqueue over arbitrary guest memory: descriptors, rings and headers are the input, and some of it changes between two
//! fetches. Chains that come out must lie in the memory, requests must be inside the export and as long as their data, and each
//! head that is in use must have been fetched once.
//!
//! The first byte of an input says which features were accepted, the second how large the queue is, the third how often what
//! comes behind changes memory; the rest is memory from the descriptor table on.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustix::fs::MemfdFlags;
use spline_nebd::export::Export;
use spline_nebd::vhost::memory::{GuestMemory, RegionPlace, Segment};
use spline_nebd::vhost::order::QueueStart;
use spline_nebd::vhost::queue::{Chain, FEATURE_EVENT_INDEX, FEATURE_INDIRECT, Queue, find_rings};
use spline_nebd::vhost::request::{self, Wish};
use spline_nebd::vhost::status::BlkStatus;
use spline_types::{BlockOp, BlockSize, Geometry};
use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Guest addresses begin at 0, where inputs find them by themselves. Two regions adjoin.
const FIRST: u64 = 48 << 10;
const BYTES: u64 = 64 << 10;
/// What the front-end's addresses begin at.
const USER: u64 = 0x7f00_0000_0000;
/// Available and used ring; the descriptor table begins at 0.
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x500;
/// Bytes of the export: a few chunks.
const SIZE: u64 = 64 << 20;

struct Guest {
    memory: Arc<GuestMemory>,
    export: Export,
}

thread_local! {
    static GUEST: Guest = guest();
}

fn guest() -> Guest {
    let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, BYTES).expect("grows");
    let place = |from: u64, until: u64| RegionPlace {
        guest_address: from,
        length: until - from,
        user_address: USER + from,
        offset: from,
    };
    let again: OwnedFd = fd.try_clone().expect("duplicates");
    let memory = GuestMemory::map(vec![(place(0, FIRST), fd), (place(FIRST, BYTES), again)]).expect("maps");
    let export = Export {
        name: "disk0".into(),
        description: String::new(),
        geometry: Geometry { size: SIZE, block_size: BlockSize::B4096 },
        traits: Default::default(),
        read_only: false,
    };
    Guest { memory: Arc::new(memory), export }
}

/// Writes into memory from an address on, as far as it goes.
fn put(memory: &GuestMemory, address: u64, bytes: &[u8]) {
    let mut segments = Vec::new();
    let length = (bytes.len() as u64).min(BYTES.saturating_sub(address));
    if length == 0 || memory.locate(address, length as u32, &mut segments).is_err() {
        return;
    }
    let mut rest = bytes;
    for segment in segments {
        let (part, behind) = rest.split_at(segment.length as usize);
        memory.write(segment, 0, part);
        rest = behind;
    }
}

fn check(memory: &GuestMemory, segments: &[Segment], bytes: u64) {
    let lengths: Vec<u64> = memory.regions().map(|region| region.place().length).collect();
    for segment in segments {
        let end = segment.offset + u64::from(segment.length);
        assert!(segment.length > 0 && end <= lengths[segment.region as usize], "{segment:?}");
    }
    assert_eq!(segments.iter().map(|segment| u64::from(segment.length)).sum::<u64>(), bytes);
}

fuzz_target!(|bytes: &[u8]| {
    let [features, size, step, rest @ ..] = bytes else { return };
    GUEST.with(|guest| run(guest, (*features, *size, *step), rest));
});

fn run(guest: &Guest, (features, size, step): (u8, u8, u8), rest: &[u8]) {
    let size = 1u16 << (2 + size % 5);
    put(&guest.memory, 0, &[0; BYTES as usize]);
    let (now, mut later) = rest.split_at(rest.len() - rest.len() * usize::from(step) / 512);
    put(&guest.memory, 0, now);
    let rings =
        find_rings(&guest.memory, size, (USER, USER + AVAILABLE, USER + USED), None).expect("in memory");
    let mut start = QueueStart {
        queue: 0,
        size,
        memory: Arc::clone(&guest.memory),
        rings,
        next_available: 0,
        features: if features & 1 != 0 { FEATURE_INDIRECT } else { 0 }
            | if features & 2 != 0 { FEATURE_EVENT_INDEX } else { 0 },
        enabled: true,
        kick: None,
        call: None,
        error: None,
        record: None,
    };
    let mut queue = Queue::start(&mut start).expect("nothing was recorded");
    let mut chain = Chain::default();
    let mut open: Vec<u16> = Vec::new();
    // What is answered may change the rings, so this need not end by itself.
    for turn in 0..4 * size {
        match queue.fetch(&mut chain) {
            Ok(true) => {}
            Ok(false) if queue.listen() => continue,
            Ok(false) | Err(_) => break,
        }
        assert!(chain.head < size && !open.contains(&chain.head), "head={} open={open:?}", chain.head);
        open.push(chain.head);
        assert!(
            open.iter().collect::<HashSet<_>>().len() == open.len()
                && usize::from(queue.open()) == open.len()
        );
        answer(guest, &mut queue, &mut chain, features & 4 != 0);
        // The guest goes on writing meanwhile.
        if let Some((place, change)) = later.split_at_checked(2) {
            let change = &change[..change.len().min(usize::from(step) % 24)];
            later = &later[2 + change.len()..];
            put(&guest.memory, u64::from(u16::from_le_bytes([place[0], place[1]])), change);
        }
        if turn % 3 == u16::from(features >> 6) % 3 {
            open.drain(..).for_each(|head| queue.add_used(head, 1));
            queue.publish();
        }
    }
    open.drain(..).for_each(|head| queue.add_used(head, 1));
    queue.publish();
    assert_eq!(queue.open(), 0);
}

fn answer(guest: &Guest, queue: &mut Queue, chain: &mut Chain, writethrough: bool) {
    let memory = Arc::clone(queue.memory());
    check(&memory, &chain.readable, chain.readable_bytes);
    check(&memory, &chain.writable, chain.writable_bytes);
    let Ok((wish, status)) = request::understand(chain, &memory, &guest.export, writethrough) else { return };
    check(&memory, &[status], 1);
    check(&memory, &chain.readable, chain.readable_bytes);
    check(&memory, &chain.writable, chain.writable_bytes);
    match wish {
        Wish::Block { op, range, fua } => {
            assert!(range.end() <= SIZE, "{op:?} {range:?}");
            assert!(!fua || op.modifies(), "{op:?}");
            match op {
                BlockOp::Read => assert_eq!(chain.writable_bytes, range.length()),
                BlockOp::Write => assert_eq!(chain.readable_bytes, range.length()),
                BlockOp::Flush => assert!(range.is_empty()),
                _ => assert!(!range.is_empty() && range.length() <= request::RANGE_BYTES_MAX),
            }
        }
        Wish::Serial => assert!(request::write_serial(&memory, &chain.writable, "serial") <= 20),
        Wish::Nothing | Wish::Refused(_) => {}
    }
    request::answer(&memory, status, BlkStatus::Ok);
}
