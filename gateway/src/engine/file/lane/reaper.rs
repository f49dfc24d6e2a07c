//! Waits for operations whose lane is gone: the kernel still writes to their memory, and to the file.
//!
//! Started by a lane that is dropped in the middle: its link was cut, or the runtime ends. A thread, because a runtime may not be
//! there any more; it lives as long as the disk needs to answer. `no_late_duplicate`: what they claim is held until they have ended.

use super::super::Disk;
use super::flights::Flights;
use io_uring::IoUring;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::Builder;

/// Stack of the thread: it reads a queue and drops buffers.
const STACK_BYTES: usize = 128 << 10;

/// What a lane has left in the kernel, and the ring that tells of its end.
pub(super) struct Leftover {
    pub(super) ring: IoUring,
    pub(super) flights: Flights,
    pub(super) disk: Arc<Disk>,
}

impl Leftover {
    /// Sees to it that all of it is kept until it has ended.
    pub(super) fn reap(self) {
        let builder = Builder::new().name("lane-reaper".into()).stack_size(STACK_BYTES);
        // Without a thread, or with a kernel that does not go on, the drop keeps it for ever.
        if let Err(error) = builder.spawn(move || self.wait()) {
            tracing::warn!(%error, "no thread is left to wait for the disk");
        }
    }

    fn wait(mut self) {
        while !self.flights.is_empty() {
            self.take();
            if self.flights.is_empty() {
                return;
            }
            // SAFETY: the ring keeps its descriptor open.
            let fd = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
            let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return tracing::error!(%error, "a ring can not be waited for"),
            }
        }
    }

    /// Forgets what has ended. What ended short is not gone on with: its request is replayed, or nobody's.
    fn take(&mut self) {
        let Self { ring, flights, disk } = self;
        let ended = ring.completion().filter_map(|entry| {
            // Kept by the flight: the result is nobody's.
            flights.remove(entry.user_data() as u32, Ok(()))
        });
        disk.overlaps.release(ended.map(|landed| landed.claim));
    }
}

impl Drop for Leftover {
    fn drop(&mut self) {
        if self.flights.is_empty() {
            return;
        }
        std::mem::forget(std::mem::take(&mut self.flights));
        self.disk.overlaps.abandon();
        tracing::error!(
            path = %self.disk.path.display(),
            "operations of a file can not be waited for: it stays locked until this process has ended"
        );
    }
}
