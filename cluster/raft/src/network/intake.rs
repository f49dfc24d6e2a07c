//! What is taken from peers and not answered yet: bounded, per group by number, for the host by bytes of entries.
//!
//! Asked by `receive` before it takes a request. A log that can not keep up, or has no room on the disk, keeps entries in
//! memory until they are synced, and refuses what is beyond its limit, for good as far as the replica is concerned; so
//! the leaders must be refused before. They come back after a pause (`stream`). `bounded`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::codec::message::Request;
use crate::member::Member;
use crate::places::ENTRY_COST;
use crate::types::{Entry, command_bytes};

/// Most requests of one group that wait for an answer: four times a stream's window, because the streams of connections
/// that broke leave theirs behind.
const REQUESTS_MAX: u32 = 256;

/// Bytes of entries of all groups that were taken and are not synced yet.
pub(crate) struct Intake {
    bytes: AtomicU64,
    limit: u64,
}

impl Intake {
    /// Takes at most `limit` bytes at once, or one larger request alone.
    pub(crate) fn new(limit: u64) -> Arc<Intake> {
        Arc::new(Intake { bytes: AtomicU64::new(0), limit })
    }

    /// Counts `request` in until its reply is queued; `None` if there is no room now.
    pub(crate) fn take(self: &Arc<Self>, member: &Arc<Member>, request: &Request) -> Option<Taken> {
        let bytes = match request {
            Request::Append(append) => append.entries.iter().map(cost).sum(),
            _ => 0,
        };
        // Entered first, given back by the drop if it was too much: two that race must not both find room.
        let waiting = member.unanswered.fetch_add(1, Ordering::Relaxed);
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let taken = Taken { intake: self.clone(), member: member.clone(), bytes };
        let has_room = bytes == 0 || before == 0 || before + bytes <= self.limit;
        (waiting < REQUESTS_MAX && has_room).then_some(taken)
    }
}

fn cost(entry: &Entry) -> u64 {
    command_bytes(entry) as u64 + ENTRY_COST
}

/// A request that was taken. Held while it waits for its answer, and the answer for its turn on the connection.
pub(crate) struct Taken {
    intake: Arc<Intake>,
    member: Arc<Member>,
    bytes: u64,
}

impl Taken {
    /// The log has the entries, or they are refused: only the answer is left.
    pub(crate) fn entries_are_kept(&mut self) {
        self.intake.bytes.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.member.unanswered.fetch_sub(1, Ordering::Relaxed);
        self.entries_are_kept();
    }
}
