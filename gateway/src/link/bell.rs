//! The bell of a ring: an eventfd that nebd rings when it has shown something to a gateway that sleeps.
//!
//! Used by the link's `ring`. It is never read, because nebd could set it to block: watched for edges, each ring of it is an event
//! of its own.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The bell, watched.
pub(super) struct Bell(AsyncFd<OwnedFd>);

impl Bell {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd owns its descriptor, and keeps it until it is dropped.
        Ok(Self(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?))
    }

    /// Ready once it was rung since the last time.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.0.poll_read_ready(cx))?.clear_ready();
        Poll::Ready(Ok(()))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
