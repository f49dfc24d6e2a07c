//! A worker: one thread that serves a group of a guest's queues, with a link to the gateway of its own.
//!
//! Started by `vhost`, told what to do by `control`. Each turn takes what is ready, fetches chains, sends them, takes answers
//! and shows them to the guest, each in as few calls as possible. Shares no lock with other workers. Must not know: vhost-user
//! messages, sockets of front-ends.
//!
//! `complete_once`: a chain leaves the in-flight table when it is answered, and is used then. `no_late_duplicate`: an abandoned
//! connection's requests are waited for; if the link was lost meanwhile, a probe on the next one is, which the gateway answers
//! only when everything of the old one has ended. `bounded`: the table's places; a chain that finds none stays in its ring.

pub mod polling;
pub mod served;

use crate::export::Export;
use crate::inflight::{Entry, Inflight, Limits};
use crate::link::{Link, LinkDown, Next};
use crate::memory;
use crate::metrics::Metrics;
use crate::poller::Poller;
use crate::vhost::memory::Segment;
use crate::vhost::order::{Bell, Done, Mailbox, Order, QueueStart, Report};
use crate::vhost::queue::{Chain, QueueError};
use crate::vhost::request::{self, Wish, understand};
use crate::vhost::status::{BlkStatus, blk_status};
use crate::vhost::stream::{Asked, Event, GuestRequest, Stream};
use anyhow::{Context, anyhow};
use polling::Polling;
use rustix::event::epoll::EventFlags;
use served::Served;
use spline_link::{Header, Hello, Message};
use spline_types::limits::VOLUME_INFLIGHT_REQUESTS;
use spline_types::{BlockOp, ByteRange, Fault, Unavailable};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const ORDERS: u64 = 0;
const LINK: u64 = 1;
/// Queues are numbered from here up.
const QUEUES: u64 = 16;
/// Chains fetched from a queue before the others get their turn.
const FETCHES_PER_TURN: usize = 64;
/// Rounds of fetching and answering before orders and the link get their turn.
const ROUNDS_PER_TURN: usize = 16;
/// Bytes of the buffer that answers are read into: 16 reads of 4 KiB and more in one call.
const SCRATCH_BYTES: usize = 128 << 10;
/// How often a queue is looked at whose driver has nothing to kick with.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Quiet time after which memory is given back.
const IDLE_AFTER: Duration = Duration::from_secs(1);
/// Lists of segments that are kept to be used again are no longer than this; larger ones are rare.
const SPARE_SEGMENTS_MAX: usize = 64;

/// What a worker is made of.
#[derive(Debug)]
pub struct Setup {
    /// Its number: it serves the queues whose number leaves this rest.
    pub number: usize,
    /// The gateway's socket.
    pub gateway: PathBuf,
    /// What the guest is told; size and traits come with the welcome.
    pub export: Export,
    /// Bytes of the volume as the workers of the export have heard it: the guest may use what the first was told of before the
    /// others are, and a volume never shrinks.
    pub size: Arc<AtomicU64>,
    /// What the disk answers when it is asked for its name, at most 20 bytes.
    pub serial: String,
    /// Counters.
    pub metrics: Metrics,
    /// What control wants.
    pub orders: Arc<Mailbox<Order>>,
    /// What control is told.
    pub reports: Arc<Mailbox<Report>>,
}

/// Everything that the thread owns.
pub struct Worker {
    setup: Setup,
    poller: Poller,
    link: Option<Link>,
    stream: Stream,
    watching_out: bool,
    table: Inflight<Asked>,
    queues: BTreeMap<u16, Served>,
    /// Queues that could not be started, and where they would have gone on.
    not_started: BTreeMap<u16, u16>,
    chain: Chain,
    spare: Vec<Vec<Segment>>,
    /// What came in one turn; empty between them.
    answers: Vec<(Entry<Asked>, Result<(), Fault>)>,
    scratch: Vec<u8>,
    /// A gateway has said what the volume is: before that nobody can tell which requests fit into it.
    known: bool,
    /// A newer session has the volume: every request fails.
    lost: bool,
    /// One had it since this process began: what a guest asked for before must not be written over what that one wrote.
    was_lost: bool,
    /// A connection was abandoned, and what it started has not ended.
    abandoning: bool,
    ended: bool,
    now: Instant,
    polling: Polling,
    /// Since when nothing is open: the guest's next request is waited for.
    answered: Option<Instant>,
    /// When memory is given back; `None` if that is done.
    idle_at: Option<Instant>,
}

