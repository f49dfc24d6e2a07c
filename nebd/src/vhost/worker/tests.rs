//! A worker between a guest's rings and a gateway's end of the link, step by step.

use super::*;
use crate::metrics::Families;
use crate::vhost::driver::{BUFFERS, Driver};
use crate::vhost::gateway::{Gateway, GatewayLink};
use crate::vhost::inflight::InflightRegion;
use prometheus_client::registry::Registry;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use spline_link::{Identity, Mode, Refusal, VolumeTraits};
use spline_types::{BlockOp, BlockSize, Epoch, Geometry, OnUnavailable, RequestId};
use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

/// Where a test's status bytes lie, one for each head.
const STATUS: u64 = BUFFERS + (3 << 20);
/// Where a test's headers lie.
const HEADERS: u64 = BUFFERS + (2 << 20);

thread_local! {
    /// Whether the worker of this test offers a ring.
    static RING: Cell<bool> = const { Cell::new(false) };
}

/// Each test twice: with a link whose requests travel over its socket, and with one that has a ring.
macro_rules! on_both {
    ($name:ident, $body:block) => {
        mod $name {
            use super::*;

            #[test]
            fn over_the_socket() {
                RING.set(false);
                $body
            }

            #[test]
            fn over_a_ring() {
                RING.set(true);
                $body
            }
        }
    };
}

// Behind the macro, which it uses.
mod operations;

struct Place {
    gateway: Gateway,
    link: GatewayLink,
    driver: Driver,
    kick: OwnedFd,
    call: OwnedFd,
    error: OwnedFd,
    orders: Arc<Mailbox<Order>>,
    reports: Arc<Mailbox<Report>>,
    size: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).expect("eventfd")
}

fn await_ready(fd: BorrowedFd<'_>, what: &str) {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert!(poll(&mut fds, Some(&patience)).expect("polls") > 0, "waited too long for {what}");
}

impl Place {
    /// A worker whose link is up; its queue is not started.
    fn new(on_unavailable: OnUnavailable) -> Self {
        let mut place = Self::unwelcomed();
        place.welcome(on_unavailable);
        place
    }

    fn welcome(&mut self, on_unavailable: OnUnavailable) {
        (self.link, _) = self.gateway.accept(on_unavailable);
        assert!(matches!(self.report(), Report::Accepted(_)));
    }

    /// A worker whose gateway has not answered yet.
    fn unwelcomed() -> Self {
        Self::with(Some(Gateway::hello(RING.get())))
    }

    fn with(hello: Option<Hello>) -> Self {
        let gateway = Gateway::new();
        let (orders, reports) =
            (Arc::new(Mailbox::new().expect("fd")), Arc::new(Mailbox::new().expect("fd")));
        let size = Arc::default();
        let setup = Setup {
            number: 0,
            gateway: gateway.path(),
            export: Export {
                name: "disk0".into(),
                description: String::new(),
                geometry: Geometry { size: 0, block_size: BlockSize::B4096 },
                traits: VolumeTraits::default(),
                read_only: false,
            },
            size: Arc::clone(&size),
            serial: "disk0".into(),
            metrics: Families::new(&mut Registry::default()).of("disk0", "vhost-0"),
            orders: Arc::clone(&orders),
            reports: Arc::clone(&reports),
        };
        let worker = Worker::new(setup, hello).expect("makes");
        let thread = std::thread::spawn(|| worker.run());
        let link = GatewayLink::unconnected();
        let (kick, call, error) = (bell(), bell(), bell());
        let driver = Driver::new(64);
        Self { gateway, link, driver, kick, call, error, orders, reports, size, thread: Some(thread) }
    }

    /// As [`new`](Self::new), with the queue started.
    fn serving() -> Self {
        let mut place = Self::new(OnUnavailable::Wait);
        place.start(None);
        place
    }

    fn start(&mut self, record: Option<&Arc<InflightRegion>>) {
        self.start_with(1 << 9, record);
    }

    /// As [`start`](Self::start), by a driver of these features.
    fn start_with(&mut self, features: u64, record: Option<&Arc<InflightRegion>>) {
        let duplicate = |fd: &OwnedFd| Some(fd.try_clone().expect("duplicates"));
        let mut start = self.driver.start(features);
        start.record = record.and_then(|region| region.queue(0, 64));
        (start.kick, start.call) = (duplicate(&self.kick), duplicate(&self.call));
        start.error = duplicate(&self.error);
        self.orders.put(Order::Start(Box::new(start)));
        assert!(matches!(self.done(), Done::Started { queue: 0 }));
    }

