//! vhost-user messages in any sequence: each byte of header and payload is the input, descriptors are of several kinds. What is
//! decoded is acted upon by a device, whose orders are obeyed as workers do: queues that are started are where they say, a queue
//! has one worker at most, replies fit, and no descriptor is left.
//!
//! A message of an input: the request's number, flags and which descriptors come with it (a byte each), bytes of payload, payload.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use spline_nebd::export::Export;
use spline_nebd::vhost::device::{Device, Shape, Turn};
use spline_nebd::vhost::message::{HEADER_BYTES, Header, PAYLOAD_BYTES_MAX, Request};
use spline_nebd::vhost::order::{Order, QueueStart};
use spline_nebd::vhost::queue::{Chain, Queue};
use spline_types::{BlockSize, Geometry};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

const SHAPE: Shape = Shape { queues: 3, queue_size_max: 256 };
/// Bytes of the memory that a front-end shares.
const MEMORY: u64 = 64 << 10;
/// Inputs between two looks at this process's descriptors.
const LOOK_EVERY: u32 = 512;

thread_local! {
    static INPUTS: Cell<u32> = const { Cell::new(0) };
    static OPEN: Cell<usize> = const { Cell::new(0) };
}

fn export() -> Export {
    Export {
        name: "disk0".into(),
        description: String::new(),
        geometry: Geometry { size: 64 << 20, block_size: BlockSize::B4096 },
        traits: Default::default(),
        read_only: false,
    }
}

/// A descriptor of one of the kinds that a front-end may send.
fn descriptor(kind: u8) -> OwnedFd {
    match kind % 4 {
        0 => rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd"),
        1 | 2 => {
            let fd = rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC).expect("memfd");
            rustix::fs::ftruncate(&fd, if kind % 4 == 1 { MEMORY } else { 4096 }).expect("grows");
            fd
        }
        _ => rustix::pipe::pipe().expect("pipe").0,
    }
}

/// Up to three descriptors; what of a byte is not zero.
fn descriptors(choice: u8) -> Vec<OwnedFd> {
    (0..usize::from(choice & 3)).map(|at| descriptor(choice >> (2 + 2 * at))).collect()
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fuzz_target!(|bytes: &[u8]| {
    play(bytes);
    let inputs = INPUTS.get() + 1;
    INPUTS.set(inputs);
    if inputs == LOOK_EVERY {
        OPEN.set(open_descriptors());
    } else if inputs % LOOK_EVERY == 0 {
        assert!(open_descriptors() <= OPEN.get() + 4, "descriptors are left open");
    }
});

fn play(mut bytes: &[u8]) {
    let export = export();
    let held = bytes.first().is_some_and(|byte| byte & 1 != 0);
    let mut device = Device::new(&export, SHAPE, held);
    let mut workers = Workers { held, ..Workers::default() };
    while let [request, flags, choice, length, rest @ ..] = bytes {
        let (payload, behind) = rest.split_at(rest.len().min(usize::from(*length)));
        bytes = behind;
        let mut head = [0; HEADER_BYTES];
        head[..4].copy_from_slice(&u32::from(*request).to_ne_bytes());
        // Mostly version 1; the input may say otherwise.
        head[4..8].copy_from_slice(&u32::from(*flags ^ 1).to_ne_bytes());
        head[8..].copy_from_slice(&(payload.len() as u32).to_ne_bytes());
        let Ok(header) = Header::parse(&head) else { continue };
        assert!(header.payload <= PAYLOAD_BYTES_MAX);
        // Rings at least exist if memory of 64 KiB is at the place that the input says.
        let Ok(request) = Request::decode(&header, payload, descriptors(*choice)) else {
            drop(device.refuse(&header));
            continue;
        };
        match device.message(&header, request) {
            Ok(turn) => workers.obey(&mut device, turn),
            // The connection is closed.
            Err(_) => break,
        }
    }
    let orders = device.wind_down();
    workers.obey(&mut device, Turn { orders, ..Turn::default() });
    assert!(workers.running.is_empty(), "still served: {:?}", workers.running);
}

/// The workers, all as one.
#[derive(Default)]
struct Workers {
    running: BTreeSet<u16>,
    held: bool,
}

impl Workers {
    fn obey(&mut self, device: &mut Device, turn: Turn) {
        if let Some(reply) = turn.reply {
            let (bytes, _) = reply.encode();
            assert!(bytes.len() <= HEADER_BYTES + PAYLOAD_BYTES_MAX as usize);
        }
        for order in turn.orders {
            match order {
                Order::Start(start) => self.start(*start),
                Order::Stop { queue } => {
                    assert!(self.running.remove(&queue), "stopped, but never started: queue={queue}");
                    assert!(device.drained(queue, 7).is_some(), "queue={queue}");
                }
                Order::Abandon => {
                    self.running.clear();
                    // Nothing starts before all that was abandoned has ended.
                    self.held = true;
                    self.release(device);
                }
                Order::Memory { memory, rings } => {
                    assert!(memory.regions().len() > 0 || rings.is_empty());
                    assert!(rings.iter().all(|(queue, _)| self.running.contains(queue)), "{rings:?}");
                }
                Order::Bell { queue, .. } | Order::Enable { queue, .. } => {
                    assert!(self.running.contains(&queue), "queue={queue}");
                }
                Order::Join(_) | Order::Reopen | Order::End => panic!("no front-end asks for that"),
            }
        }
    }

    fn release(&mut self, device: &mut Device) {
        self.held = false;
        for order in device.release().unwrap_or_default() {
            let Order::Start(start) = order else { panic!("only starts are held") };
            self.start(*start);
        }
    }

    fn start(&mut self, mut start: QueueStart) {
        assert!(!self.held, "started while something was abandoned");
        assert!(start.queue < SHAPE.queues && self.running.insert(start.queue), "queue={}", start.queue);
        assert!(start.size.is_power_of_two() && start.size <= SHAPE.queue_size_max);
        let Ok(mut queue) = Queue::start(&mut start) else { return };
        let mut chain = Chain::default();
        while let Ok(true) = queue.fetch(&mut chain) {
            queue.add_used(chain.head, 0);
            queue.publish();
            if queue.next_available() > start.size {
                break;
            }
        }
    }
}
