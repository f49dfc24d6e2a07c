//! Leases of sessions: soft state, in memory, of the MDS that leads. Renewals do not go through the log.
//!
//! Called by [`crate::session`] and [`crate::volume`]. Time comes as an argument. Which session is the newest is the
//! replicated state's business (`one_writer` rests on the epoch, not on the lease): a lease only decides whether
//! another gateway may open without force.
//! Must never know: gateways, the log, the network.

use spline_types::{Epoch, VolumeId};
use std::collections::HashMap;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug)]
struct Lease {
    epoch: Epoch,
    expires: Instant,
}

/// The leases of all sessions.
#[derive(Debug)]
pub struct Leases {
    length: Duration,
    /// Sessions that nobody renewed since this process started are alive until then: their gateways had no chance.
    grace_until: Instant,
    held: HashMap<VolumeId, Lease>,
}

impl Leases {
    /// No leases known yet: every session is granted one full lease of grace from `now` on.
    pub fn new(length: Duration, now: Instant) -> Self {
        Self { length, grace_until: now + length, held: HashMap::new() }
    }

    /// Length of a full lease.
    pub const fn length(&self) -> Duration {
        self.length
    }

    /// Gives a session a full lease from `now` on: it was opened or renewed. An older session of the volume loses
    /// its own; a newer one keeps it.
    pub fn grant(&mut self, volume: VolumeId, epoch: Epoch, now: Instant) {
        let expires = now + self.length;
        let lease = self.held.entry(volume).or_insert(Lease { epoch, expires });
        if lease.epoch <= epoch {
            *lease = Lease { epoch, expires };
        }
    }

    /// What is left of a session's lease; zero once it expired.
    pub fn left(&self, volume: VolumeId, epoch: Epoch, now: Instant) -> Duration {
        match self.held.get(&volume) {
            Some(lease) if lease.epoch == epoch => lease.expires.saturating_duration_since(now),
            // A newer session was granted a lease: this one is over.
            Some(lease) if lease.epoch > epoch => Duration::ZERO,
            _ => self.grace_until.saturating_duration_since(now),
        }
    }

    /// Forgets a session's lease: it was closed, or its volume deleted. A newer session keeps its own.
    pub fn forget(&mut self, volume: VolumeId, epoch: Epoch) {
        if self.held.get(&volume).is_some_and(|lease| lease.epoch <= epoch) {
            self.held.remove(&volume);
        }
    }

    /// Number of leases alive.
    pub fn alive(&self, now: Instant) -> usize {
        self.held.values().filter(|lease| lease.expires > now).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(10);
    const VOLUME: VolumeId = VolumeId::new(1);

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn a_lease_runs_out_unless_renewed() {
        let start = Instant::now();
        let mut leases = Leases::new(LEASE, start);
        leases.grant(VOLUME, Epoch::new(1), at(start, 100));
        assert_eq!(leases.left(VOLUME, Epoch::new(1), at(start, 104)), Duration::from_secs(6));
        leases.grant(VOLUME, Epoch::new(1), at(start, 104));
        assert_eq!(leases.left(VOLUME, Epoch::new(1), at(start, 113)), Duration::from_secs(1));
        assert_eq!(leases.left(VOLUME, Epoch::new(1), at(start, 114)), Duration::ZERO);
        assert_eq!(leases.alive(at(start, 113)), 1);
        assert_eq!(leases.alive(at(start, 114)), 0);
    }

    #[test]
    fn a_newer_session_ends_the_lease_of_the_older_one() {
        let start = Instant::now();
        let mut leases = Leases::new(LEASE, start);
        leases.grant(VOLUME, Epoch::new(1), at(start, 100));
        leases.grant(VOLUME, Epoch::new(2), at(start, 101));
        leases.grant(VOLUME, Epoch::new(1), at(start, 105));
        assert_eq!(leases.left(VOLUME, Epoch::new(1), at(start, 105)), Duration::ZERO);
        leases.forget(VOLUME, Epoch::new(1));
        assert_eq!(leases.left(VOLUME, Epoch::new(2), at(start, 105)), Duration::from_secs(6));
        leases.forget(VOLUME, Epoch::new(2));
        assert_eq!(leases.alive(at(start, 105)), 0);
    }

    #[test]
    fn after_a_restart_every_session_has_one_full_lease_of_grace() {
        let start = Instant::now();
        let mut leases = Leases::new(LEASE, start);
        assert_eq!(leases.left(VOLUME, Epoch::new(7), at(start, 9)), Duration::from_secs(1));
        assert_eq!(leases.left(VOLUME, Epoch::new(7), at(start, 10)), Duration::ZERO);
        leases.grant(VOLUME, Epoch::new(7), at(start, 9));
        assert_eq!(leases.left(VOLUME, Epoch::new(7), at(start, 12)), Duration::from_secs(7));
    }
}
