//! The event loop: one thread that owns all clients, the link and the volume.
//!
//! Started by `lib.rs`. Each turn takes what is ready, then sends what has come of it in as few calls as possible.
//! Must not know: NBD's or the link's bytes.

use crate::config::{Checked, CheckedNbd};
use crate::doors::NbdDoors;
use crate::link::beside::Beside;
use crate::link::carrier::Carrier;
use crate::link::{Link, LinkDown, Next};
use crate::listener::Listener;
use crate::memory;
use crate::nbd::connection::{Connection, ConnectionId, Cut};
use crate::poller::Poller;
use crate::receive::SCRATCH_BYTES;
use crate::send_queue;
use crate::status_file::{Kind, Status, StatusFile};
use crate::vhost::worker::polling::Polling;
use crate::volume::{Answer, Origin, Volume, area_for};
use anyhow::Context;
use rustix::event::epoll::EventFlags;
use spline_types::{Fault, Unavailable};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

const STOP: u64 = 0;
const LINK: u64 = 1;
/// The bell of the link's ring.
const BELL: u64 = 2;
const LISTENERS: u64 = 3;
/// Connections are numbered from here up; below are the other tokens.
const CONNECTIONS: u64 = 16;
/// Rounds of answering and sending before clients' sockets get their turn.
const ROUNDS_PER_TURN: usize = 16;
/// Clients taken from a listener before others get their turn.
const ACCEPTS_PER_TURN: usize = 16;
/// Pause of accepting after it failed: descriptors do not come back at once.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Longest wait for open requests at a clean stop.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(2);
/// Quiet time after which memory is given back.
const IDLE_AFTER: Duration = Duration::from_secs(1);

/// Where clients connect, once the volume is served.
#[derive(Clone, Debug)]
pub struct Serving {
    /// NBD URIs.
    pub uris: Vec<String>,
}

/// Everything that the thread owns.
pub struct EventLoop {
    config: Checked,
    nbd: CheckedNbd,
    poller: Poller,
    stop: OwnedFd,
    listeners: Vec<Listener>,
    accept_paused: Option<Instant>,
    connections: BTreeMap<ConnectionId, Connection>,
    next_connection: u64,
    link: Link,
    carrier: Carrier,
    volume: Volume,
    scratch: Vec<u8>,
    serving: Sender<Serving>,
    status_file: StatusFile,
    /// Clients may come, or could until the end began.
    is_open: bool,
    stopping: Option<Instant>,
    /// When memory is given back; `None` if that is done.
    idle_at: Option<Instant>,
    turn: usize,
    polling: Polling,
    /// Where its thread is.
    beside: Beside,
    /// Since when there is nothing to do before the gateway answers.
    awaiting: Option<Instant>,
}

