//! Attempts and their fence tags. Called by `volume`. Must never know routes or sockets.
//!
//! `no_late_duplicate`: every attempt takes a new seq and carries as floor the lowest seq that the session still waits
//! for in that copyset; a copyset refuses what lies below the highest floor it has seen. An attempt given up without a
//! definite answer is *abandoned*: it may still land. Two rules make that harmless:
//! 1. The next attempt of the same request starts only when the floor has passed the abandoned seq. So when it is
//!    applied, the abandoned one is dead, also against writes that ran beside it.
//! 2. A request is answered only when the floor has passed all its abandoned seqs, so that whatever the guest sends
//!    afterwards carries a floor that kills them.
//!
//! Both wait at most for the attempts that are older and still running, which have deadlines of their own.

use spline_types::{CopysetId, Epoch, FenceTag, Seq};
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Seqs of one session. Pure.
#[derive(Debug)]
pub(crate) struct Ledger {
    next: u64,
    /// Attempts that are waited for, by copyset; each list ascends.
    live: HashMap<CopysetId, VecDeque<u64>>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self { next: 1, live: HashMap::new() }
    }
}

impl Ledger {
    /// Starts an attempt: its seq and floor.
    pub(crate) fn begin(&mut self, copyset: CopysetId) -> (Seq, Seq) {
        let seq = self.next;
        self.next += 1;
        let live = self.live.entry(copyset).or_default();
        live.push_back(seq);
        (Seq::new(seq), Seq::new(*live.front().unwrap_or(&seq)))
    }

    /// The attempt is not waited for any more.
    pub(crate) fn end(&mut self, copyset: CopysetId, seq: Seq) {
        if let Some(live) = self.live.get_mut(&copyset)
            && let Ok(place) = live.binary_search(&seq.get())
        {
            live.remove(place);
        }
    }

    /// The floor that a new attempt would carry.
    pub(crate) fn floor(&self, copyset: CopysetId) -> Seq {
        let oldest = self.live.get(&copyset).and_then(|live| live.front());
        Seq::new(*oldest.unwrap_or(&self.next))
    }
}

/// The attempts of one session.
#[derive(Debug)]
pub(crate) struct Attempts {
    epoch: Epoch,
    ledger: Mutex<Ledger>,
    /// Wakes who waits for a floor to rise.
    ended: Notify,
}

impl Attempts {
    pub(crate) fn new(epoch: Epoch) -> Self {
        Self { epoch, ledger: Mutex::default(), ended: Notify::new() }
    }

    /// Starts an attempt; it ends when the guard is dropped, also when its request is.
    pub(crate) fn begin(&self, copyset: CopysetId) -> Attempt<'_> {
        let (seq, floor) = self.ledger().begin(copyset);
        Attempt { attempts: self, copyset, fence: FenceTag { epoch: self.epoch, seq, floor } }
    }

    /// Waits until the floor has passed `abandoned`.
    pub(crate) async fn settled(&self, copyset: CopysetId, abandoned: Seq) {
        loop {
            let ended = {
                let ledger = self.ledger();
                if ledger.floor(copyset) > abandoned {
                    return;
                }
                // Made under the lock, so that no end is missed.
                self.ended.notified()
            };
            ended.await;
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // Nothing that can panic half way runs under the lock.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An attempt that is waited for.
#[derive(Debug)]
pub(crate) struct Attempt<'a> {
    attempts: &'a Attempts,
    copyset: CopysetId,
    pub(crate) fence: FenceTag,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.attempts.ledger().end(self.copyset, self.fence.seq);
        self.attempts.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
