//! A queue that a worker serves, and the descriptors that belong to it.
//!
//! Called by the worker. Must not know: requests, the link.

use crate::poller::Poller;
use crate::vhost::config::FLUSH;
use crate::vhost::order::{Bell, QueueStart};
use crate::vhost::queue::{Queue, QueueError};
use rustix::event::epoll::EventFlags;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longest time between a front-end's taking a part of the guest's memory away and its bringing it again.
const REARRANGED_WITHIN: Duration = Duration::from_millis(100);

/// The queue.
#[derive(Debug)]
pub struct Served {
    /// The rings.
    pub queue: Queue,
    enabled: bool,
    /// It was enabled once: what an earlier process fetched is carried out, though it may be disabled before it stops.
    was_enabled: bool,
    /// So many of the heads that are fetched next were asked for before another session had the volume: they fail.
    pub fenced: usize,
    /// Since when its next chain names memory that is not there: it may be on its way.
    pub outside_since: Option<Instant>,
    /// It makes no sense; nothing is fetched from it until it is started anew.
    pub broken: bool,
    /// It is to end once what was fetched is answered.
    pub stopping: bool,
    /// A write must be durable when it is answered: the driver has not accepted FLUSH.
    pub writethrough: bool,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
}

impl Served {
    /// Takes over a queue; its kicks carry `token`.
    ///
    /// # Errors
    /// If its record makes no sense, or the front-end gave something else than an eventfd.
    pub fn new(mut start: QueueStart, poller: &Poller, token: u64) -> Result<Self, QueueError> {
        let mut served = Self {
            queue: Queue::start(&mut start)?,
            enabled: start.enabled,
            was_enabled: start.enabled,
            fenced: 0,
            outside_since: None,
            broken: false,
            stopping: false,
            writethrough: start.features & FLUSH == 0,
            kick: None,
            call: None,
            error: None,
        };
        served.set(Bell::Call, start.call, poller, token)?;
        served.set(Bell::Error, start.error, poller, token)?;
        served.set(Bell::Kick, start.kick, poller, token)?;
        // A process that was killed may have shown the guest answers and not notified it any more; by its event index the
        // guest would then not ask for the next notification either. One too many is harmless.
        served.call();
        Ok(served)
    }

    /// Uses another descriptor.
    ///
    /// # Errors
    /// If it can not be used: the front-end gave something else than an eventfd.
    pub fn set(
        &mut self,
        bell: Bell,
        fd: Option<OwnedFd>,
        poller: &Poller,
        token: u64,
    ) -> Result<(), QueueError> {
        let unusable = |error: io::Error| QueueError::Bell(error.to_string());
        if let Some(fd) = &fd {
            // Neither reading nor writing it may ever hold up the other queues.
            let flags = fcntl_getfl(fd).map_err(|error| unusable(error.into()))?;
            fcntl_setfl(fd, flags | OFlags::NONBLOCK).map_err(|error| unusable(error.into()))?;
        }
        match bell {
            Bell::Kick => {
                if let Some(fd) = &fd {
                    poller.add(fd.as_fd(), token, EventFlags::IN).map_err(unusable)?;
                }
                if let Some(old) = std::mem::replace(&mut self.kick, fd) {
                    // The front-end holds it too, so that closing it would not take it out.
                    poller.remove(old.as_fd());
                }
            }
            Bell::Call => {
                self.call = fd;
                // What was shown while the old one was on its way out may have told nobody.
                self.call();
            }
            Bell::Error => self.error = fd,
        }
        Ok(())
    }

    /// Serves it, or leaves it alone (VHOST_USER_SET_VRING_ENABLE).
    pub fn enable(&mut self, enabled: bool) {
        self.enabled = enabled;
        self.was_enabled |= enabled;
    }

    /// Whether nothing tells of its work: it has to be looked at.
    pub fn has_no_kick(&self) -> bool {
        self.kick.is_none()
    }

    /// Whether chains are to be fetched now.
    pub fn is_open(&self) -> bool {
        // What an earlier process fetched must be answered before the queue may stop.
        let left = self.stopping && self.was_enabled && self.queue.orphans() > 0;
        !self.broken && (left || (self.enabled && !self.stopping))
    }

    /// Whether it is worth looking for chains now: the next one does not wait for memory.
    pub fn can_fetch(&self) -> bool {
        self.is_open() && self.outside_since.is_none()
    }

    /// Whether it was told to stop and has nothing left to answer.
    pub fn has_stopped(&self) -> bool {
        let nothing_left = self.queue.orphans() == 0 || self.broken || !self.was_enabled;
        self.stopping && self.queue.open() == 0 && nothing_left
    }

    /// Takes the guest's notification.
    ///
    /// # Errors
    /// If the descriptor is none that notifies.
    pub fn kicked(&mut self) -> io::Result<()> {
        let Some(kick) = &self.kick else { return Ok(()) };
        let mut count = [0; 8];
        match rustix::io::read(kick, &mut count) {
            Ok(8) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a chain that names memory which is not there is to be tried again: a front-end that rearranges the guest's memory
    /// takes a part of it away before it brings it again.
    pub fn may_come(&mut self, now: Instant) -> bool {
        now.saturating_duration_since(*self.outside_since.get_or_insert(now)) < REARRANGED_WITHIN
    }

    /// Shows the guest what was answered, and notifies it if it wants that.
    pub fn publish(&mut self) {
        if self.queue.publish() {
            self.call();
        }
    }

    fn call(&self) {
        if let Some(call) = &self.call {
            // A counter that is full has notified already; any other error is the front-end's loss.
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }

    /// Fetches nothing more and tells the front-end.
    pub fn break_down(&mut self) {
        self.broken = true;
        if let Some(error) = &self.error {
            let _ = rustix::io::write(error, &1u64.to_ne_bytes());
        }
    }

    /// Ends it: its kicks do not come any more.
    pub fn end(mut self, poller: &Poller) {
        if let Some(kick) = self.kick.take() {
            poller.remove(kick.as_fd());
        }
    }
}
