//! A worker: one thread that serves a group of a guest's queues, with a link to the gateway of its own.
//!
//! Started by `vhost`, told what to do by `control`. Each turn takes what is ready, fetches chains, sends them, takes answers
//! and shows them to the guest, each in as few calls as possible. Shares no lock with other workers. Must not know: vhost-user
//! messages, sockets of front-ends. Its parts: `orders` carries out what control wants, `requests` fetches and answers over
//! [`served`] queues, `link` sends and receives; [`polling`] says how long it looks before it sleeps.
//!
//! `complete_once`: a chain leaves the in-flight table when it is answered, and is used then. `no_late_duplicate`: an abandoned
//! connection's requests are waited for; if the link was lost meanwhile, a probe on the next one is, which the gateway answers
//! only when everything of the old one has ended. `bounded`: the table's places; a chain that finds none stays in its ring.

mod link;
mod orders;
pub mod polling;
mod requests;
pub mod served;

use crate::export::Export;
use crate::inflight::{Entry, Inflight, Limits};
use crate::link::Link;
use crate::link::beside::Beside;
use crate::memory;
use crate::metrics::Metrics;
use crate::poller::Poller;
use crate::vhost::memory::Segment;
use crate::vhost::order::{Bell, Done, Mailbox, Order, Report};
use crate::vhost::queue::{Chain, QueueError};
use crate::vhost::ringed::RingStream;
use crate::vhost::stream::{Asked, Stream};
use anyhow::{Context, anyhow};
use polling::Polling;
use rustix::event::epoll::EventFlags;
use served::Served;
use spline_link::{Header, Hello, Message};
use spline_types::limits::VOLUME_INFLIGHT_REQUESTS;
use spline_types::{Fault, Unavailable};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

const ORDERS: u64 = 0;
const LINK: u64 = 1;
/// The bell of the link's ring.
const BELL: u64 = 2;
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

/// What requests travel over.
#[derive(Debug)]
enum Carrier {
    /// There is no link.
    None,
    /// Its socket.
    Socket(Stream),
    /// A ring in shared memory.
    Ring(RingStream),
}

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
    carrier: Carrier,
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
    /// Where its thread is.
    beside: Beside,
    /// Since when nothing is open: the guest's next request is waited for.
    answered: Option<Instant>,
    /// When memory is given back; `None` if that is done.
    idle_at: Option<Instant>,
}

impl Carrier {
    fn has_answers(&mut self) -> bool {
        match self {
            Self::Ring(ring) => ring.link().has_answers(),
            Self::None | Self::Socket(_) => false,
        }
    }

    /// Says that the worker is about to wait; false if it must not.
    fn sleep(&mut self) -> bool {
        match self {
            Self::Ring(ring) => ring.link().sleep(),
            Self::None | Self::Socket(_) => true,
        }
    }

    /// Where the gateway's thread stays.
    fn gateway_processor(&mut self) -> Option<u32> {
        match self {
            Self::Ring(ring) => ring.link().ring.gateway_processor(),
            Self::None | Self::Socket(_) => None,
        }
    }

    fn is_within_a_frame(&self) -> bool {
        matches!(self, Self::Socket(stream) if stream.is_within_a_frame())
    }

    /// The socket has no room for more: it is watched until it has.
    fn is_full(&self) -> bool {
        match self {
            Self::None => false,
            Self::Socket(stream) => stream.full,
            Self::Ring(ring) => ring.is_full(),
        }
    }
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
            carrier: Carrier::None,
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
            beside: Beside::default(),
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
                    // Completions are looked for in every turn.
                    BELL => {}
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
        if self.polling.window() > Duration::ZERO {
            self.setup.metrics.polls.inc();
        }
        while now - answered < self.polling.window() {
            now = Instant::now();
            if self.queues.values().any(|served| served.can_fetch() && served.queue.has_work()) {
                self.now = now;
                self.setup.metrics.poll_hits.inc();
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
            self.take_answers()?;
            let room = self.fetch_all();
            self.flush()?;
            self.beside.keep(self.carrier.gateway_processor());
            self.queues.values_mut().for_each(Served::publish);
            let more = (room && (self.look() || self.listen_all())) | self.carrier.has_answers();
            if !more && self.carrier.sleep() {
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

    /// Reports what has come to its end.
    fn finish(&mut self) {
        self.setup.metrics.inflight.set(self.table.len() as i64);
        if let Carrier::Ring(ring) = &mut self.carrier {
            self.setup.metrics.link_wakeups.inc_by(ring.link().new_bells());
        }
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

    /// Nothing has happened for a while: give memory back.
    fn rest(&mut self) {
        if self.idle_at.is_some_and(|at| at <= self.now) {
            self.idle_at = None;
            if self.table.is_empty() {
                self.scratch = vec![0; SCRATCH_BYTES];
                (self.spare, self.answers) = (Vec::new(), Vec::new());
                if let Carrier::Ring(ring) = &mut self.carrier {
                    ring.forget_memories();
                }
                memory::trim();
            }
        }
    }

    /// Says goodbye for good: the gateway may close the session. Sent as far as the socket takes it.
    fn part(&mut self) {
        let Some(link) = &mut self.link else { return };
        if let Some(socket) = link.socket()
            && !self.carrier.is_within_a_frame()
            && let Err(error) = rustix::io::write(socket, &Header::bare(Message::Detach).encode())
        {
            tracing::debug!(%error, "goodbye to the gateway not sent");
        }
        link.end();
    }
}

#[cfg(test)]
mod tests;
