//! The planned upgrade: the running process starts the new binary beside itself, lets it prove that it can serve, and passes on
//! what it has: sockets, files, sessions.
//!
//! Called by the service (the old process) and by `main` (the new one). In the order in which an upgrade meets them: [`launch`]
//! (which binary) → `child` (starts it) → `channel` and `message` (what they say) → `hand_over` (the old process) and
//! `take_over` (the new one), `links` for both; `version` lists the versions of what is passed on. `reopening` goes on with the
//! sessions of an upgrade that was given up; `course` is what a stop meets that comes in the middle,
//! `expendable` what the kernel kills first.
//!
//! Proof: config, metadata server, versions. Preparation: the new one gets sockets and sessions, and opens every session anew,
//! while the old one serves. Commit: session by session, the old one ends what runs, and the new one goes on. Links with a ring
//! go over as they are; those without are told to leave, and come back over the listening socket. Until the commit the old one
//! can have everything back, whatever the new one does; from then on there is no way back: if the new one dies, the old one ends
//! too, and whoever started it starts it again.
//!
//! `one_writer`, `no_late_duplicate`: a session of the cluster has a new epoch, of which chunkservers hear with its first
//! command; a file is not touched by the new process before the old one's last operation on it has ended.

pub mod launch;

mod channel;
mod child;
mod course;
mod expendable;
mod hand_over;
mod links;
mod message;
mod reopening;
mod take_over;
#[cfg(test)]
mod tests;
mod version;

pub(crate) use course::{Course, Outcome, stop_successor};
pub(crate) use expendable::Expendable;
pub(crate) use hand_over::{HandOver, Passing, UpgradeError, Upgraded};
pub use launch::Launch;
pub(crate) use reopening::Reopening;
pub use take_over::Predecessor;
pub(crate) use take_over::Sockets;

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of the clock that all processes of a machine share.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Since the start of the machine: neither negative nor beyond 64 bits.
    (now.tv_sec as u64) * 1_000_000_000 + now.tv_nsec as u64
}
