//! The in-flight table: every request that a guest waits for, until it is answered. Pure.
//!
//! Called by `volume`. Must not know: sockets, NBD, the link's encoding.
//!
//! `complete_once`: an entry leaves the table when it is completed, and only then is it handed out; a second
//! completion finds nothing. `replay_before_new`: ids grow, requests are sent in the order of their ids, and a lost
//! link makes every sent request unsent again. `bounded`: [`Limits`].

use spline_types::{BlockOp, BlockRequest, ByteRange, Completion, RequestId};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Instant;

/// How much may be in the table, or on the link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Requests.
    pub requests: usize,
    /// Data of reads and writes, bytes. One request may always be there, however large.
    pub bytes: u64,
}

impl Limits {
    /// Whether a request of `more` bytes fits beside what is there. Requests without data need no bytes.
    fn admit(self, (requests, bytes): (usize, u64), more: u64) -> bool {
        requests == 0 || (requests < self.requests && (more == 0 || bytes + more <= self.bytes))
    }
}

/// One request of a guest.
#[derive(Debug)]
pub struct Entry<C> {
    /// The request as the gateway gets it.
    pub request: BlockRequest,
    /// A write's data, kept for a replay; empty for other requests.
    pub payload: Rc<Vec<u8>>,
    /// Whom to answer.
    pub context: C,
    /// When the guest asked.
    pub started: Instant,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// To be sent; in `waiting`.
    Waiting,
    /// Handed to the link, not answered.
    Sent,
    /// The gateway left it to the next link.
    Withdrawn,
}

/// What there is to say about a completion that came over the link.
#[derive(Debug)]
pub enum Outcome<C> {
    /// The guest gets this answer, now and never again.
    Answer(Box<Entry<C>>),
    /// It stays in the table and is replayed on the next link.
    Kept,
    /// No such request was sent: the gateway is broken.
    Unknown,
}

/// The table. `C` is whom to answer.
#[derive(Debug)]
pub struct Inflight<C> {
    entries: BTreeMap<RequestId, Entry<C>>,
    /// Ids in state `Waiting`, ascending.
    waiting: VecDeque<RequestId>,
    next: u64,
    limits: Limits,
    bytes: u64,
    sent: usize,
    sent_bytes: u64,
}

fn data_bytes(op: BlockOp, range: ByteRange) -> u64 {
    if op.carries_data() { range.length() } else { 0 }
}

impl<C> Inflight<C> {
    /// An empty table.
    pub fn new(limits: Limits) -> Self {
        Self {
            entries: BTreeMap::new(),
            waiting: VecDeque::new(),
            next: 1,
            limits,
            bytes: 0,
            sent: 0,
            sent_bytes: 0,
        }
    }

    /// Number of unanswered requests.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is unanswered.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether one more request fits.
    pub fn has_room(&self, op: BlockOp, range: ByteRange) -> bool {
        self.limits.admit((self.entries.len(), self.bytes), data_bytes(op, range))
    }

    /// Takes in a request; the caller has asked [`has_room`](Self::has_room). It is sent after all that came before.
    pub fn admit(
        &mut self,
        (op, range, fua): (BlockOp, ByteRange, bool),
        payload: Vec<u8>,
        context: C,
        now: Instant,
    ) -> RequestId {
        let id = RequestId::new(self.next);
        self.next += 1;
        let request = BlockRequest { id, op, range, fua };
        let entry =
            Entry { request, payload: Rc::new(payload), context, started: now, state: State::Waiting };
        self.bytes += data_bytes(op, range);
        self.entries.insert(id, entry);
        self.waiting.push_back(id);
        id
    }

    /// The oldest unsent request, now counted as sent; `None` if there is none or the link's `window` is full.
    pub fn next_to_send(&mut self, window: Limits) -> Option<&Entry<C>> {
        let id = *self.waiting.front()?;
        let entry = self.entries.get_mut(&id)?;
        let bytes = data_bytes(entry.request.op, entry.request.range);
        if !window.admit((self.sent, self.sent_bytes), bytes) {
            return None;
        }
        self.waiting.pop_front();
        entry.state = State::Sent;
        self.sent += 1;
        self.sent_bytes += bytes;
        Some(entry)
    }

    /// The request `id`, if the gateway may answer it.
    pub fn sent(&self, id: RequestId) -> Option<&BlockRequest> {
        self.entries.get(&id).filter(|entry| entry.state == State::Sent).map(|entry| &entry.request)
    }

    /// Takes a completion that came over the link.
    pub fn complete(&mut self, id: RequestId, completion: &Completion) -> Outcome<C> {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.state == State::Sent) else {
            return Outcome::Unknown;
        };
        self.sent -= 1;
        self.sent_bytes -= data_bytes(entry.request.op, entry.request.range);
        if *completion == Completion::Withdrawn {
            entry.state = State::Withdrawn;
            return Outcome::Kept;
        }
        match self.remove(id) {
            Some(entry) => Outcome::Answer(Box::new(entry)),
            None => Outcome::Unknown,
        }
    }

    /// The link is gone: everything unanswered will be sent again, oldest first. Answers how many requests had been
    /// sent before.
    pub fn link_lost(&mut self) -> usize {
        let mut replays = 0;
        for entry in self.entries.values_mut() {
            replays += usize::from(entry.state != State::Waiting);
            entry.state = State::Waiting;
        }
        self.waiting = self.entries.keys().copied().collect();
        (self.sent, self.sent_bytes) = (0, 0);
        replays
    }

    /// While the link is down: takes out the oldest request if it has waited since `cutoff` or longer. A request
    /// that was on the link before waits since `down_since`.
    pub fn expire(&mut self, down_since: Instant, cutoff: Instant) -> Option<Entry<C>> {
        let oldest = self.entries.values().next()?;
        if oldest.state != State::Waiting || oldest.started.max(down_since) > cutoff {
            return None;
        }
        let id = oldest.request.id;
        self.waiting.pop_front();
        self.remove(id)
    }

    /// When the guest asked for the oldest unanswered request.
    pub fn oldest(&self) -> Option<Instant> {
        self.entries.values().next().map(|entry| entry.started)
    }

    /// Takes out everything, oldest first: the volume is lost.
    pub fn drain(&mut self) -> impl Iterator<Item = Entry<C>> + use<C> {
        self.waiting.clear();
        (self.bytes, self.sent, self.sent_bytes) = (0, 0, 0);
        std::mem::take(&mut self.entries).into_values()
    }

    fn remove(&mut self, id: RequestId) -> Option<Entry<C>> {
        let entry = self.entries.remove(&id)?;
        self.bytes -= data_bytes(entry.request.op, entry.request.range);
        Some(entry)
    }
}

#[cfg(test)]
mod tests;
