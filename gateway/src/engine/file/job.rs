//! One disk operation: what the file engine hands to its ring or its threads, and how it is done with plain system
//! calls.

use crate::buffer::Buffer;
use bytes::Bytes;
use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::{Errno, ReadWriteFlags, pread, pwritev2};
use spline_types::ByteRange;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tokio::sync::oneshot;

/// The two ways into one file.
pub(super) struct Descriptors {
    /// Through the page cache; holds the lock on the file.
    pub(super) buffered: OwnedFd,
    /// Past it; `None` if the config or the file system does not want that.
    pub(super) direct: Option<OwnedFd>,
}

/// What to do.
pub(super) enum Action {
    /// Fill the buffer.
    Read(Buffer),
    /// Write the bytes; with `durable`, before it is answered.
    Write { data: Bytes, durable: bool },
    /// Make everything that was written durable.
    Sync,
    /// Change the allocation of the range.
    Allocate(FallocateFlags),
}

/// One operation under way.
pub(super) struct Job {
    pub(super) action: Action,
    /// Where, bytes of the file; empty for a sync.
    pub(super) range: ByteRange,
    /// Past the page cache: buffer, offset and length are aligned.
    pub(super) direct: bool,
    /// Told when it has ended: a read's buffer comes back full.
    pub(super) done: oneshot::Sender<Result<Option<Buffer>, Errno>>,
}

impl Job {
    /// Bytes to move; 0 for operations that move none.
    pub(super) fn length(&self) -> usize {
        match &self.action {
            Action::Read(buffer) => buffer.as_ref().len(),
            Action::Write { data, .. } => data.len(),
            Action::Sync | Action::Allocate(_) => 0,
        }
    }

    /// Which descriptor to use from byte `moved` on: the rest of a short direct transfer may be unaligned.
    pub(super) fn is_direct_from(&self, moved: usize) -> bool {
        self.direct && moved == 0
    }

    /// A read met the end of the file after `moved` bytes: the rest is zeros.
    pub(super) fn zero_from(&mut self, moved: usize) {
        if let Action::Read(buffer) = &mut self.action {
            buffer.as_mut_slice()[moved..].fill(0);
        }
    }

    /// Tells whoever waits, if anybody still does.
    pub(super) fn finish(self, result: Result<(), Errno>) {
        let buffer = match self.action {
            Action::Read(buffer) => Some(buffer),
            _ => None,
        };
        drop(self.done.send(result.map(|()| buffer)));
    }

    /// Carries it out with blocking system calls.
    pub(super) fn perform(mut self, files: &Descriptors) {
        let mut moved = 0;
        let result = loop {
            let fd = files.descriptor(self.is_direct_from(moved));
            match self.step(fd, moved) {
                Err(Errno::INTR) => {}
                Err(error) => break Err(error),
                Ok(0) if moved < self.length() => {
                    let reads = matches!(self.action, Action::Read(_));
                    self.zero_from(moved);
                    break if reads { Ok(()) } else { Err(Errno::IO) };
                }
                Ok(step) => {
                    moved += step;
                    if moved >= self.length() {
                        break Ok(());
                    }
                }
            }
        };
        self.finish(result);
    }

    fn step(&mut self, fd: BorrowedFd<'_>, moved: usize) -> Result<usize, Errno> {
        let at = self.range.offset() + moved as u64;
        match &mut self.action {
            Action::Read(buffer) => pread(fd, &mut buffer.as_mut_slice()[moved..], at),
            Action::Write { data, durable } => {
                let flags = if *durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
                pwritev2(fd, &[IoSlice::new(&data[moved..])], at, flags)
            }
            Action::Sync => fdatasync(fd).map(|()| 0),
            Action::Allocate(flags) => {
                fallocate(fd, *flags, self.range.offset(), self.range.length()).map(|()| 0)
            }
        }
    }
}

impl Descriptors {
    /// The direct descriptor if it is wanted and there is one.
    pub(super) fn descriptor(&self, direct: bool) -> BorrowedFd<'_> {
        match &self.direct {
            Some(fd) if direct => fd.as_fd(),
            _ => self.buffered.as_fd(),
        }
    }
}
