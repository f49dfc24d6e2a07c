//! A link whose requests travel in a ring of shared memory, their data in memory that nebd has passed on.
//!
//! Run by [`link`](super). A turn takes what nebd has shown, starts it, collects what has ended and shows that, then waits for a bell, a
//! frame or an end. What the engine's lane takes needs neither copy nor future; everything else is copied and executed as for
//! other links. Can be frozen and given to another process of this gateway, which goes on where it stopped.
//!
//! `complete_once`: a ticket is answered when it leaves the table. `guest_cannot_crash_us`: what nebd wrote is checked by the ring
//! and by [`shared`](crate::shared). `bounded`: a permit for each request; what finds none stays in the ring. Memory is touched only
//! while a link, or who goes on with it, has the request: a link that ends waits for what runs before the next one is served.

mod requests;

use super::bell::Bell;
use super::control::{Control, Said};
use super::hello::Facts;
use super::staying::{Moment, Share};
use super::{
    Breach, Ending, Links, Signal, WindsUp, hear_no_more, next_signal, predecessors_ended, threads, wind_up,
};
use crate::admission::Permit;
use crate::buffer::BufferPool;
use crate::engine::{Ended, Lane};
use crate::metrics::Metrics;
use crate::session::{Membership, Session};
use crate::shared::{Regions, SharedData};
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use requests::{NotDone, Ongoing, Requests};
use spline_link::Message;
use spline_link::ring::{GatewayRing, Piece, Position, RingFds};
use spline_types::{BlockRequest, Fault};
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tracing::{info, warn};

/// Turns in one go; then others of the runtime's thread have theirs.
const TURNS_MAX: usize = 32;
/// How long they may take together: what the page cache has, or takes, is copied meanwhile.
const TURNS_TIME: Duration = Duration::from_millis(1);
/// Requests taken in one turn: what has ended is to be shown before too long.
const TAKES_PER_TURN: usize = 128;
/// As above, for a lane: the disk is to have the first of a burst while the others are taken. One system call each time.
const LANE_TAKES_PER_TURN: usize = 8;
/// No more is taken in a turn once so many bytes are: a lane may copy them at once.
const BYTES_PER_TURN: u64 = 1 << 20;

/// The order to give a link away.
#[derive(Debug)]
pub(crate) struct Freeze {
    /// How long requests may run on that another process can carry out instead; those of an engine without sessions end first,
    /// however long that takes.
    pub(crate) drain_limit: Duration,
    /// Gets the link.
    pub(crate) reply: oneshot::Sender<Frozen>,
}

/// A link that nobody serves, with all that it takes to go on with it.
#[derive(Debug)]
pub(crate) struct Frozen {
    /// Its connection to nebd.
    pub(crate) socket: OwnedFd,
    /// What was read from it and not looked at: less than a frame, and descriptors.
    pub(crate) partial: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) ring: RingFds,
    pub(crate) position: Position,
    /// Number, where it starts in its file and how long it is, bytes; the file.
    pub(crate) regions: Vec<(u32, u64, u64, OwnedFd)>,
    pub(crate) facts: Facts,
    /// When nothing more was taken.
    pub(crate) stopped: Instant,
    /// Requests that were withdrawn.
    pub(crate) withdrawn: usize,
}

/// What is answered to a request that was not the lane's: bytes of extents, or why not.
type Answer = (u32, Result<u32, NotDone>);

pub(super) struct RingLink {
    control: Control,
    /// Its connection; nobody's before it is served.
    socket: Weak<OwnedFd>,
    ring: GatewayRing,
    bell: Bell,
    regions: Arc<Regions>,
    lane: Option<Box<dyn Lane>>,
    running: FuturesUnordered<BoxFuture<'static, Answer>>,
    requests: Requests,
    /// A request that waits for its permit.
    waiting: Option<(BlockRequest, SharedData, BoxFuture<'static, Permit>)>,
    /// What nebd is told of the thread.
    share: Share,
    /// Used again in each turn.
    pieces: Vec<Piece>,
    ended: Vec<Ended>,
    session: Arc<Session>,
    metrics: Arc<Metrics>,
    buffers: BufferPool,
    facts: Facts,
    /// How it ends, heard while requests were taken.
    over: Option<Ending>,
    /// Nothing that was answered is of interest to anybody.
    deaf: bool,
}

impl RingLink {
    /// The link of a ring and its bell.
    ///
    /// # Errors
    /// If the bell can not be waited for.
    pub(super) fn new(
        control: Control,
        (mut ring, bell): (GatewayRing, OwnedFd),
        facts: Facts,
        session: &Arc<Session>,
        links: &Links,
    ) -> io::Result<Self> {
        // Another process may have stayed elsewhere.
        ring.tell_processor(None);
        Ok(Self {
            control,
            socket: Weak::new(),
            ring,
            bell: Bell::new(bell)?,
            regions: Arc::default(),
            lane: session.engine.lane(),
            running: FuturesUnordered::new(),
            requests: Requests::default(),
            waiting: None,
            share: Share::new(links.metrics.links_staying.clone()),
            pieces: Vec::new(),
            ended: Vec::new(),
            session: Arc::clone(session),
            metrics: Arc::clone(&links.metrics),
            buffers: links.buffers.clone(),
            facts,
            over: None,
            deaf: false,
        })
    }