    fn report(&mut self) -> Report {
        let (letters, first) = loop {
            await_ready(self.reports.bell(), "a report");
            let mut letters = self.reports.take();
            // None if it was taken with the one before it, between being put in and being rung for.
            if let Some(first) = letters.pop_front() {
                break (letters, first);
            }
        };
        // Those behind it come again.
        letters.into_iter().for_each(|letter| self.reports.put(letter));
        first
    }

    fn done(&mut self) -> Done {
        match self.report() {
            Report::Obeyed { done, .. } => done,
            other => panic!("not obeyed: {other:?}"),
        }
    }

    fn header(&self, head: u16, kind: u32, sector: u64) -> u64 {
        let at = HEADERS + 16 * u64::from(head);
        self.driver.put(at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        self.driver.put(STATUS + u64::from(head), &[0xff]);
        at
    }

    /// Offers a write of `length` bytes at `sector` from `BUFFERS + from`.
    fn write(&mut self, head: u16, sector: u64, from: u64, length: u32) {
        let header = self.header(head, 1, sector);
        let status = STATUS + u64::from(head);
        self.driver.chain(head, &[(header, 16, false), (BUFFERS + from, length, false), (status, 1, true)]);
        self.kick_off(head);
    }

    /// Offers a read of `length` bytes at `sector` to `BUFFERS + to`.
    fn read(&mut self, head: u16, sector: u64, to: u64, length: u32) {
        let header = self.header(head, 0, sector);
        let status = STATUS + u64::from(head);
        self.driver.chain(head, &[(header, 16, false), (BUFFERS + to, length, true), (status, 1, true)]);
        self.kick_off(head);
    }

    fn kick_off(&mut self, head: u16) {
        self.driver.offer(head);
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).expect("kicks");
    }

    fn status(&self, head: u16) -> u8 {
        self.driver.get(STATUS + u64::from(head), 1)[0]
    }

    /// What is used next; waits for the notification.
    fn used(&mut self) -> Vec<(u32, u32)> {
        loop {
            let used = self.driver.used();
            if !used.is_empty() {
                return used;
            }
            await_ready(self.call.as_fd(), "a notification");
            let _ = rustix::io::read(&self.call, &mut [0; 8]);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.orders.put(Order::End);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.expect("a thread").expect("ends well");
        }
    }
}

on_both!(requests_are_carried_out_and_answered_once, {
    let mut place = Place::serving();
    place.driver.put(BUFFERS, &[7; 4096]);
    place.write(0, 8, 0, 4096);
    let (request, data) = place.link.request();
    assert_eq!((request.op, request.range.offset(), &data[..]), (BlockOp::Write, 4096, &[7; 4096][..]));
    place.link.done(request.id, &[]);
    assert_eq!((place.used(), place.status(0)), (vec![(0, 1)], 0));
    place.read(4, 0, 8192, 512);
    let (request, _) = place.link.request();
    place.link.done(request.id, &[9; 512]);
    assert_eq!((place.used(), place.status(4)), (vec![(4, 513)], 0));
    assert_eq!(place.driver.get(BUFFERS + 8192, 512), [9; 512]);
    // Past the end: the gateway is not asked.
    place.read(8, 1 << 40, 0, 512);
    assert_eq!((place.used(), place.status(8)), (vec![(8, 1)], 1));
    place.link.say(Message::Resized { size: 2 << 30 });
    assert!(matches!(place.report(), Report::Resized { size } if size == 2 << 30));
});

on_both!(a_guest_that_is_early_waits_until_the_volume_is_known, {
    let mut place = Place::unwelcomed();
    place.start(None);
    place.write(0, 8, 0, 512);
    // The second order is obeyed after the turn in which the first, and the request, were seen.
    for _ in 0..2 {
        place.orders.put(Order::Enable { queue: 0, enabled: true });
        assert_eq!(place.done(), Done::Other);
    }
    assert_eq!(place.driver.used(), [], "nobody can tell yet whether it is past the end");
    place.welcome(OnUnavailable::Wait);
    let (request, _) = place.link.request();
    place.link.done(request.id, &[]);
    assert_eq!((place.used(), place.status(0)), (vec![(0, 1)], 0));
});

