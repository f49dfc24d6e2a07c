//! What the ring and the lanes of a file have in common: an io_uring that can do what is needed, and how its submission queue is
//! handed to the kernel.

use super::job::Descriptors;
use io_uring::{IoUring, Probe, opcode};
use rustix::io::Errno;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::task::Context;
use std::time::Duration;
use tokio::time::Sleep;

/// Place of each descriptor in a ring's table.
pub(super) const BUFFERED: u32 = 0;
pub(super) const DIRECT: u32 = 1;
/// How long a kernel that is short of memory is left alone.
const PAUSE: Duration = Duration::from_millis(10);

/// An io_uring with a submission queue of `entries`, a completion queue of `completions`, and both descriptors in its table.
///
/// # Errors
/// Why the kernel has none that can do all that is needed.
pub(super) fn build(files: &Descriptors, entries: u32, completions: u32) -> io::Result<IoUring> {
    // A completion waits for the next entry into the kernel of the thread that submitted, rather than interrupt it. A ring for
    // one thread alone (SINGLE_ISSUER, DEFER_TASKRUN) is no use: a task moves between threads. It is not quicker either.
    let modern = IoUring::builder().setup_coop_taskrun().setup_cqsize(completions).build(entries);
    // Kernels before 5.19 do not know the flag.
    let ring = modern.or_else(|_| IoUring::builder().setup_cqsize(completions).build(entries))?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
    ];
    // Vectors of a request need not outlive its submission (5.5).
    if !ring.params().is_feature_submit_stable() || !needed.iter().all(|code| probe.is_supported(*code)) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let buffered = files.buffered.as_raw_fd();
    let table: [RawFd; 2] = [buffered, files.direct.as_ref().map_or(buffered, AsRawFd::as_raw_fd)];
    ring.submitter().register_files(&table)?;
    Ok(ring)
}

/// Hands over what is in a submission queue.
#[derive(Default)]
pub(super) struct Submitter {
    /// The kernel was short of something: when it is asked again.
    pause: Option<Pin<Box<Sleep>>>,
}

impl Submitter {
    /// Gives the kernel what is in the submission queue, now or, if it is short of something, after a pause. Answers how many
    /// entries it took, from the front.
    ///
    /// # Errors
    /// The ring is of no use any more.
    pub(super) fn submit(&mut self, ring: &mut IoUring, cx: &mut Context<'_>) -> io::Result<usize> {
        if let Some(pause) = &mut self.pause {
            if pause.as_mut().poll(cx).is_pending() {
                return Ok(0);
            }
            self.pause = None;
        }
        let mut taken = 0;
        while !ring.submission().is_empty() {
            match ring.submit() {
                Ok(count) => taken += count,
                Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                    Some(Errno::INTR) => {}
                    Some(Errno::BUSY | Errno::AGAIN | Errno::NOMEM) => {
                        let mut pause = Box::pin(tokio::time::sleep(PAUSE));
                        // Registers the waker: it ends later than now.
                        let _ = pause.as_mut().poll(cx);
                        self.pause = Some(pause);
                        return Ok(taken);
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(taken)
    }
}
