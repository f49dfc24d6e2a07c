//! What control tells its workers and what they tell it, and the mailboxes that carry it.
//!
//! Used by `control`, `device` and `worker`. Each order is answered by exactly one [`Report::Obeyed`].

use super::inflight::QueueRecord;
use super::memory::{GuestMemory, Ring};
use super::queue::QueueError;
use rustix::event::EventfdFlags;
use spline_link::{Accepted, Hello};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// The three parts of a virtqueue.
#[derive(Clone, Debug)]
pub struct Rings {
    /// Descriptor table.
    pub descriptors: Ring,
    /// Available ring: the guest's.
    pub available: Ring,
    /// Used ring: ours.
    pub used: Ring,
    /// Guest address of the used ring, if what is written there is to be logged (VHOST_VRING_F_LOG).
    pub used_log: Option<u64>,
}

/// Everything that a worker needs to serve a queue.
#[derive(Debug)]
pub struct QueueStart {
    /// Number of the queue.
    pub queue: u16,
    /// Descriptors; a power of two.
    pub size: u16,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Where the queue lies in it.
    pub rings: Rings,
    /// What is fetched next, unless `record` knows better.
    pub next_available: u16,
    /// Features that the driver has accepted.
    pub features: u64,
    /// Whether it is served at once (VHOST_USER_SET_VRING_ENABLE).
    pub enabled: bool,
    /// Becomes readable when the guest has work; without one the queue is looked at every millisecond.
    pub kick: Option<OwnedFd>,
    /// Notifies the guest; without one it looks by itself.
    pub call: Option<OwnedFd>,
    /// Tells the front-end that the queue is broken.
    pub error: Option<OwnedFd>,
    /// What is unanswered, kept for a process that comes after this one.
    pub record: Option<QueueRecord>,
}

/// What a queue's descriptor is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bell {
    /// The guest notifies us.
    Kick,
    /// We notify the guest.
    Call,
    /// We tell the front-end of a broken queue.
    Error,
}

/// What control wants of a worker.
#[derive(Debug)]
pub enum Order {
    /// Serve a queue.
    Start(Box<QueueStart>),
    /// Fetch nothing more from a queue; obeyed when everything fetched is answered, with the next available index.
    Stop {
        /// The queue.
        queue: u16,
    },
    /// A queue has another descriptor, or none.
    Bell {
        /// The queue.
        queue: u16,
        /// What for.
        bell: Bell,
        /// The descriptor.
        fd: Option<OwnedFd>,
    },
    /// Serve a queue that was started, or leave it alone.
    Enable {
        /// The queue.
        queue: u16,
        /// Which of them.
        enabled: bool,
    },
    /// The guest's memory has changed; the worker's queues lie here now.
    Memory {
        /// All of it.
        memory: Arc<GuestMemory>,
        /// The started queues of this worker.
        rings: Vec<(u16, Rings)>,
    },
    /// The connection is gone or the device was reset: queues end at once, answers to what is open go nowhere. Obeyed when
    /// nothing is open any more.
    Abandon,
    /// Open the volume: another worker has, with this hello.
    Join(Box<Hello>),
    /// A front-end has come after the volume was lost: try to have it back.
    Reopen,
    /// End. Not answered.
    End,
}

/// What a worker tells control.
#[derive(Debug)]
pub enum Report {
    /// A gateway serves the volume, for the first time or again.
    Accepted(Box<Accepted>),
    /// The volume has a new size, bytes.
    Resized {
        /// Bytes.
        size: u64,
    },
    /// An order is carried out.
    Obeyed {
        /// Who.
        worker: usize,
        /// What.
        done: Done,
    },
    /// A queue is broken and not served until it is reset.
    Broken {
        /// The queue.
        queue: u16,
        /// Why.
        why: QueueError,
    },
    /// A newer session has the volume: every request fails until a front-end connects anew.
    Lost {
        /// Who has heard of it.
        worker: usize,
    },
    /// The worker has ended, with this error unless it was told to.
    Ended(anyhow::Result<()>),
}

/// The order that was carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Done {
    /// [`Order::Start`].
    Started {
        /// The queue.
        queue: u16,
    },
    /// [`Order::Stop`].
    Stopped {
        /// The queue.
        queue: u16,
        /// What would be fetched next.
        next_available: u16,
    },
    /// [`Order::Abandon`]: nothing of the old connection is open.
    Abandoned,
    /// Any other.
    Other,
}

/// A queue of messages to one thread, which is woken by a descriptor.
#[derive(Debug)]
pub struct Mailbox<T> {
    letters: Mutex<VecDeque<T>>,
    bell: OwnedFd,
}

impl<T> Mailbox<T> {
    /// An empty one.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { letters: Mutex::default(), bell })
    }

    /// Puts a message in and wakes the reader. Bounded by what control has outstanding: a few orders for each queue.
    pub fn put(&self, letter: T) {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner).push_back(letter);
        // Only a counter that is full refuses, and then the reader is awake.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Takes all messages out.
    pub fn take(&self) -> VecDeque<T> {
        let mut count = [0; 8];
        // EAGAIN: nobody rang since.
        let _ = rustix::io::read(&self.bell, &mut count);
        std::mem::take(&mut self.letters.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Readable when there is a message.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
