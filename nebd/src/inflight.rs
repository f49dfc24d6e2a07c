//! The in-flight table: every request that a guest waits for, until it is answered. Pure.
//!
//! Called by `volume`, and by the workers of a device, each with one of its own. Must not know: sockets, NBD, the link's encoding.
//!
//! `complete_once`: an entry leaves the table when it is completed, and only then is it handed out; a second
//! completion finds nothing. `replay_before_new`: ids grow, requests are sent in the order of their ids, and a lost
//! link makes every sent request unsent again. `bounded`: [`Limits`].

use spline_types::{BlockOp, BlockRequest, ByteRange, Completion, RequestId};
use std::collections::VecDeque;
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
    /// Whom to answer, and where the data is: a write's is needed again for a replay.
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
    Answer(Entry<C>),
    /// It stays in the table and is replayed on the next link.
    Kept,
    /// No such request was sent: the gateway is broken.
    Unknown,
}

/// Bits of a request's id that name its place in the table; the bits above count up.
const PLACE_BITS: u32 = 12;
/// Requests that a table can hold at most.
pub const PLACES_MAX: usize = 1 << PLACE_BITS;

fn place(id: RequestId) -> usize {
    (id.get() & (PLACES_MAX as u64 - 1)) as usize
}

/// The table. `C` is whom to answer. Takes no memory from the allocator once it has been as full as it gets.
#[derive(Debug)]
pub struct Inflight<C> {
    places: Vec<Option<Entry<C>>>,
    free: Vec<u16>,
    /// Ids in the order in which they were given out; those that have ended are left out now and then.
    order: VecDeque<RequestId>,
    /// Ids in state `Waiting`, ascending.
    waiting: VecDeque<RequestId>,
    admitted: u64,
    limits: Limits,
    len: usize,
    bytes: u64,
    sent: usize,
    sent_bytes: u64,
}

fn data_bytes(op: BlockOp, range: ByteRange) -> u64 {
    if op.carries_data() { range.length() } else { 0 }
}

impl<C> Inflight<C> {
    /// An empty table for at most [`PLACES_MAX`] requests.
    pub fn new(limits: Limits) -> Self {
        Self {
            places: Vec::new(),
            free: Vec::new(),
            order: VecDeque::new(),
            waiting: VecDeque::new(),
            admitted: 0,
            limits: Limits { requests: limits.requests.min(PLACES_MAX), ..limits },
            len: 0,
            bytes: 0,
            sent: 0,
            sent_bytes: 0,
        }
    }

    /// Number of unanswered requests.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is unanswered.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether one more request fits.
    pub fn has_room(&self, op: BlockOp, range: ByteRange) -> bool {
        self.limits.admit((self.len, self.bytes), data_bytes(op, range))
    }