    /// Goes on where another process stopped: maps its regions and tells nebd to send again what was withdrawn.
    ///
    /// # Errors
    /// If a region can not be mapped.
    pub(super) fn going_on(mut self, regions: Vec<(u32, u64, u64, OwnedFd)>) -> io::Result<Self> {
        for (number, offset, length, file) in regions {
            let memory =
                spline_link::memory::SharedMemory::map(file, offset, length).map_err(io::Error::other)?;
            let with = self.regions.with(number, memory).ok_or(io::ErrorKind::InvalidData)?;
            self.regions = Arc::new(with);
        }
        self.control.push(Message::Renewed { epoch: self.session.engine.traits().epoch });
        // It may have grown while nobody watched.
        self.control.push(Message::Resized { size: self.session.engine.geometry().size });
        Ok(self)
    }

    /// Serves to the link's end. True if nebd has ended for good.
    pub(super) async fn run(
        mut self,
        mut membership: Membership,
        socket: Arc<OwnedFd>,
        drain_limit: Duration,
    ) -> bool {
        let volume = self.session.name.clone();
        self.socket = Arc::downgrade(&socket);
        let ending = match predecessors_ended(&mut membership).await {
            Ok(()) => self.serve_until_ending(&mut membership).await,
            Err(ending) => ending,
        };
        hear_no_more(&mut membership);
        // What ends late is nothing to stay for.
        let _ = self.share.heed(Moment::Taken, 0, Instant::now());
        let detached = matches!(ending, Ending::Detached);
        if let Ending::Frozen(freeze) = ending {
            self.freeze(freeze).await;
            info!(%volume, "link is given away");
        } else {
            self.deaf = matches!(ending, Ending::Gone);
            wind_up(&mut self, &ending, &membership.session, drain_limit).await;
            for given_up in self.requests.drain() {
                self.metrics.dropped(given_up.request.op, super::data_of(&given_up.request).into());
            }
            info!(%volume, ?ending, "link is closed");
            // Requests that are given up are dropped before others are told that this link has ended.
            drop(self);
        }
        drop((membership, socket));
        detached
    }

    async fn serve_until_ending(&mut self, membership: &mut Membership) -> Ending {
        loop {
            tokio::select! {
                biased;
                ending = poll_fn(|cx| self.poll_serve(cx)) => return ending,
                signal = next_signal(membership) => match signal {
                    Signal::End(ending) => return ending,
                    Signal::Resized(size) => self.control.push(Message::Resized { size }),
                }
            }
        }
    }

