//! One client's connection: socket, state machine of its phase, replies on their way.
//!
//! Called by the event loop. Must not know: the link, other connections. Every byte that comes is judged by
//! `handshake` or `transmission`; this module moves bytes and keeps the limits.
//!
//! `bounded`: at most [`REQUESTS_MAX`] requests of one client are open, its data holds at most
//! [`CLIENT_BYTES`], and past [`UNSENT_MAX`] bytes of replies that it does not read nothing more is read from it. What all
//! clients hold together is bounded by [`crate::budget`].

use crate::budget::{CLIENT_BYTES, SHARE_BYTES};
use crate::nbd::errno::nbd_error;
use crate::nbd::handshake::{Handshake, Step};
use crate::nbd::protocol::REQUEST_BYTES;
use crate::nbd::reply;
use crate::nbd::transmission::{Event, Incoming, Room, Ticket, Transmission};
use crate::receive::{DIRECT_MIN, READS_PER_TURN, Received, read_after, read_direct};
use crate::send_queue::SendQueue;
use crate::volume::{Answer, Asked, Origin, Volume};
use rustix::event::epoll::EventFlags;
use spline_types::{BlockOp, Fault};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Open requests of one client: half of the volume's, so that one client can not shut out the others.
pub const REQUESTS_MAX: usize = 512;
/// Unsent bytes of replies past which a client's requests are not read.
pub const UNSENT_MAX: usize = 4 << 20;
/// Bytes of the shared buffer that are offered to a client which sends large writes: more than a header would only be data that
/// is copied instead of being read to where it stays.
const SCRATCH_OF_LARGE: usize = 4 << 10;

/// Names a connection; never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnectionId(pub u64);

/// Why a connection is cut.
#[derive(Debug, Error)]
pub enum Cut {
    /// The socket failed.
    #[error("socket failed: {0}")]
    Io(#[from] io::Error),
    /// The client broke the protocol.
    #[error("protocol error: {0}")]
    Protocol(String),
}

#[derive(Debug)]
enum Phase {
    Handshake { machine: Handshake, deadline: Instant },
    Transmission(Transmission),
}

/// One client.
#[derive(Debug)]
pub struct Connection {
    id: ConnectionId,
    socket: OwnedFd,
    phase: Phase,
    /// Bytes that came and were not taken: less than one message, or what waits while stalled.
    partial: Vec<u8>,
    out: SendQueue,
    /// Its last write was a large one.
    is_large: bool,
    open: usize,
    open_bytes: u64,
    /// A request that the volume had no room for.
    parked: Option<Incoming>,
    stalled: bool,
    /// Nothing more is taken from the client: it said so, or closed its side.
    ending: bool,
    /// The volume was lost while the client used it: what it knows of the volume may be out of date, so that every
    /// request fails.
    fenced: bool,
    /// When the client last sent or took a byte, or was given something to take.
    active: Instant,
    /// It was said that the client has done neither for long.
    told_stuck: bool,
    /// What epoll was last told to watch.
    watched: EventFlags,
}

impl Connection {
    /// Greets a client on a non-blocking socket; the handshake must be over within `patience`.
    pub fn new(id: ConnectionId, socket: OwnedFd, now: Instant, patience: Duration) -> Self {
        let deadline = now + patience;
        let mut out = SendQueue::default();
        let machine = Handshake::start(&mut out);
        Self {
            id,
            socket,
            phase: Phase::Handshake { machine, deadline },
            partial: Vec::new(),
            out,
            is_large: false,
            open: 0,
            open_bytes: 0,
            parked: None,
            stalled: false,
            ending: false,
            fenced: false,
            active: now,
            told_stuck: false,
            watched: EventFlags::IN,
        }
    }