on_both!(a_guest_may_use_what_another_worker_has_heard_of, {
    let mut place = Place::serving();
    let end = place.size.load(Ordering::Acquire);
    place.write(0, end / 512, 0, 512);
    assert_eq!((place.used(), place.status(0)), (vec![(0, 1)], 1), "past the end");
    // The other has told control, and control the guest; here nothing has come yet.
    place.size.fetch_max(2 * end, Ordering::AcqRel);
    place.write(4, end / 512, 0, 512);
    let (request, _) = place.link.request();
    assert_eq!(request.range.offset(), end);
    place.link.done(request.id, &[]);
    assert_eq!((place.used(), place.status(4)), (vec![(4, 1)], 0));
});

on_both!(replay_before_new, {
    let mut place = Place::serving();
    place.driver.put(BUFFERS, &[1; 512]);
    place.write(0, 0, 0, 512);
    place.read(4, 1, 4096, 512);
    let first: Vec<_> = (0..2).map(|_| place.link.request().0).collect();
    place.link.hang_up();
    place.write(8, 2, 0, 512);
    let (link, mode) = place.gateway.accept(OnUnavailable::Wait);
    place.link = link;
    assert_eq!(mode, Mode::Resume { epoch: Epoch::new(1) });
    assert!(matches!(place.report(), Report::Accepted(_)));
    let again: Vec<_> = (0..3).map(|_| place.link.request()).collect();
    assert_eq!(again[..2].iter().map(|(request, _)| *request).collect::<Vec<_>>(), first);
    assert_eq!((&again[0].1[..], again[2].0.range.offset()), (&[1; 512][..], 1024));
    for (request, _) in &again {
        place.link.done(request.id, if request.op == BlockOp::Read { &[3; 512] } else { &[] });
    }
    let mut used = place.used();
    while used.len() < 3 {
        used.extend(place.used());
    }
    assert_eq!(used, [(0, 1), (4, 513), (8, 1)]);
});

on_both!(a_queue_stops_when_everything_is_answered, {
    let mut place = Place::serving();
    place.write(0, 0, 0, 512);
    let (request, _) = place.link.request();
    place.orders.put(Order::Stop { queue: 0 });
    // Obeyed after the stop was heard of.
    place.orders.put(Order::Enable { queue: 0, enabled: true });
    assert_eq!(place.done(), Done::Other);
    place.write(4, 0, 0, 512);
    place.link.done(request.id, &[]);
    assert_eq!(place.done(), Done::Stopped { queue: 0, next_available: 1 }, "the second was not fetched");
    assert_eq!(place.driver.used(), [(0, 1)], "answered before it stopped");
});

on_both!(what_an_abandoned_connection_sent_is_waited_for, {
    let mut place = Place::serving();
    place.read(0, 0, 0, 512);
    let (request, _) = place.link.request();
    place.orders.put(Order::Abandon);
    let (probe, _) = place.link.request();
    assert_eq!(probe.op, BlockOp::Flush);
    place.link.done(probe.id, &[]);
    assert!(place.reports.take().is_empty(), "the read is still under way");
    place.link.done(request.id, &[9; 512]);
    assert_eq!(place.done(), Done::Abandoned);
    assert_eq!((place.driver.used(), place.status(0)), (vec![], 0xff), "nobody is told");
    // A gateway that has the memory writes to it until the read has ended, and it ended before that was reported.
    let data = if RING.get() { 9 } else { 0 };
    assert_eq!(place.driver.get(BUFFERS, 512), [data; 512]);
});

on_both!(what_an_abandoned_connection_sent_is_not_sent_again, {
    let mut place = Place::serving();
    place.write(0, 0, 0, 512);
    place.link.request();
    place.link.hang_up();
    place.write(4, 0, 0, 512);
    place.orders.put(Order::Abandon);
    let (mut link, _) = place.gateway.accept(OnUnavailable::Wait);
    let (probe, _) = link.request();
    assert_eq!(probe.op, BlockOp::Flush, "its memory may hold anything by now");
    link.done(probe.id, &[]);
    let reports: Vec<_> = std::iter::from_fn(|| match place.report() {
        Report::Obeyed { done: Done::Abandoned, .. } => None,
        other => Some(other),
    })
    .collect();
    assert!(matches!(reports[..], [Report::Accepted(_)]), "{reports:?}");
    place.start(None);
    place.link = link;
});

on_both!(a_broken_queue_is_told_and_can_be_started_anew, {
    let mut place = Place::serving();
    place.driver.describe(0, BUFFERS, 16, 1, 0);
    place.kick_off(0);
    assert!(matches!(place.report(), Report::Broken { queue: 0, why: QueueError::Loop(0) }));
    await_ready(place.error.as_fd(), "the error's descriptor");
    place.orders.put(Order::Stop { queue: 0 });
    assert!(matches!(place.done(), Done::Stopped { next_available: 0, .. }));
    place.driver = Driver::new(64);
    place.start(None);
    place.write(0, 0, 0, 512);
    let (request, _) = place.link.request();
    place.link.done(request.id, &[]);
    assert_eq!(place.used(), [(0, 1)]);
});