    /// Takes, executes and answers until the link ends.
    fn poll_serve(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        self.ring.wake();
        match self.turns(cx) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(ending)) => Poll::Ready(ending),
            Err(error) => {
                warn!(volume = %self.session.name, %error, "link is cut");
                Poll::Ready(Ending::Gone)
            }
        }
    }

    fn turns(&mut self, cx: &mut Context<'_>) -> Result<Poll<Ending>, Breach> {
        if let Some(ending) = self.hear(cx)? {
            return Ok(Poll::Ready(ending));
        }
        let since = Instant::now();
        for _ in 0..TURNS_MAX {
            let taken = self.take(cx)?;
            if taken {
                self.tell_processor(Moment::Taken, since);
            }
            let ended = self.collect(cx)?;
            let moved = ended || taken;
            if let Some(ending) = self.over.take() {
                return Ok(Poll::Ready(ending));
            }
            self.publish();
            if let Poll::Ready(Err(error)) = self.control.poll_flush(cx) {
                return Err(error.into());
            }
            if ended {
                self.tell_processor(Moment::Ended, since);
            }
            if moved || (self.waiting.is_none() && !self.ring.sleep()?) {
                if since.elapsed() > TURNS_TIME {
                    break;
                }
                continue;
            }
            match self.bell.poll(cx)? {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(()) => self.ring.wake(),
            }
        }
        threads::let_others(cx);
        Ok(Poll::Pending)
    }

    /// Shows nebd what was answered.
    fn publish(&mut self) {
        if self.ring.publish() {
            self.metrics.link_wakeups.inc();
        }
    }

    /// Tells nebd where the thread stays, as that follows from what is under way.
    fn tell_processor(&mut self, moment: Moment, now: Instant) {
        if let Some(processor) = self.share.heed(moment, self.requests.weight(), now) {
            self.ring.tell_processor(processor);
        }
    }

    /// Acts upon frames.
    fn hear(&mut self, cx: &mut Context<'_>) -> Result<Option<Ending>, Breach> {
        while let Poll::Ready(said) = self.control.poll_next(cx) {
            let regions = match said? {
                Said::Region(number, memory) => {
                    self.regions.with(number, memory).ok_or(Breach::Region(number))
                }
                Said::RegionGone(number) => self.regions.without(number).ok_or(Breach::Region(number)),
                Said::Detach => return Ok(Some(Ending::Detached)),
                Said::Closed => return Ok(Some(Ending::Gone)),
            };
            self.regions = Arc::new(regions?);
        }
        Ok(None)
    }

    /// Takes requests that find permits, and starts them; true if there was any.
    fn take(&mut self, cx: &mut Context<'_>) -> Result<bool, Breach> {
        let now = Instant::now();
        if let Some((request, data, mut permit)) = self.waiting.take() {
            match permit.as_mut().poll(cx) {
                Poll::Ready(permit) => self.start(request, data, permit, now),
                Poll::Pending => {
                    self.waiting = Some((request, data, permit));
                    return Ok(false);
                }
            }
        }
        let most = if self.lane.is_some() { LANE_TAKES_PER_TURN } else { TAKES_PER_TURN };
        let mut bytes_taken = 0;
        for taken in 0..most {
            if bytes_taken >= BYTES_PER_TURN {
                break;
            }
            let Some(request) = self.ring.pop(&mut self.pieces)? else { return Ok(taken > 0) };
            if self.pieces.iter().any(|piece| !self.regions.has(piece.region)) {
                // A region is told before the first request that names it, but the runtime may hear of that later.
                self.control.read_now()?;
                self.over = self.hear(cx)?;
            }
            let data = SharedData::new(&self.regions, &self.pieces)?;
            let bytes = super::data_of(&request);
            bytes_taken += u64::from(bytes);
            match self.session.admission.try_acquire(bytes) {
                Some(permit) => self.start(request, data, permit, now),
                None => {
                    self.waiting = Some((request, data, self.session.admission.acquire(bytes)));
                    // Registers the waker, or goes on at once.
                    return self.take(cx).map(|_| true);
                }
            }
        }
        Ok(true)
    }

    fn start(&mut self, request: BlockRequest, data: SharedData, permit: Permit, since: Instant) {
        self.metrics.started(request.op, super::data_of(&request).into());
        let refused = self.session.check(&request, self.facts.read_only).err();
        let ticket = self.requests.insert(Ongoing { request, permit, since });
        if let Some(fault) = refused {
            self.ended.push((ticket, Err(fault)));
            return;
        }
        let data = match &mut self.lane {
            Some(lane) => match lane.begin(ticket, &request, data) {
                Ok(()) => return,
                Err(data) => data,
            },
            None => data,
        };
        let (session, buffers) = (Arc::clone(&self.session), self.buffers.clone());
        let socket = Weak::clone(&self.socket);
        self.running.push(Box::pin(async move {
            (ticket, requests::execute(&session, &buffers, &socket, request, data).await)
        }));
    }

    /// Answers what has ended; true if there was any.
    fn collect(&mut self, cx: &mut Context<'_>) -> Result<bool, Breach> {
        use futures_util::stream::StreamExt;
        let mut any = false;
        if let Some(lane) = &mut self.lane {
            // What it has is in `ended`; it is polled again before the link waits.
            let _ = lane.poll(cx, &mut self.ended);
        }
        if !self.ended.is_empty() {
            any = true;
            let mut ended = std::mem::take(&mut self.ended);
            let now = Instant::now();
            // All of them leave the table, whether nebd can be told or not: a link that winds up waits for those in it.
            let mut told = Ok(());
            for (ticket, result) in ended.drain(..) {
                let answered = self.answer(ticket, result.map(|()| 0).map_err(NotDone::Fault), now);
                self.deaf |= answered.is_err();
                told = told.and(answered);
            }
            self.ended = ended;
            told?;
        }
        while !self.running.is_empty()
            && let Poll::Ready(Some((ticket, result))) = self.running.poll_next_unpin(cx)
        {
            any = true;
            self.answer(ticket, result, Instant::now())?;
        }
        Ok(any)
    }

    fn answer(&mut self, ticket: u32, result: Result<u32, NotDone>, now: Instant) -> Result<(), Breach> {
        let Some(ongoing) = self.requests.remove(ticket) else {
            tracing::error!(ticket, "engine ended a request that it was not given");
            return Ok(());
        };
        let result = match result {
            // Whoever takes over while this gateway leaves has fenced it: the request is withdrawn, nebd sends it again.
            Err(NotDone::Fault(Fault::Fenced)) if self.session.withdraws() => None,
            Err(NotDone::Left) => None,
            Err(NotDone::Fault(fault)) => Some(Err(fault)),
            Ok(payload) => Some(Ok(payload)),
        };
        let request = ongoing.request;
        let (bytes, took) = (super::data_of(&request).into(), now.saturating_duration_since(ongoing.since));
        match result {
            None => self.metrics.dropped(request.op, bytes),
            Some(result) => self.metrics.ended(request.op, bytes, result.err(), took),
        }
        if self.deaf {
            return Ok(());
        }
        let answer = match result {
            None => requests::withdrawn(request.id),
            Some(result) => requests::answer(request.id, result),
        };
        Ok(self.ring.push(&answer)?)
    }

    /// Ready when nothing runs and everything is written.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let ended = self.poll_ended(cx).is_ready();
        if ended && (self.deaf || self.control.is_flushed()) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Lets what runs end, withdraws the rest, gives the link away.
    async fn freeze(mut self, freeze: Freeze) {
        // Who goes on with it may not know that nebd was told a processor.
        self.ring.tell_processor(None);
        let stopped = Instant::now();
        let fenced = self.session.engine.traits().epoch.get() != 0;
        let drained = poll_fn(|cx| self.poll_drain(cx));
        match fenced {
            // What still runs can not land once the next session has begun.
            true => drop(tokio::time::timeout(freeze.drain_limit, drained).await),
            false => drained.await,
        }
        // Dropped futures touch no memory any more.
        self.running.clear();
        let mut withdrawn = 0;
        for ongoing in self.requests.drain() {
            withdrawn += 1;
            self.metrics.dropped(ongoing.request.op, super::data_of(&ongoing.request).into());
            if self.ring.push(&requests::withdrawn(ongoing.request.id)).is_err() {
                self.deaf = true;
            }
        }
        if let Some((request, _, _)) = self.waiting.take() {
            withdrawn += 1;
            self.deaf |= self.ring.push(&requests::withdrawn(request.id)).is_err();
        }
        self.publish();
        if self.deaf {
            // What nebd wrote makes no sense: its link is cut.
            return;
        }
        let volume = self.session.name.clone();
        match self.into_frozen(stopped, withdrawn) {
            // Whoever wanted it may have gone: then nebd sees its link end.
            Ok(frozen) => drop(freeze.reply.send(frozen)),
            Err(error) => warn!(%volume, %error, "link can not be given away, nebd will connect again"),
        }
    }

    fn into_frozen(self, stopped: Instant, withdrawn: usize) -> io::Result<Frozen> {
        let ring = self.ring.fds(self.bell.fd())?;
        let regions = self.regions.iter().map(|(number, memory)| {
            let file = memory.fd().try_clone_to_owned()?;
            Ok((number, memory.offset(), memory.length() as u64, file))
        });
        let regions = regions.collect::<io::Result<Vec<_>>>()?;
        let position = self.ring.position();
        let (socket, partial, fds) = self.control.into_parts()?;
        Ok(Frozen { socket, partial, fds, ring, position, regions, facts: self.facts, stopped, withdrawn })
    }
}

impl WindsUp for RingLink {
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match self.collect(cx) {
                Ok(true) => {}
                Ok(false) => break,
                // Nobody is to hear more; what runs is waited for all the same.
                Err(_) => self.deaf = true,
            }
        }
        self.publish();
        // A socket that fails has nothing left to flush.
        let _ = self.control.poll_flush(cx);
        if self.requests.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.control.poll_flush(cx)
    }

    fn push(&mut self, message: Message) {
        self.control.push(message);
    }
}
