//! A queue that a worker serves, and the descriptors that belong to it.
//!
//! Called by the worker. Must not know: requests, the link.

use crate::poller::Poller;
use crate::vhost::order::{Bell, QueueStart};
use crate::vhost::queue::{Queue, QueueError};
use rustix::event::epoll::EventFlags;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// VIRTIO_BLK_F_FLUSH.
const FEATURE_FLUSH: u64 = 1 << 9;

/// The queue.
#[derive(Debug)]
pub struct Served {
    /// The rings.
    pub queue: Queue,
    /// Whether it is fetched from (VHOST_USER_SET_VRING_ENABLE).
    pub enabled: bool,
    /// It makes no sense; nothing is fetched from it until it is started anew.
    pub broken: bool,
    /// It is to end once what was fetched is answered.
    pub stopping: bool,
    /// A write must be durable when it is answered: the driver has not accepted FLUSH.
    pub writethrough: bool,
    number: u16,
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
            broken: false,
            stopping: false,
            writethrough: start.features & FEATURE_FLUSH == 0,
            number: start.queue,
            kick: None,
            call: None,
            error: None,
        };
        served.set(Bell::Call, start.call, poller, token)?;
        served.set(Bell::Error, start.error, poller, token)?;
        served.set(Bell::Kick, start.kick, poller, token)?;
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
            Bell::Call => self.call = fd,
            Bell::Error => self.error = fd,
        }
        Ok(())
    }

    /// Whether nothing tells of its work: it has to be looked at.
    pub fn has_no_kick(&self) -> bool {
        self.kick.is_none()
    }

    /// Whether chains are to be fetched now.
    pub fn is_open(&self) -> bool {
        // What an earlier process fetched must be answered before the queue may stop.
        self.enabled && !self.broken && (!self.stopping || self.queue.orphans() > 0)
    }

    /// Whether it was told to stop and has nothing left to answer.
    pub fn has_stopped(&self) -> bool {
        self.stopping && self.queue.open() == 0 && (self.queue.orphans() == 0 || self.broken || !self.enabled)
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

    /// Shows the guest what was answered, and notifies it if it wants that.
    pub fn publish(&mut self) {
        if self.queue.publish()
            && let Some(call) = &self.call
        {
            // A counter that is full has notified already; any other error is the front-end's loss.
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }

    /// Fetches nothing more and tells the front-end.
    pub fn break_down(&mut self, why: &QueueError) {
        self.broken = true;
        tracing::warn!(queue = self.number, reason = %why, "guest broke its queue, it is not served until it is reset");
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