    /// The socket, to be watched.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// When the handshake must be over; `None` once it is.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Handshake { deadline, .. } => Some(*deadline),
            Phase::Transmission(_) => None,
        }
    }

    /// Bytes that its data takes: open requests, a write on its way in, replies on their way out.
    pub fn held(&self) -> u64 {
        let coming = match &self.phase {
            Phase::Handshake { .. } => 0,
            Phase::Transmission(machine) => machine.coming(),
        };
        self.open_bytes + coming + self.out.held() as u64
    }

    /// Since when the client holds more than its share and does nothing to let go of it: replies that it does not read, or
    /// a write of which no more comes. `None` once [`told_stuck`](Self::told_stuck).
    pub fn stuck_since(&self) -> Option<Instant> {
        let its_turn = !self.out.is_empty()
            || matches!(&self.phase, Phase::Transmission(machine) if machine.coming() > 0);
        (its_turn && !self.told_stuck && self.held() > SHARE_BYTES).then_some(self.active)
    }

    /// Operators were told that the client is stuck; not again before it has done something.
    pub fn told_stuck(&mut self) {
        self.told_stuck = true;
    }

    fn is_active(&mut self, now: Instant) {
        (self.active, self.told_stuck) = (now, false);
    }

    /// Whether requests wait in it for room.
    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Whether the client is gone and everything for it is done.
    pub fn is_finished(&self) -> bool {
        self.ending && self.open == 0 && !self.stalled && self.out.is_empty()
    }

    /// What epoll must watch, if that has changed since the last call.
    pub fn watch(&mut self) -> Option<EventFlags> {
        let mut wanted = EventFlags::empty();
        if !self.stalled && !self.ending {
            wanted |= EventFlags::IN;
        }
        if !self.out.is_empty() {
            wanted |= EventFlags::OUT;
        }
        if wanted == self.watched {
            return None;
        }
        self.watched = wanted;
        Some(wanted)
    }

    /// Reads what has come and acts upon it.
    ///
    /// # Errors
    /// The connection is to be cut.
    pub fn receive(&mut self, volume: &mut Volume, scratch: &mut [u8]) -> Result<(), Cut> {
        for _ in 0..READS_PER_TURN {
            if self.stalled || self.ending {
                return Ok(());
            }
            let offered = if self.is_large { SCRATCH_OF_LARGE.min(scratch.len()) } else { scratch.len() };
            // What is left over comes first: behind it nothing can be read straight to its place.
            let payload = match &self.phase {
                Phase::Transmission(machine) if self.partial.is_empty() => machine.payload(),
                _ => None,
            };
            let socket = self.socket.as_fd();
            let (direct, received) =
                match payload.filter(|(payload, have)| payload.length() - have >= DIRECT_MIN) {
                    Some(payload) => read_direct(socket, payload, &mut scratch[..offered])?,
                    None => {
                        let offered = offered.max(self.partial.len() + REQUEST_BYTES).min(scratch.len());
                        (0, read_after(socket, &mut self.partial, &mut scratch[..offered])?)
                    }
                };
            let drained = match received {
                Received::Nothing => return Ok(()),
                Received::Closed => {
                    self.ending = true;
                    return Ok(());
                }
                Received::Bytes { count, drained } => {
                    self.is_active(volume.now);
                    if let Phase::Transmission(machine) = &mut self.phase {
                        machine.filled(direct);
                    }
                    self.take(volume, &scratch[..count])?;
                    drained
                }
            };
            if drained {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Goes on with what had to wait for room.
    ///
    /// # Errors
    /// The connection is to be cut.
    pub fn resume(&mut self, volume: &mut Volume) -> Result<(), Cut> {
        self.stalled = self.out.bytes() > UNSENT_MAX;
        if self.stalled {
            // It must take what it has first: meanwhile it is nobody's turn because of it.
            volume.budget.leave(self.id);
            volume.budget.unpark(self.id);
            return Ok(());
        }
        if let Some(incoming) = self.parked.take() {
            self.submit(volume, incoming);
        }
        if !self.stalled && !self.partial.is_empty() {
            let left = std::mem::take(&mut self.partial);
            self.take(volume, &left)?;
        }
        Ok(())
    }

    /// Takes nothing more from the client; what is open is still answered.
    pub fn end(&mut self) {
        self.ending = true;
        self.stalled = false;
        self.partial = Vec::new();
        if let Some(incoming) = self.parked.take() {
            self.close(&incoming.ticket);
        }
    }

    /// Ends it without a word. Answers what its requests hold that are in the in-flight table, bytes: they stay there until
    /// they are answered, to nobody.
    pub fn abandon(mut self) -> u64 {
        self.end();
        self.open_bytes
    }

    /// The volume was lost: a client that has entered is served no more (`one_writer`).
    pub fn fence(&mut self) {
        self.fenced = matches!(self.phase, Phase::Transmission(_));
    }

    /// Answers a request that this connection submitted.
    pub fn answer(&mut self, ticket: &Ticket, result: Result<Answer, Fault>, now: Instant) {
        self.close(ticket);
        if self.out.is_empty() {
            self.is_active(now);
        }
        let structured = self.structured();
        match result {
            Ok(Answer::Done) => reply::done(&mut self.out, ticket.cookie),
            Ok(Answer::Data(data)) => reply::data(&mut self.out, structured, ticket, &data),
            Ok(Answer::Extents(extents)) => reply::status(&mut self.out, ticket, &extents),
            Err(fault) => self.fail(ticket, fault),
        }
    }

    /// Sends what the socket takes, unless it is known to be full (`again` says that it no longer is). Answers
    /// whether the client has read so much that requests which waited for it may go on.
    ///
    /// # Errors
    /// The connection is to be cut.
    pub fn flush(&mut self, again: bool, now: Instant) -> Result<bool, Cut> {
        if self.out.is_empty() || (self.watched.contains(EventFlags::OUT) && !again) {
            return Ok(false);
        }
        let before = self.out.bytes();
        let behind = before > UNSENT_MAX;
        self.out.write_to(self.socket.as_fd())?;
        if self.out.bytes() < before {
            self.is_active(now);
        }
        Ok(self.stalled && behind && self.out.bytes() <= UNSENT_MAX)
    }

    /// Sends what was answered before the client broke the protocol, as far as its socket takes it now.
    pub fn part(&mut self) {
        if let Err(error) = self.out.write_to(self.socket.as_fd()) {
            tracing::debug!(client = self.id.0, %error, "last answers not sent");
        }
    }

    /// Whether nobody can be answered any more, given that both directions of the socket are closed.
    pub fn is_abandoned(&self) -> bool {
        self.ending || self.stalled
    }

    /// Gives memory back while the client is quiet.
    pub fn shrink(&mut self) {
        self.out.shrink();
        self.partial.shrink_to_fit();
    }

    fn close(&mut self, ticket: &Ticket) {
        self.open -= 1;
        self.open_bytes -= ticket.holds();
    }

    fn structured(&self) -> bool {
        matches!(&self.phase, Phase::Transmission(machine) if machine.agreed().structured)
    }

    fn fail(&mut self, ticket: &Ticket, fault: Fault) {
        let read_at = (ticket.op == BlockOp::Read).then(|| ticket.range.offset());
        let structured = self.structured();
        let error = (ticket.cookie, nbd_error(ticket.op, fault));
        reply::failed(&mut self.out, structured, error, &fault.to_string(), read_at);
    }

    /// Acts upon `input` and keeps what it can not take yet.
    fn take(&mut self, volume: &mut Volume, input: &[u8]) -> Result<(), Cut> {
        let mut used = 0;
        loop {
            let (taken, more) = match &self.phase {
                Phase::Handshake { .. } => self.haggle(volume, &input[used..])?,
                Phase::Transmission(_) => self.serve(volume, &input[used..])?,
            };
            used += taken;
            if self.out.bytes() > UNSENT_MAX {
                self.stalled = true;
            }
            if self.ending {
                return Ok(());
            }
            if !more || self.stalled {
                self.partial.extend_from_slice(&input[used..]);
                return Ok(());
            }
        }
    }

    fn haggle(&mut self, volume: &Volume, input: &[u8]) -> Result<(usize, bool), Cut> {
        let Phase::Handshake { machine, .. } = &mut self.phase else { return Ok((0, false)) };
        let (taken, step) = machine.advance(input, &volume.export, &mut self.out);
        match step {
            Step::NeedMore => return Ok((taken, false)),
            Step::Enter(agreed) => self.phase = Phase::Transmission(Transmission::new(agreed)),
            Step::Abort => self.ending = true,
            Step::Violation(violation) => return Err(Cut::Protocol(violation.to_string())),
        }
        Ok((taken, true))
    }

    fn serve(&mut self, volume: &mut Volume, input: &[u8]) -> Result<(usize, bool), Cut> {
        let held = self.held();
        // What its own limits leave, and what the budget of all does.
        let (own, common) = (CLIENT_BYTES.saturating_sub(held), volume.budget.room(self.id, held));
        let bytes = own.min(common);
        let room = Room { requests: REQUESTS_MAX - self.open, bytes, area: &volume.area };
        let Phase::Transmission(machine) = &mut self.phase else { return Ok((0, false)) };
        let (taken, event) = machine.advance(input, &volume.export, room);
        match event {
            Event::Full => {
                self.stalled = true;
                match room.requests > 0 && common < own {
                    true => volume.budget.wait(self.id),
                    false => volume.budget.leave(self.id),
                }
                return Ok((taken, true));
            }
            _ => volume.budget.leave(self.id),
        }
        match event {
            Event::Full => {}
            Event::NeedMore => {
                volume.budget.took(held, self.held());
                return Ok((taken, false));
            }
            Event::Request(incoming) => {
                self.open += 1;
                self.open_bytes += incoming.ticket.holds();
                if incoming.ticket.op == BlockOp::Write {
                    self.is_large = incoming.ticket.data_bytes() >= DIRECT_MIN as u64;
                }
                volume.budget.took(held, self.held());
                self.submit(volume, incoming);
            }
            Event::Nothing(ticket) if ticket.op == BlockOp::Read => {
                reply::nothing(&mut self.out, machine.agreed().structured, ticket.cookie);
            }
            Event::Nothing(ticket) => reply::done(&mut self.out, ticket.cookie),
            Event::Refused(refused) => {
                let structured = machine.agreed().structured;
                let error = (refused.cookie, refused.error);
                // No offset: a range that does not exist has none inside it.
                reply::failed(&mut self.out, structured, error, &refused.fault.to_string(), None);
                volume.metrics.refused(refused.fault);
            }
            Event::Disconnect => self.ending = true,
            Event::Violation(violation) => return Err(Cut::Protocol(violation.to_string())),
        }
        Ok((taken, true))
    }

    /// Hands a request to the volume, or parks it until there is room.
    fn submit(&mut self, volume: &mut Volume, incoming: Incoming) {
        let Incoming { ticket, fua, data } = incoming;
        if self.fenced {
            volume.budget.unpark(self.id);
            volume.metrics.refused(Fault::Fenced);
            return self.answer(&ticket, Err(Fault::Fenced), volume.now);
        }
        if !volume.budget.may_enter(self.id) || !volume.inflight.has_room(ticket.op, ticket.range) {
            volume.budget.park(self.id);
            self.parked = Some(Incoming { ticket, fua, data });
            self.stalled = true;
            return;
        }
        volume.budget.unpark(self.id);
        let origin = Origin { connection: self.id, ticket };
        let asked = Asked { origin, data: data.map(Rc::new) };
        volume.inflight.admit((ticket.op, ticket.range, fua), asked, volume.now);
    }
}