impl EventLoop {
    /// Puts the parts together; `stop` becomes readable when the loop is to end, `serving` is told when clients may
    /// come.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new(
        (config, nbd): (Checked, CheckedNbd),
        doors: NbdDoors,
        (link, volume): (Link, Volume),
        stop: OwnedFd,
        serving: Sender<Serving>,
    ) -> anyhow::Result<Self> {
        let poller = Poller::new()?;
        poller.add(stop.as_fd(), STOP, EventFlags::IN)?;
        Ok(Self {
            config,
            nbd,
            poller,
            stop,
            listeners: doors.listeners,
            accept_paused: None,
            connections: BTreeMap::new(),
            next_connection: CONNECTIONS,
            link,
            carrier: Carrier::default(),
            volume,
            scratch: vec![0; SCRATCH_BYTES],
            serving,
            status_file: doors.status,
            is_open: false,
            stopping: None,
            idle_at: None,
            turn: 0,
            polling: Polling::default(),
            beside: Beside::default(),
            awaiting: None,
        })
    }

    /// Runs until it is told to stop.
    ///
    /// # Errors
    /// If the volume is refused, clients can not be listened for, or epoll fails.
    pub fn run(mut self) -> anyhow::Result<()> {
        let mut ready = Vec::new();
        let mut more = false;
        while !self.is_done() {
            let timeout = match more {
                true => Some(Duration::ZERO),
                false => self.next_deadline().map(|at| at.saturating_duration_since(Instant::now())),
            };
            self.poller.wait(&mut ready, timeout).context("wait for events")?;
            self.volume.now = Instant::now();
            self.turn = self.turn.wrapping_add(1);
            match ready.is_empty() && !more {
                true => self.rest()?,
                false => self.idle_at = Some(self.volume.now + IDLE_AFTER),
            }
            for (token, flags) in &ready {
                match *token {
                    STOP => self.begin_stop()?,
                    LINK => self.link_ready()?,
                    // Completions are looked for in every turn.
                    BELL => {}
                    listener if listener < CONNECTIONS => self.accept((listener - LISTENERS) as usize),
                    connection => self.client_ready(ConnectionId(connection), *flags),
                }
            }
            self.deadlines()?;
            more = self.settle()?;
        }
        self.carrier.detach(&mut self.link);
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.stopping.is_some_and(|limit| {
            let idle = self.volume.inflight.is_empty() && self.connections.is_empty();
            idle || !self.link.is_up() || self.volume.now >= limit
        })
    }

    fn next_deadline(&self) -> Option<Instant> {
        let patience = self.link.patience().and_then(|(down_since, limit)| {
            self.volume.inflight.oldest().map(|started| started.max(down_since) + limit)
        });
        let handshakes = self.connections.values().filter_map(Connection::deadline).min();
        let stuck = self.first_stuck().map(|(_, since)| since + self.nbd.stuck_limit);
        [self.link.deadline(), patience, handshakes, stuck, self.accept_paused, self.stopping, self.idle_at]
            .into_iter()
            .flatten()
            .min()
    }

    fn begin_stop(&mut self) -> anyhow::Result<()> {
        if self.stopping.is_none() {
            tracing::info!(waiting = self.volume.inflight.len(), "stopping");
            self.stopping = Some(self.volume.now + STOP_LIMIT);
            self.listeners.clear();
            self.connections.values_mut().for_each(Connection::end);
            // Level-triggered: without this every wait would end at once.
            self.poller.modify(self.stop.as_fd(), STOP, EventFlags::empty())?;
        }
        Ok(())
    }

    fn link_ready(&mut self) -> anyhow::Result<()> {
        if self.link.is_greeting() {
            match self.link.greet(self.volume.now) {
                Ok(None) => return Ok(()),
                Ok(Some(accepted)) => {
                    self.volume.accepted(&accepted, self.link.is_read_only());
                    self.carrier = Carrier::new(&mut self.link, &self.poller, BELL)
                        .context("watch the bell of a link")?;
                    if !self.is_open && self.stopping.is_none() {
                        self.open_doors()?;
                    }
                }
                Err(why) => return self.link_failed(&why),
            }
        }
        let Self { link, carrier, volume, connections, scratch, .. } = self;
        let received = carrier.receive(link, volume, scratch, |volume, origin, result| {
            answer(connections, volume, &origin, result);
        });
        received.or_else(|why| self.link_failed(&why))
    }

    /// Takes completions out of the ring, if the link has one.
    fn take_answers(&mut self) -> anyhow::Result<()> {
        if self.carrier.has_answers() {
            self.volume.now = Instant::now();
            if let Some(since) = self.awaiting.take() {
                self.polling.learn(self.volume.now.saturating_duration_since(since));
            }
        }
        let Self { carrier, volume, connections, .. } = self;
        let received = carrier.take_answers(volume, |volume, origin, result| {
            answer(connections, volume, &origin, result);
        });
        received.or_else(|why| self.link_failed(&why))
    }

    /// Looks for a completion for a moment, if one is likely to come within it, while the gateway need not ring. True if one is
    /// there.
    fn look(&mut self) -> bool {
        // Beside the gateway's thread, looking would keep it from answering.
        if !self.carrier.is_asked() || self.beside.is() {
            return false;
        }
        let since = *self.awaiting.get_or_insert_with(Instant::now);
        let mut looks = since.elapsed() < self.polling.window();
        if looks {
            self.volume.metrics.polls.inc();
        }
        while looks {
            if self.carrier.has_answers() {
                self.volume.metrics.poll_hits.inc();
                return true;
            }
            std::hint::spin_loop();
            looks = since.elapsed() < self.polling.window();
        }
        false
    }

    /// The gateway serves the volume for the first time: clients may come.
    fn open_doors(&mut self) -> anyhow::Result<()> {
        for (number, listener) in self.listeners.iter().enumerate() {
            listener.open()?;
            self.poller.add(listener.socket(), LISTENERS + number as u64, EventFlags::IN)?;
        }
        let uris: Vec<String> = self.listeners.iter().map(Listener::nbd_uri).collect();
        let status = Status {
            kind: Kind::Nbd,
            pid: std::process::id(),
            volume: self.config.volume.to_string(),
            export: self.config.name.clone(),
            sockets: uris.clone(),
            queues: None,
            serial: None,
            version: spline_process::VERSION.to_owned(),
        };
        self.status_file.publish(&status).context("write the status file")?;
        self.is_open = true;
        // Nobody listening for it is the starter's choice.
        let _ = self.serving.send(Serving { uris });
        Ok(())
    }

    fn link_failed(&mut self, why: &LinkDown) -> anyhow::Result<()> {
        if self.link.is_up() {
            let clients = self.nbd.max_connections;
            self.volume.link_lost(self.carrier.is_shared(), || area_for(clients));
            self.carrier.close(&self.poller);
            self.awaiting = None;
        }
        match self.link.fail(why, self.volume.inflight.len(), self.volume.now) {
            Next::Retry => {}
            Next::GiveUp(reason) => anyhow::bail!(reason),
            Next::Fenced => {
                self.volume.lost = true;
                self.connections.values_mut().for_each(Connection::fence);
                for entry in self.volume.inflight.drain() {
                    self.volume.count(&entry, &Err(Fault::Fenced));
                    answer(
                        &mut self.connections,
                        &mut self.volume,
                        &entry.context.origin,
                        Err(Fault::Fenced),
                    );
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self, number: usize) {
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(listener) = self.listeners.get(number) else { return };
            match listener.accept() {
                Ok(None) => return,
                Ok(Some(socket)) => self.greet(socket),
                Err(error) => {
                    tracing::error!(%error, "accepting clients pauses, check the limit of open files");
                    self.accept_paused = Some(self.volume.now + ACCEPT_PAUSE);
                    return self.watch_listeners(EventFlags::empty());
                }
            }
        }
    }

    fn watch_listeners(&mut self, flags: EventFlags) {
        for (number, listener) in self.listeners.iter().enumerate() {
            if let Err(error) = self.poller.modify(listener.socket(), LISTENERS + number as u64, flags) {
                tracing::error!(%error, "listener can not be watched, restart this process");
            }
        }
    }

    fn greet(&mut self, socket: OwnedFd) {
        if self.connections.len() >= self.nbd.max_connections {
            tracing::warn!(limit = self.nbd.max_connections, "client turned away, see max_connections");
            return;
        }
        let id = ConnectionId(self.next_connection);
        self.next_connection += 1;
        if let Err(error) = self.poller.add(socket.as_fd(), id.0, EventFlags::IN) {
            tracing::error!(%error, "client can not be watched");
            return;
        }
        send_queue::widen(socket.as_fd());
        let connection = Connection::new(id, socket, self.volume.now, self.nbd.handshake_timeout);
        self.connections.insert(id, connection);
        self.volume.metrics.connects.inc();
        self.volume.metrics.connections.set(self.connections.len() as i64);
        tracing::debug!(client = id.0, "client connected");
    }

    fn client_ready(&mut self, id: ConnectionId, flags: EventFlags) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let mut result = Ok(());
        if flags.contains(EventFlags::OUT) {
            result = connection.flush(true, self.volume.now).map(|_| ());
        }
        if result.is_ok() && flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            result = connection.receive(&mut self.volume, &mut self.scratch);
        }
        let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR) && connection.is_abandoned();
        match result {
            Err(cut) => self.drop_client(id, Some(&cut)),
            Ok(()) if gone => self.drop_client(id, None),
            Ok(()) => {}
        }
    }

    /// What the client still waits for stays in the in-flight table until it is answered, to nobody.
    fn drop_client(&mut self, id: ConnectionId, cut: Option<&Cut>) {
        match cut {
            Some(Cut::Protocol(reason)) => {
                self.volume.metrics.protocol_errors.inc();
                tracing::warn!(client = id.0, %reason, "client cut");
            }
            Some(Cut::Io(error)) => tracing::debug!(client = id.0, %error, "client gone"),
            None => tracing::debug!(client = id.0, "client gone"),
        }
        if let Some(mut connection) = self.connections.remove(&id) {
            if matches!(cut, Some(Cut::Protocol(_))) {
                connection.part();
            }
            self.volume.budget.abandon(id, connection.abandon());
        }
        self.volume.metrics.connections.set(self.connections.len() as i64);
    }

    fn deadlines(&mut self) -> anyhow::Result<()> {
        let now = self.volume.now;
        if let Err(why) = self.link.tick(now, &self.poller, LINK) {
            self.link_failed(&why)?;
        }
        if let Some((down_since, limit)) = self.link.patience()
            && let Some(cutoff) = now.checked_sub(limit)
        {
            let fault = Fault::Unavailable(Unavailable::Unreachable);
            while let Some(entry) = self.volume.inflight.expire(down_since, cutoff) {
                self.volume.count(&entry, &Err(fault));
                answer(&mut self.connections, &mut self.volume, &entry.context.origin, Err(fault));
            }
        }
        if self.accept_paused.is_some_and(|until| until <= now) {
            self.accept_paused = None;
            self.watch_listeners(EventFlags::IN);
        }
        let late = |connection: &Connection| connection.deadline().is_some_and(|deadline| deadline <= now);
        while let Some(id) = self.connections.iter().find(|(_, c)| late(c)).map(|(id, _)| *id) {
            self.drop_client(id, Some(&Cut::Protocol("handshake took too long".to_owned())));
        }
        while let Some((id, since)) = self.first_stuck()
            && since + self.nbd.stuck_limit <= now
        {
            self.tell_stuck(id);
        }
        Ok(())
    }

    /// A guest that is paused must not lose its disk, so its client is not cut: the others go on with their shares.
    fn tell_stuck(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.told_stuck();
        self.volume.metrics.stuck.inc();
        tracing::warn!(
            client = id.0,
            held_bytes = connection.held(),
            waiting = self.volume.budget.queue().count(),
            "client takes nothing while large requests of others wait for the memory that it holds; let its guest go on or \
             end it"
        );
    }

    /// A client that came after the volume was lost wants it: nothing of what it sees is older than the other's writes.
    fn want_back(&mut self) {
        if self.volume.lost && !self.volume.inflight.is_empty() {
            self.volume.lost = false;
            self.link.reopen(self.volume.now);
        }
    }

    /// The client that has been stuck longest of those that nobody was told of, if anybody waits for what it holds.
    fn first_stuck(&self) -> Option<(ConnectionId, Instant)> {
        if !self.volume.budget.is_short() {
            return None;
        }
        let stuck = self.connections.iter().filter_map(|(id, c)| Some((*id, c.stuck_since()?)));
        stuck.min_by_key(|(_, since)| *since)
    }

    /// Takes stock of what clients hold. Answers whether a client that waits may look again.
    fn take_stock(&mut self) -> bool {
        self.volume.budget.settle(self.connections.values().map(Connection::held))
    }

    /// Answers, lets waiting requests go on where there is room now, sends everything, and forgets finished clients, until there
    /// is nothing to do. True if more is to be done at once.
    fn settle(&mut self) -> anyhow::Result<bool> {
        for _ in 0..ROUNDS_PER_TURN {
            self.take_answers()?;
            self.take_stock();
            self.resume_stalled();
            if let Err(why) = self.carrier.flush(&self.link, &mut self.volume, &self.poller, LINK) {
                self.link_failed(&why)?;
            }
            self.beside.keep(self.carrier.gateway_processor());
            self.volume.metrics.link_wakeups.inc_by(self.carrier.new_bells());
            self.want_back();
            let caught_up = self.flush_clients();
            let more = self.take_stock() | self.volume.area.is_relieved() | caught_up;
            if !more && !self.look() && self.carrier.sleep() {
                self.volume.metrics.inflight.set(self.volume.inflight.len() as i64);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Those that wait for what all share come in their order, then the others, a different one first in each turn.
    fn resume_stalled(&mut self) {
        let mut stalled: Vec<ConnectionId> =
            self.connections.iter().filter(|(_, c)| c.is_stalled()).map(|(id, _)| *id).collect();
        if !stalled.is_empty() {
            let first = self.turn % stalled.len();
            stalled.rotate_left(first);
        }
        let queue: Vec<ConnectionId> = self.volume.budget.queue().collect();
        for id in queue.into_iter().chain(stalled) {
            if let Some(connection) = self.connections.get_mut(&id)
                && connection.is_stalled()
                && let Err(cut) = connection.resume(&mut self.volume)
            {
                self.drop_client(id, Some(&cut));
            }
        }
    }

    /// Answers whether a client that was behind has caught up, so that its requests may go on.
    fn flush_clients(&mut self) -> bool {
        let (mut go_on, mut over) = (false, Vec::new());
        for (id, connection) in &mut self.connections {
            let flushed = connection.flush(false, self.volume.now).and_then(|caught_up| {
                go_on |= caught_up;
                if let Some(flags) = connection.watch() {
                    self.poller.modify(connection.socket(), id.0, flags)?;
                }
                Ok(())
            });
            if flushed.is_err() || connection.is_finished() {
                over.push((*id, flushed.err()));
            }
        }
        for (id, cut) in over {
            self.drop_client(id, cut.as_ref());
        }
        go_on
    }

    /// Nothing has happened for a while: give memory back.
    fn rest(&mut self) -> anyhow::Result<()> {
        if self.idle_at.is_some_and(|at| at <= self.volume.now) {
            self.idle_at = None;
            self.connections.values_mut().for_each(Connection::shrink);
            if self.volume.inflight.is_empty() {
                self.scratch = vec![0; SCRATCH_BYTES];
            }
            self.volume.area.rest();
            memory::trim();
            if let Err(why) = self.carrier.rest(&self.link) {
                self.link_failed(&why)?;
            }
        }
        Ok(())
    }
}

/// Answers a request of a client, or of one that is gone.
fn answer(
    connections: &mut BTreeMap<ConnectionId, Connection>,
    volume: &mut Volume,
    origin: &Origin,
    result: Result<Answer, Fault>,
) {
    match connections.get_mut(&origin.connection) {
        Some(connection) => connection.answer(&origin.ticket, result, volume.now),
        None => volume.budget.buried(origin.ticket.holds()),
    }
}
