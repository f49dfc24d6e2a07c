//! The memory that the data of all clients may take together: what is open, what is coming in, what they do not read.
//!
//! Called by the event loop and the connections. Pure. Must not know: sockets, requests.
//!
//! `bounded`: every client has [`SHARE_BYTES`] of its own, which nobody else can take, and [`COMMON_BYTES`] are for all
//! together. What fits the rest of a client's share goes on at once, so that a client which takes nothing, such as that of a
//! guest that is paused, holds up nobody's small requests, and need not be cut. What takes common memory gets it in the
//! order in which it was asked for: a large request is not overtaken until it fits, however busy the others are.
//!
//! A request of a client that is gone lasts until the gateway has answered it. It counts as common memory, its part of the
//! client's share too: whoever comes next has a whole share. Should that be more than there is, nobody takes anything before
//! the gateway has answered enough of them, which takes no client. So all together never hold more than the common memory
//! and a share for each client that may be connected.

use crate::nbd::connection::ConnectionId;
use spline_types::limits::{REQUEST_BYTES_MAX, VOLUME_INFLIGHT_BYTES};
use std::collections::VecDeque;

/// Bytes for all clients together beside their shares: as much as the volume may have in flight, so that two busy clients
/// keep the link full.
pub const COMMON_BYTES: u64 = VOLUME_INFLIGHT_BYTES;
/// Bytes that each client has whatever the others hold: a deep queue of small requests, or the largest one that usual
/// clients send (the Linux kernel's 1.25 MiB, qemu-img's 2 MiB).
pub const SHARE_BYTES: u64 = 2 << 20;
/// Most that one client may hold: its share, and the largest request beside it. Half of the common memory is left to others.
pub const CLIENT_BYTES: u64 = REQUEST_BYTES_MAX as u64 + SHARE_BYTES;

const _: () = assert!(2 * (CLIENT_BYTES - SHARE_BYTES) <= COMMON_BYTES);

/// The budget.
#[derive(Debug, Default)]
pub struct Budget {
    /// Common memory that is taken.
    taken: u64,
    /// Part of it that requests of clients hold that are gone.
    orphaned: u64,
    /// Clients with a request that did not fit, the longest waiting first.
    waiting: VecDeque<ConnectionId>,
    /// Clients with a request for which the in-flight table had no place, the longest waiting first.
    parked: VecDeque<ConnectionId>,
    /// Somebody who waits may go on since [`settle`](Self::settle) was last asked.
    moved: bool,
}

/// What of `held` bytes is not within the share.
fn beyond_share(held: u64) -> u64 {
    held.saturating_sub(SHARE_BYTES)
}

impl Budget {
    /// Bytes that a client, which holds `held`, may take on top of them.
    pub fn room(&self, id: ConnectionId, held: u64) -> u64 {
        // Only orphans can make it more than there is, apart from the small change of replies' headers.
        if self.orphaned > 0 && self.taken > COMMON_BYTES {
            return 0;
        }
        let its_turn = self.waiting.front().is_none_or(|first| *first == id);
        let common = if its_turn { COMMON_BYTES.saturating_sub(self.taken) } else { 0 };
        SHARE_BYTES.saturating_sub(held) + common
    }

    /// A client held `before` and has taken what it holds `now`.
    pub fn took(&mut self, before: u64, now: u64) {
        self.taken += beyond_share(now).saturating_sub(beyond_share(before));
    }

    /// A client's request did not fit: nobody takes common memory before it.
    pub fn wait(&mut self, id: ConnectionId) {
        if !self.waiting.contains(&id) {
            self.waiting.push_back(id);
        }
    }

    /// A client waits no more: its request fitted, or it is gone, or it must take what it has first.
    pub fn leave(&mut self, id: ConnectionId) {
        self.moved |= remove(&mut self.waiting, id);
    }

    /// Whether a client's request may enter the in-flight table, if that has a place.
    pub fn may_enter(&self, id: ConnectionId) -> bool {
        self.parked.front().is_none_or(|first| *first == id)
    }

    /// A client's request found no place in the table: no other enters before it.
    pub fn park(&mut self, id: ConnectionId) {
        if !self.parked.contains(&id) {
            self.parked.push_back(id);
        }
    }

    /// A client's request has entered the table, or is gone.
    pub fn unpark(&mut self, id: ConnectionId) {
        self.moved |= remove(&mut self.parked, id);
    }

    /// A client is gone and leaves requests with `bytes` behind, of which it held all.
    pub fn abandon(&mut self, id: ConnectionId, bytes: u64) {
        self.leave(id);
        self.unpark(id);
        self.orphaned += bytes;
        self.taken += bytes;
    }

    /// A request with `bytes` of a client that is gone was answered.
    pub fn buried(&mut self, bytes: u64) {
        self.orphaned = self.orphaned.saturating_sub(bytes);
        self.taken = self.taken.saturating_sub(bytes);
        self.moved = true;
    }

    /// Whether a request waits for others to let go.
    pub fn is_short(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Those that wait, in the order in which they are to be asked again.
    pub fn queue(&self) -> impl Iterator<Item = ConnectionId> {
        self.parked.iter().chain(&self.waiting).copied()
    }

    /// Takes stock of what each client holds now. Answers whether somebody who waits may go on.
    pub fn settle(&mut self, held: impl Iterator<Item = u64>) -> bool {
        let taken = self.orphaned + held.map(beyond_share).sum::<u64>();
        let moved = std::mem::take(&mut self.moved) || taken < self.taken;
        self.taken = taken;
        moved && !(self.waiting.is_empty() && self.parked.is_empty())
    }
}

/// Answers whether somebody else is first now.
fn remove(queue: &mut VecDeque<ConnectionId>, id: ConnectionId) -> bool {
    let was_first = queue.front() == Some(&id);
    if !queue.is_empty() {
        queue.retain(|other| *other != id);
    }
    was_first && !queue.is_empty()
}

#[cfg(test)]
mod tests;
