//! What a front-end has said of one queue.
//!
//! Owned by `device`. Must not know: other queues.

use super::Refusal;
use crate::vhost::config;
use crate::vhost::inflight::QueueRecord;
use crate::vhost::memory::GuestMemory;
use crate::vhost::message::QueueAddresses;
use crate::vhost::order::{Bell, Order, QueueStart, Rings};
use crate::vhost::queue::find_rings;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Who has the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Phase {
    /// Nobody.
    #[default]
    Stopped,
    /// Nobody yet: a worker will, when nothing is left of what was abandoned.
    Held,
    /// A worker.
    Running,
    /// A worker that is to answer what it has fetched.
    Stopping,
}

/// One queue. Its kick is here until it starts; then it is the worker's, who has the other descriptors too.
#[derive(Debug, Default)]
pub struct QueueState {
    /// Descriptors, a power of two.
    pub size: Option<u16>,
    /// Where its rings lie.
    pub addresses: Option<QueueAddresses>,
    /// What is fetched next when it starts.
    pub next_available: u16,
    /// Told so by SET_VRING_ENABLE.
    pub enabled: bool,
    /// Who has it.
    pub phase: Phase,
    /// Its rings while it is not stopped. A front-end that re-arranges its memory may take a region away before it brings it
    /// again, so they stay where they were until they are found elsewhere.
    pub rings: Option<Rings>,
    /// Readable when the guest has work.
    pub kick: Option<OwnedFd>,
    /// Notifies the guest.
    pub call: Option<OwnedFd>,
    /// Tells the front-end that the queue is broken.
    pub error: Option<OwnedFd>,
}

impl QueueState {
    /// One of its descriptors.
    pub fn bell(&mut self, bell: Bell) -> &mut Option<OwnedFd> {
        match bell {
            Bell::Kick => &mut self.kick,
            Bell::Call => &mut self.call,
            Bell::Error => &mut self.error,
        }
    }

    /// Looks for its rings in `memory`.
    ///
    /// # Errors
    /// If it is not known where they are, or they are not in the memory.
    pub fn find(&self, memory: &Arc<GuestMemory>) -> Result<Rings, Refusal> {
        let size = self.size.ok_or(Refusal::Early("size"))?;
        let at = self.addresses.ok_or(Refusal::Early("addresses"))?;
        if memory.regions().len() == 0 {
            return Err(Refusal::Early("memory"));
        }
        Ok(find_rings(memory, size, (at.descriptors, at.available, at.used), at.used_log)?)
    }

    /// The order to serve it with these `rings`. Without protocol features nobody can enable a queue, so it is.
    pub(super) fn start(
        &mut self,
        queue: u16,
        (memory, rings): (Arc<GuestMemory>, Rings),
        record: Option<QueueRecord>,
        features: u64,
    ) -> Order {
        self.phase = Phase::Running;
        Order::Start(Box::new(QueueStart {
            queue,
            size: self.size.unwrap_or_default(),
            memory,
            rings,
            next_available: self.next_available,
            features,
            enabled: self.enabled || features & config::PROTOCOL == 0,
            kick: self.kick.take(),
            call: duplicate(&mut self.call),
            error: duplicate(&mut self.error),
            record,
        }))
    }
}

/// A descriptor for the worker, which the queue keeps for its next start too: the front-end may say it once. Without a
/// descriptor left for that the worker gets the only one.
pub(super) fn duplicate(fd: &mut Option<OwnedFd>) -> Option<OwnedFd> {
    match fd.as_ref().map(OwnedFd::try_clone) {
        Some(Ok(copy)) => Some(copy),
        _ => fd.take(),
    }
}