impl Worker {
    /// A worker that waits for orders; the first of an export also opens the volume.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new(setup: Setup, open: Option<Hello>) -> anyhow::Result<Self> {
        let poller = Poller::new().context("create an epoll instance")?;
        poller.add(setup.orders.bell(), ORDERS, EventFlags::IN)?;
        let now = Instant::now();
        let limits = Limits { requests: VOLUME_INFLIGHT_REQUESTS, bytes: u64::MAX };
        Ok(Self {
            link: open.map(|hello| Link::new(setup.gateway.clone(), hello, now)),
            setup,
            poller,
            stream: Stream::default(),
            watching_out: false,
            table: Inflight::new(limits),
            queues: BTreeMap::new(),
            not_started: BTreeMap::new(),
            chain: Chain::default(),
            spare: Vec::new(),
            answers: Vec::new(),
            scratch: vec![0; SCRATCH_BYTES],
            known: false,
            lost: false,
            was_lost: false,
            abandoning: false,
            ended: false,
            now,
            polling: Polling::default(),
            answered: None,
            idle_at: None,
        })
    }

    /// Runs until it is told to end, and reports that.
    pub fn run(mut self) {
        let reports = Arc::clone(&self.setup.reports);
        let served = catch_unwind(AssertUnwindSafe(|| {
            let result = self.serve();
            self.part();
            result
        }));
        // Control must hear of it, or it would wait for its orders for ever.
        reports.put(Report::Ended(served.unwrap_or_else(|_| Err(anyhow!("a worker panicked")))));
    }

    fn serve(&mut self) -> anyhow::Result<()> {
        let mut ready = Vec::new();
        let mut more = false;
        while !self.ended {
            let timeout = if more { Some(Duration::ZERO) } else { self.timeout() };
            self.poller.wait(&mut ready, timeout).context("wait for events")?;
            self.now = Instant::now();
            match ready.is_empty() && !more {
                true => self.rest(),
                false => self.idle_at = Some(self.now + IDLE_AFTER),
            }
            for (token, flags) in &ready {
                match *token {
                    ORDERS => self.obey_all(),
                    LINK => self.link_ready()?,
                    queue => self.kicked((queue - QUEUES) as u16, *flags),
                }
            }
            self.deadlines()?;
            more = self.settle()?;
        }
        Ok(())
    }

    /// Looks at the rings for a moment, if the guest's next request is likely to come within it, while it need not notify us.
    /// True if it has.
    fn look(&mut self) -> bool {
        if !self.table.is_empty() {
            return false;
        }
        let answered = *self.answered.get_or_insert_with(Instant::now);
        let mut now = answered;
        while now - answered < self.polling.window() {
            now = Instant::now();
            if self.queues.values().any(|served| served.can_fetch() && served.queue.has_work()) {
                self.now = now;
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    fn timeout(&self) -> Option<Duration> {
        let patience = self.link.as_ref().and_then(Link::patience).and_then(|(down_since, limit)| {
            self.table.oldest().map(|started| started.max(down_since) + limit)
        });
        let look =
            |served: &Served| served.is_open() && (served.has_no_kick() || served.outside_since.is_some());
        let look = self.queues.values().any(look);
        let look = look.then(|| self.now + LOOK_EVERY);
        [self.link.as_ref().and_then(Link::deadline), patience, look, self.idle_at]
            .into_iter()
            .flatten()
            .min()
            .map(|at| at.saturating_duration_since(Instant::now()))
    }

    fn report(&self, done: Done) {
        self.setup.reports.put(Report::Obeyed { worker: self.setup.number, done });
    }

    fn obey_all(&mut self) {
        for order in self.setup.orders.take() {
            self.obey(order);
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Start(start) => return self.start(*start),
            Order::Stop { queue } => {
                return match self.queues.get_mut(&queue) {
                    Some(served) => served.stopping = true,
                    None => {
                        let next_available = self.not_started.remove(&queue).unwrap_or_default();
                        self.report(Done::Stopped { queue, next_available });
                    }
                };
            }
            Order::Bell { queue, bell, fd } => {
                if let Some(served) = self.queues.get_mut(&queue)
                    && let Err(why) = served.set(bell, fd, &self.poller, QUEUES + u64::from(queue))
                {
                    self.break_down(queue, why);
                }
            }
            Order::Enable { queue, enabled } => {
                if let Some(served) = self.queues.get_mut(&queue) {
                    served.enable(enabled);
                }
            }
            Order::Memory { memory, rings } => {
                for (queue, rings) in rings {
                    if let Some(served) = self.queues.get_mut(&queue) {
                        served.queue.remap(&memory, rings);
                    }
                }
            }
            // Reported when nothing is left of it.
            Order::Abandon => return self.abandon(),
            Order::Join(hello) => {
                let gateway = self.setup.gateway.clone();
                self.link.get_or_insert_with(|| Link::new(gateway, *hello, self.now));
            }
            Order::Reopen => {
                if std::mem::take(&mut self.lost)
                    && let Some(link) = &mut self.link
                {
                    link.reopen(self.now);
                }
            }
            Order::End => {
                self.ended = true;
                return;
            }
        }
        self.report(Done::Other);
    }

    fn start(&mut self, start: QueueStart) {
        let (queue, next_available) = (start.queue, start.next_available);
        match Served::new(start, &self.poller, QUEUES + u64::from(queue)) {
            Ok(mut served) => {
                self.setup.metrics.resubmitted.inc_by(served.queue.orphans() as u64);
                if self.was_lost {
                    served.fenced = served.queue.orphans();
                }
                if let Some(old) = self.queues.insert(queue, served) {
                    old.end(&self.poller);
                }
            }
            Err(why) => {
                self.not_started.insert(queue, next_available);
                self.setup.metrics.broken_queues.inc();
                self.setup.reports.put(Report::Broken { queue, why });
            }
        }
        self.report(Done::Started { queue });
    }

    /// The connection is gone. Its memory is not touched any more: what was not sent is forgotten, what was is waited for.
    fn abandon(&mut self) {
        for (_, served) in std::mem::take(&mut self.queues) {
            served.end(&self.poller);
        }
        let nothing_open = self.table.is_empty();
        if self.stream.is_within_a_frame() {
            // Half of a frame can be neither taken back nor finished. It never fails to be tried again.
            let _ = self.link_failed(&LinkDown::Abandoned);
        }
        self.stream.forget_unsent().for_each(|id| drop(self.table.forget(id)));
        let unsent: Vec<_> = self.table.unsent().collect();
        unsent.into_iter().for_each(|id| drop(self.table.forget(id)));
        self.table.contexts_mut(|asked| {
            if let Asked::Guest(guest) = asked {
                guest.abandoned = true;
            }
        });
        self.abandoning = true;
        if !nothing_open {
            self.probe();
        }
    }

    /// Asks for something harmless, whose answer proves that whatever was sent before on another link has ended.
    fn probe(&mut self) {
        if !self.lost {
            self.table.admit((BlockOp::Flush, ByteRange::EMPTY, false), Asked::Probe, self.now);
        }
    }

    fn link_ready(&mut self) -> anyhow::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if link.is_greeting() {
            match link.greet(self.now) {
                Ok(None) => return Ok(()),
                Ok(Some(accepted)) => {
                    self.setup.export.update(&accepted, link.is_read_only());
                    self.setup.size.fetch_max(accepted.geometry.size, Ordering::AcqRel);
                    self.known = true;
                    self.setup.metrics.link_up.set(1);
                    self.setup.metrics.link_connects.inc();
                    self.stream = Stream::new(link.left_over());
                    self.watching_out = false;
                    self.setup.reports.put(Report::Accepted(Box::new(accepted)));
                }
                Err(why) => return self.link_failed(&why),
            }
        }
        let (mut ended, mut resized) = (std::mem::take(&mut self.answers), None);
        let Self { link: Some(link), stream, table, scratch, .. } = self else { return Ok(()) };
        let received = stream.receive(link, table, scratch, self.now, |event| match event {
            Event::Ended(entry, result) => ended.push((entry, result)),
            Event::Resized(size) => resized = Some(size),
        });
        if let Some(size) = resized {
            self.setup.size.fetch_max(size, Ordering::AcqRel);
            self.setup.reports.put(Report::Resized { size });
        }
        for (entry, result) in ended.drain(..) {
            self.answer(entry, result);
        }
        self.answers = ended;
        received.or_else(|why| self.link_failed(&why))
    }

    fn link_failed(&mut self, why: &LinkDown) -> anyhow::Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if link.is_up() {
            self.stream = Stream::default();
            self.setup.metrics.link_up.set(0);
            self.setup.metrics.replays.inc_by(self.table.link_lost() as u64);
        }
        match link.fail(why, self.table.len(), self.now) {
            Next::Retry => self.drop_abandoned(),
            Next::GiveUp(reason) => anyhow::bail!(reason),
            Next::Fenced => {
                (self.lost, self.was_lost) = (true, true);
                self.setup.reports.put(Report::Lost { worker: self.setup.number });
                for entry in self.table.drain() {
                    self.answer(entry, Err(Fault::Fenced));
                }
            }
        }
        Ok(())
    }

    /// What an abandoned connection had sent over a link that is gone must not be sent again: its memory may hold anything
    /// by now. That it has ended is proven by a probe.
    fn drop_abandoned(&mut self) {
        let mut abandoned = Vec::new();
        for id in self.table.unsent() {
            if matches!(self.table.get(id), Some(Entry { context: Asked::Guest(guest), .. }) if guest.abandoned)
            {
                abandoned.push(id);
            }
        }
        if !abandoned.is_empty() {
            abandoned.into_iter().for_each(|id| drop(self.table.forget(id)));
            self.probe();
        }
    }

    fn kicked(&mut self, queue: u16, flags: EventFlags) {
        let Some(served) = self.queues.get_mut(&queue) else { return };
        let result = match flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            true => Err(std::io::ErrorKind::BrokenPipe.into()),
            false => served.kicked(),
        };
        if let Err(error) = result {
            // Watched further it would wake us for ever.
            if served.set(Bell::Kick, None, &self.poller, QUEUES + u64::from(queue)).is_ok() {
                self.break_down(queue, QueueError::Bell(error.to_string()));
            }
        }
    }

    fn deadlines(&mut self) -> anyhow::Result<()> {
        let now = self.now;
        if let Some(link) = &mut self.link
            && let Err(why) = link.tick(now, &self.poller, LINK)
        {
            self.link_failed(&why)?;
        }
        if let Some((down_since, limit)) = self.link.as_ref().and_then(Link::patience)
            && let Some(cutoff) = now.checked_sub(limit)
        {
            while let Some(entry) = self.table.expire(down_since, cutoff) {
                self.answer(entry, Err(Fault::Unavailable(Unavailable::Unreachable)));
            }
        }
        Ok(())
    }

    /// Fetches, sends and answers until there is nothing to do. True if more is to be done at once.
    fn settle(&mut self) -> anyhow::Result<bool> {
        for _ in 0..ROUNDS_PER_TURN {
            let room = self.fetch_all();
            self.flush()?;
            self.queues.values_mut().for_each(Served::publish);
            if !(room && (self.look() || self.listen_all())) {
                self.finish();
                return Ok(false);
            }
        }
        self.finish();
        Ok(true)
    }

    /// Whether a queue has work of which no notification will tell.
    fn listen_all(&mut self) -> bool {
        let open = self.queues.values_mut().filter(|served| served.can_fetch());
        // Each of them is to listen, whatever another has.
        open.filter_map(|served| served.queue.listen().then_some(())).count() > 0
    }

    /// Whether the table has room for more.
    fn fetch_all(&mut self) -> bool {
        if !self.known && !self.lost {
            return false;
        }
        let mut broken = Vec::new();
        let mut chain = std::mem::take(&mut self.chain);
        let mut room = true;
        let mut queues = std::mem::take(&mut self.queues);
        for (number, served) in &mut queues {
            for _ in 0..FETCHES_PER_TURN {
                room = self.table.has_room(BlockOp::Flush, ByteRange::EMPTY);
                if !room || !served.is_open() {
                    break;
                }
                served.queue.ignore();
                match served.queue.fetch(&mut chain).and_then(|any| {
                    if any { self.take(*number, served, &mut chain).map(|()| true) } else { Ok(false) }
                }) {
                    Ok(true) => served.outside_since = None,
                    Ok(false) => break,
                    Err(QueueError::Outside(_)) if served.may_come(self.now) => break,
                    Err(why) => {
                        broken.push((*number, why));
                        break;
                    }
                }
            }
        }
        (self.chain, self.queues) = (chain, queues);
        for (queue, why) in broken {
            self.break_down(queue, why);
        }
        room
    }

    /// Admits a chain that was fetched, or answers it at once.
    fn take(&mut self, number: u16, served: &mut Served, chain: &mut Chain) -> Result<(), QueueError> {
        let memory = Arc::clone(served.queue.memory());
        self.setup.export.geometry.size = self.setup.size.load(Ordering::Acquire);
        let understood = match memory.is_damaged() {
            true => Err(QueueError::Truncated),
            false => understand(chain, &memory, &self.setup.export, served.writethrough),
        };
        let (wish, status) = understood.inspect_err(|_| served.queue.forget(chain.head))?;
        let fenced = self.lost || served.fenced > 0;
        served.fenced = served.fenced.saturating_sub(1);
        let (written, outcome) = match wish {
            Wish::Block { op, range, fua } if !fenced => {
                let mut data = self.spare.pop().unwrap_or_default();
                std::mem::swap(
                    &mut data,
                    if op == BlockOp::Read { &mut chain.writable } else { &mut chain.readable },
                );
                let guest =
                    GuestRequest { queue: number, head: chain.head, memory, data, status, abandoned: false };
                self.table.admit((op, range, fua), Asked::Guest(guest), self.now);
                if let Some(answered) = self.answered.take() {
                    self.polling.learn(self.now.saturating_duration_since(answered));
                }
                return Ok(());
            }
            Wish::Block { .. } => (0, Err(Fault::Fenced)),
            Wish::Serial => {
                memory.log(&chain.writable, &memory);
                (request::write_serial(&memory, &chain.writable, &self.setup.serial), Ok(()))
            }
            Wish::Nothing => (0, Ok(())),
            Wish::Refused(fault) => (0, Err(fault)),
        };
        if let Err(fault) = outcome {
            self.setup.metrics.refused(fault);
        }
        request::answer(&memory, status, outcome.map_or_else(blk_status, |()| BlkStatus::Ok));
        memory.log(&[status], &memory);
        served.queue.add_used(chain.head, written + 1);
        Ok(())
    }

    /// Answers a request that has left the table, unless nobody waits for it any more.
    fn answer(&mut self, entry: Entry<Asked>, mut result: Result<(), Fault>) {
        let Asked::Guest(mut guest) = entry.context else { return };
        let request = &entry.request;
        if request.op == BlockOp::Write && guest.memory.is_damaged() {
            // What was written may be the zeros that took the place of what vanished.
            result = Err(Fault::Internal);
        }
        self.setup.metrics.answered(request.op, request.range.length(), self.now - entry.started, &result);
        if !guest.abandoned
            && let Some(served) = self.queues.get_mut(&guest.queue)
        {
            let read = if request.op == BlockOp::Read && result.is_ok() { request.range.length() } else { 0 };
            request::answer(&guest.memory, guest.status, result.map_or_else(blk_status, |()| BlkStatus::Ok));
            // The log is that of the memory as it is now: a migration may have begun meanwhile.
            let now = served.queue.memory();
            if read > 0 {
                now.log(&guest.data, &guest.memory);
            }
            now.log(&[guest.status], &guest.memory);
            // A read has at most 32 MiB.
            served.queue.add_used(guest.head, read as u32 + 1);
        }
        if guest.data.capacity() <= SPARE_SEGMENTS_MAX && self.spare.len() < VOLUME_INFLIGHT_REQUESTS {
            guest.data.clear();
            self.spare.push(guest.data);
        }
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        if let Err(why) = self.stream.flush(link, &mut self.table) {
            return self.link_failed(&why);
        }
        if self.stream.full != self.watching_out
            && let Some(socket) = link.socket()
        {
            let flags = if self.stream.full { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            self.poller.modify(socket, LINK, flags)?;
            self.watching_out = self.stream.full;
        }
        Ok(())
    }

    /// Reports what has come to its end.
    fn finish(&mut self) {
        self.setup.metrics.inflight.set(self.table.len() as i64);
        let stopped = self.queues.iter().filter(|(_, served)| served.has_stopped());
        let stopped: Vec<u16> = stopped.map(|(queue, _)| *queue).collect();
        for queue in stopped {
            if let Some(served) = self.queues.remove(&queue) {
                self.report(Done::Stopped { queue, next_available: served.queue.next_available() });
                served.end(&self.poller);
            }
        }
        if self.abandoning && self.table.is_empty() {
            self.abandoning = false;
            self.report(Done::Abandoned);
        }
    }

    fn break_down(&mut self, queue: u16, why: QueueError) {
        if let Some(served) = self.queues.get_mut(&queue) {
            served.break_down();
            self.setup.metrics.broken_queues.inc();
            self.setup.reports.put(Report::Broken { queue, why });
        }
    }

    /// Nothing has happened for a while: give memory back.
    fn rest(&mut self) {
        if self.idle_at.is_some_and(|at| at <= self.now) {
            self.idle_at = None;
            if self.table.is_empty() {
                self.scratch = vec![0; SCRATCH_BYTES];
                (self.spare, self.answers) = (Vec::new(), Vec::new());
                memory::trim();
            }
        }
    }

    /// Says goodbye for good: the gateway may close the session. Sent as far as the socket takes it.
    fn part(&mut self) {
        let Some(link) = &mut self.link else { return };
        if let Some(socket) = link.socket()
            && !self.stream.is_within_a_frame()
            && let Err(error) = rustix::io::write(socket, &Header::bare(Message::Detach).encode())
        {
            tracing::debug!(%error, "goodbye to the gateway not sent");
        }
        link.end();
    }
}

#[cfg(test)]
mod tests;