on_both!(a_lost_volume_fails_requests_until_it_is_had_again, {
    let mut place = Place::serving();
    place.write(0, 0, 0, 512);
    place.link.request();
    place.link.say(Message::Lost);
    assert!(matches!(place.report(), Report::Lost { worker: 0 }));
    assert_eq!((place.used(), place.status(0)), (vec![(0, 1)], 1));
    place.write(4, 0, 0, 512);
    assert_eq!((place.used(), place.status(4)), (vec![(4, 1)], 1));
    place.orders.put(Order::Reopen);
    assert_eq!(place.done(), Done::Other);
    let (link, mode) = place.gateway.accept(OnUnavailable::Wait);
    assert_eq!(mode, Mode::Open);
    place.link = link;
    place.write(8, 0, 0, 512);
    let (request, _) = place.link.request();
    place.link.done(request.id, &[]);
    assert_eq!((place.used(), place.status(8)), (vec![(8, 1)], 0));
});

on_both!(requests_fail_when_the_policy_says_so, {
    let mut place = Place::new(OnUnavailable::FailAfter(Duration::from_millis(50)));
    place.start(None);
    place.write(0, 0, 0, 512);
    place.link.request();
    place.gateway.close();
    place.link.hang_up();
    assert_eq!((place.used(), place.status(0)), (vec![(0, 1)], 1));
});

on_both!(a_worker_that_comes_after_another_carries_out_what_that_left, {
    let (fd, length) = InflightRegion::create(1, 64).expect("creates");
    let region = || Arc::new(InflightRegion::adopt(fd.as_fd(), (0, length), 1, 64).expect("adopts"));
    let mut place = Place::new(OnUnavailable::Wait);
    place.start(Some(&region()));
    place.driver.put(BUFFERS, &[5; 512]);
    for head in [8, 0, 4] {
        place.write(head, u64::from(head), 0, 512);
    }
    let sent: Vec<_> = (0..3).map(|_| place.link.request().0).collect();
    place.link.done(sent[1].id, &[]);
    assert_eq!(place.used(), [(0, 1)]);
    // The process dies here; the guest's memory and the record stay.
    let mut next = Place::new(OnUnavailable::Wait);
    std::mem::swap(&mut next.driver, &mut place.driver);
    next.start(Some(&region()));
    for sector in [8, 4] {
        let (request, data) = next.link.request();
        assert_eq!((request.range.offset(), &data[..]), (sector * 512, &[5; 512][..]));
        next.link.done(request.id, &[]);
    }
    let mut used = next.used();
    while used.len() < 2 {
        used.extend(next.used());
    }
    assert_eq!(used, [(8, 1), (4, 1)]);
});

on_both!(it_says_goodbye, {
    let mut place = Place::serving();
    let mut link = std::mem::replace(&mut place.link, GatewayLink::unconnected());
    drop(place);
    assert!(link.says_goodbye());
});

on_both!(a_worker_that_joins_a_served_volume_does_not_give_it_up, {
    let mut place = Place::with(None);
    let hello = Hello { identity: Identity::new(0, 1), ..Gateway::hello(RING.get()) };
    place.orders.put(Order::Join(Box::new(hello)));
    assert_eq!(place.done(), Done::Other);
    // The first worker's guest is being served: an error that may pass must not end its disk.
    place.gateway.refuse(Refusal::Internal);
    place.welcome(OnUnavailable::Wait);
});

on_both!(a_guest_that_a_killed_process_did_not_notify_is_notified_at_the_start, {
    let mut place = Place::new(OnUnavailable::Wait);
    place.start(None);
    await_ready(place.call.as_fd(), "a notification");
});

on_both!(what_was_asked_before_another_had_the_volume_is_not_written_over_what_that_one_wrote, {
    let (fd, length) = InflightRegion::create(1, 64).expect("creates");
    let region = Arc::new(InflightRegion::adopt(fd.as_fd(), (0, length), 1, 64).expect("adopts"));
    let mut place = Place::new(OnUnavailable::Wait);
    place.start(Some(&region));
    place.write(0, 0, 0, 512);
    place.link.request();
    place.orders.put(Order::Abandon);
    place.link.request();
    place.link.say(Message::Lost);
    assert!(matches!(place.report(), Report::Lost { worker: 0 }));
    assert_eq!(place.done(), Done::Abandoned);
    place.orders.put(Order::Reopen);
    assert_eq!(place.done(), Done::Other);
    place.welcome(OnUnavailable::Wait);
    place.start(Some(&region));
    assert_eq!((place.used(), place.status(0)), (vec![(0, 1)], 1), "fenced");
    place.write(4, 0, 0, 512);
    let (request, _) = place.link.request();
    place.link.done(request.id, &[]);
    assert_eq!((place.used(), place.status(4)), (vec![(4, 1)], 0));
});