    /// Takes in a request; the caller has asked [`has_room`](Self::has_room). It is sent after all that came before.
    pub fn admit(
        &mut self,
        (op, range, fua): (BlockOp, ByteRange, bool),
        context: C,
        now: Instant,
    ) -> RequestId {
        let at = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            (self.places.len() - 1) as u16
        });
        self.admitted += 1;
        let id = RequestId::new(self.admitted << PLACE_BITS | u64::from(at));
        let request = BlockRequest { id, op, range, fua };
        self.places[usize::from(at)] = Some(Entry { request, context, started: now, state: State::Waiting });
        self.len += 1;
        self.bytes += data_bytes(op, range);
        if self.order.len() >= 2 * self.places.len().max(16) {
            let places = &self.places;
            self.order.retain(|id| holds(places, *id));
        }
        self.order.push_back(id);
        self.waiting.push_back(id);
        id
    }

    /// The oldest unsent request; `None` if there is none or the link's `window` is full.
    pub fn peek_to_send(&self, window: Limits) -> Option<&Entry<C>> {
        let entry = self.get(*self.waiting.front()?)?;
        let bytes = data_bytes(entry.request.op, entry.request.range);
        window.admit((self.sent, self.sent_bytes), bytes).then_some(entry)
    }

    /// As [`peek_to_send`](Self::peek_to_send), and now it counts as sent.
    pub fn next_to_send(&mut self, window: Limits) -> Option<&Entry<C>> {
        let id = self.peek_to_send(window)?.request.id;
        self.waiting.pop_front();
        let entry = self.places.get_mut(place(id))?.as_mut()?;
        entry.state = State::Sent;
        self.sent += 1;
        self.sent_bytes += data_bytes(entry.request.op, entry.request.range);
        Some(entry)
    }

    /// The request `id`, if it is unanswered.
    pub fn get(&self, id: RequestId) -> Option<&Entry<C>> {
        self.places.get(place(id))?.as_ref().filter(|entry| entry.request.id == id)
    }

    /// The request `id`, if the gateway may answer it.
    pub fn sent(&self, id: RequestId) -> Option<&Entry<C>> {
        self.get(id).filter(|entry| entry.state == State::Sent)
    }

    /// Takes a completion that came over the link.
    pub fn complete(&mut self, id: RequestId, completion: &Completion) -> Outcome<C> {
        let entry = self.places.get_mut(place(id)).and_then(Option::as_mut);
        let Some(entry) = entry.filter(|entry| entry.request.id == id && entry.state == State::Sent) else {
            return Outcome::Unknown;
        };
        self.sent -= 1;
        self.sent_bytes -= data_bytes(entry.request.op, entry.request.range);
        if *completion == Completion::Withdrawn {
            entry.state = State::Withdrawn;
            return Outcome::Kept;
        }
        match self.remove(id) {
            Some(entry) => Outcome::Answer(entry),
            None => Outcome::Unknown,
        }
    }

    /// The link is gone: everything unanswered will be sent again, oldest first. Answers how many requests had been
    /// sent before.
    pub fn link_lost(&mut self) -> usize {
        let mut replays = 0;
        self.waiting.clear();
        for id in &self.order {
            let entry = self.places[place(*id)].as_mut().filter(|entry| entry.request.id == *id);
            if let Some(entry) = entry {
                replays += usize::from(entry.state != State::Waiting);
                entry.state = State::Waiting;
                self.waiting.push_back(*id);
            }
        }
        (self.sent, self.sent_bytes) = (0, 0);
        replays
    }

    /// Another gateway process has taken the link over: what was withdrawn is sent again before what was not sent yet, oldest
    /// first. Answers how many requests that are.
    pub fn renew(&mut self) -> usize {
        let mut again = VecDeque::new();
        for id in &self.order {
            let entry = self.places[place(*id)].as_mut().filter(|entry| entry.request.id == *id);
            if let Some(entry) = entry.filter(|entry| entry.state == State::Withdrawn) {
                entry.state = State::Waiting;
                again.push_back(*id);
            }
        }
        let replays = again.len();
        // Ids go out in their order: none that waits is older than one that was withdrawn.
        again.append(&mut self.waiting);
        self.waiting = again;
        replays
    }

    /// While the link is down: takes out the oldest request if it has waited since `cutoff` or longer. A request
    /// that was on the link before waits since `down_since`.
    pub fn expire(&mut self, down_since: Instant, cutoff: Instant) -> Option<Entry<C>> {
        let oldest = self.first()?;
        if oldest.state != State::Waiting || oldest.started.max(down_since) > cutoff {
            return None;
        }
        let id = oldest.request.id;
        self.waiting.pop_front();
        self.remove(id)
    }

    /// When the guest asked for the oldest unanswered request.
    pub fn oldest(&self) -> Option<Instant> {
        self.first().map(|entry| entry.started)
    }

    /// Takes out everything, oldest first: the volume is lost.
    pub fn drain(&mut self) -> Vec<Entry<C>> {
        self.link_lost();
        let ids: Vec<RequestId> = self.waiting.drain(..).collect();
        ids.into_iter().filter_map(|id| self.remove(id)).collect()
    }

    /// Looks at every unanswered request, oldest first.
    pub fn contexts_mut(&mut self, mut look: impl FnMut(&mut C)) {
        for id in &self.order {
            let entry = self.places[place(*id)].as_mut().filter(|entry| entry.request.id == *id);
            if let Some(entry) = entry {
                look(&mut entry.context);
            }
        }
    }

    /// Takes a request out whose guest does not wait any more.
    pub fn forget(&mut self, id: RequestId) -> Option<Entry<C>> {
        let entry = self.get(id)?;
        match entry.state {
            State::Sent => {
                self.sent_bytes -= data_bytes(entry.request.op, entry.request.range);
                self.sent -= 1;
            }
            State::Waiting => self.waiting.retain(|waiting| *waiting != id),
            State::Withdrawn => {}
        }
        self.remove(id)
    }

    /// The requests that were not sent, oldest first.
    pub fn unsent(&self) -> impl Iterator<Item = RequestId> {
        self.waiting.iter().copied()
    }

    /// The first of `order` is always unanswered.
    fn first(&self) -> Option<&Entry<C>> {
        self.order.front().and_then(|id| self.get(*id))
    }

    fn remove(&mut self, id: RequestId) -> Option<Entry<C>> {
        let entry = self.places.get_mut(place(id))?.take_if(|entry| entry.request.id == id)?;
        self.free.push(place(id) as u16);
        self.len -= 1;
        self.bytes -= data_bytes(entry.request.op, entry.request.range);
        while self.order.front().is_some_and(|first| !holds(&self.places, *first)) {
            self.order.pop_front();
        }
        Some(entry)
    }
}

fn holds<C>(places: &[Option<Entry<C>>], id: RequestId) -> bool {
    places[place(id)].as_ref().is_some_and(|entry| entry.request.id == id)
}

#[cfg(test)]
mod tests;
