//! epoll. Called by the threads that own one, and by the link. Must not know: what is watched.

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

/// Events of one wait; the rest comes with the next.
const EVENTS_MAX: usize = 128;

/// One epoll instance.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    /// An empty one.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// Watches `fd` for `flags`; its events carry `token`. Closing the descriptor ends it.
    ///
    /// # Errors
    /// Those of epoll_ctl.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), flags)?)
    }

    /// Watches `fd` for other `flags` than before.
    ///
    /// # Errors
    /// Those of epoll_ctl.
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, EventData::new_u64(token), flags)?)
    }

    /// Watches `fd` no more, though it stays open.
    pub fn remove(&self, fd: BorrowedFd<'_>) {
        // What is not watched needs no more.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Waits until something is ready or `timeout` has passed (rounded up, so that a deadline has passed after it);
    /// fills `ready` with tokens and flags.
    ///
    /// # Errors
    /// Those of epoll_wait, but not an interruption.
    pub fn wait(&self, ready: &mut Vec<(u64, EventFlags)>, timeout: Option<Duration>) -> io::Result<()> {
        ready.clear();
        let timeout = timeout.map(|limit| {
            let limit = limit + Duration::from_micros(999);
            Timespec { tv_sec: limit.as_secs().min(3600) as i64, tv_nsec: limit.subsec_nanos().into() }
        });
        let unset = Event { flags: EventFlags::empty(), data: EventData::new_u64(0) };
        let mut events = [unset; EVENTS_MAX];
        match epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) {
            Ok(count) => ready.extend(events[..count].iter().map(|event| (event.data.u64(), event.flags))),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}