on_both!(a_chain_waits_a_moment_for_memory_that_was_taken_away, {
    let mut place = Place::serving();
    place.write(0, 0, 0, 512);
    let (request, _) = place.link.request();
    place.link.done(request.id, &[]);
    place.used();
    // Outside everything: broken, but not at once.
    place.driver.chain(4, &[(1 << 50, 16, false), (STATUS + 4, 1, true)]);
    place.kick_off(4);
    assert!(matches!(place.report(), Report::Broken { queue: 0, why: QueueError::Outside(_) }));
});

#[test]
fn what_a_gateway_withdrew_is_sent_again_on_the_same_link() {
    RING.set(true);
    let mut place = Place::serving();
    for head in [0, 4, 8] {
        place.write(head, u64::from(head), u64::from(head) * 512, 512);
    }
    let ids: Vec<_> = (0..3).map(|_| place.link.request().0.id).collect();
    place.link.withdraw(ids[2]);
    place.link.done(ids[1], &[]);
    place.link.withdraw(ids[0]);
    assert_eq!(place.used(), [(4, 1)], "the guest hears nothing of the others");
    place.link.say(Message::Renewed { epoch: Epoch::new(9) });
    for (id, head) in [(ids[0], 0), (ids[2], 8)] {
        let (request, _) = place.link.request();
        assert_eq!((request.id, request.range.offset()), (id, 512 * u64::from(head as u16)));
        place.link.done(id, &[]);
    }
    let mut used = place.used();
    while used.len() < 2 {
        used.extend(place.used());
    }
    assert_eq!(used, [(0, 1), (8, 1)]);
    // The next link resumes the session of the process that took over.
    place.link.hang_up();
    let (link, mode) = place.gateway.accept(OnUnavailable::Wait);
    place.link = link;
    assert_eq!(mode, Mode::Resume { epoch: Epoch::new(9) });
    assert!(matches!(place.report(), Report::Accepted(_)));
}

#[test]
fn memory_is_passed_on_once_and_taken_back_when_it_is_gone() {
    RING.set(true);
    let mut place = Place::serving();
    for head in [0, 4] {
        place.write(head, 0, 0, 512);
        let (request, _) = place.link.request();
        place.link.done(request.id, &[]);
        place.used();
    }
    assert_eq!(place.link.regions(), [0]);
    // The guest begins anew with other memory; the front-end keeps nothing of the old.
    place.orders.put(Order::Stop { queue: 0 });
    assert_eq!(place.done(), Done::Stopped { queue: 0, next_available: 2 });
    place.driver = Driver::new(64);
    place.start(None);
    place.write(0, 0, 0, 512);
    let (request, _) = place.link.request();
    assert!(place.link.regions().contains(&1), "the new one is told before the request that names it");
    place.link.done(request.id, &[]);
    // Heard, so that nothing is open when the front-end goes: otherwise its end would have to be proven by a probe.
    place.used();
    // Taken back in a quiet moment at the latest.
    let deadline = Instant::now() + Duration::from_secs(20);
    while place.link.regions() != [1] {
        assert!(Instant::now() < deadline, "the old region is not taken back");
        std::thread::sleep(Duration::from_millis(10));
    }
    place.orders.put(Order::Abandon);
    assert_eq!(place.done(), Done::Abandoned);
    place.driver = Driver::new(64);
    while !place.link.regions().is_empty() {
        assert!(Instant::now() < deadline, "memory of a front-end that has gone is kept");
        std::thread::sleep(Duration::from_millis(10));
    }
}

on_both!(an_answer_that_nobody_asked_for_cuts_the_link, {
    let mut place = Place::serving();
    place.write(0, 0, 0, 512);
    let (request, _) = place.link.request();
    place.link.done(RequestId::new(request.id.get() + 1), &[]);
    place.welcome(OnUnavailable::Wait);
    let (again, _) = place.link.request();
    assert_eq!(again, request, "what was not answered is sent again");
    place.link.done(again.id, &[]);
    assert_eq!(place.used(), [(0, 1)]);
});
