//! Socket calls over memory of our own and memory that is shared with others, in one go.
//!
//! Called by `vhost::stream`, `send_queue` and `receive`. A guest may change its memory at any time, and the gateway an
//! [`area`](crate::area): the kernel copies whatever is there, and no reference to it is ever made here. One of the few places with
//! `unsafe`.

use crate::area::Buffer;
use crate::vhost::memory::{GuestMemory, Segment};
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Pieces of one call: well below the kernel's limit of 1024, and 2 KiB of stack.
pub const PIECES_MAX: usize = 128;

/// A list of pieces of memory, each borrowed for `'a`.
struct Pieces<'a> {
    list: [libc::iovec; PIECES_MAX],
    count: usize,
    bytes: usize,
    borrowed: PhantomData<&'a [u8]>,
}

impl<'a> Pieces<'a> {
    fn new() -> Self {
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self { list: [none; PIECES_MAX], count: 0, bytes: 0, borrowed: PhantomData }
    }

    /// Whether it was taken: a piece that follows the last one in memory always is.
    fn push(&mut self, start: *mut u8, length: usize) -> bool {
        if length == 0 {
            return true;
        }
        if let Some(last) = self.count.checked_sub(1).map(|at| &mut self.list[at])
            && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == start
        {
            last.iov_len += length;
        } else if self.count < PIECES_MAX {
            self.list[self.count] = libc::iovec { iov_base: start.cast(), iov_len: length };
            self.count += 1;
        } else {
            return false;
        }
        self.bytes += length;
        true
    }

    fn push_segment(&mut self, memory: &'a GuestMemory, segment: Segment) -> bool {
        let piece = memory.iovec(segment);
        self.push(piece.iov_base.cast(), piece.iov_len)
    }

    fn push_buffer(&mut self, buffer: &'a Buffer, part: Range<usize>) -> bool {
        buffer.pointers(part).all(|(start, length)| self.push(start, length))
    }
}

/// What is to be sent.
pub struct Outgoing<'a>(Pieces<'a>);

impl<'a> Outgoing<'a> {
    /// Nothing yet.
    pub fn new() -> Self {
        Self(Pieces::new())
    }

    /// Appends bytes of ours; false if there is no room for another piece.
    pub fn push(&mut self, bytes: &'a [u8]) -> bool {
        self.0.push(bytes.as_ptr().cast_mut(), bytes.len())
    }

    /// Appends bytes of the guest's; false if there is no room for another piece.
    pub fn push_segment(&mut self, memory: &'a GuestMemory, segment: Segment) -> bool {
        self.0.push_segment(memory, segment)
    }

    /// Appends bytes of a buffer; false if there was no room for all of them.
    pub fn push_buffer(&mut self, buffer: &'a Buffer, part: Range<usize>) -> bool {
        self.0.push_buffer(buffer, part)
    }

    /// Bytes in all.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Sends what the socket takes.
    ///
    /// # Errors
    /// Those of writev; `EFAULT` if guest memory vanished.
    pub fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: each piece is borrowed for 'a, ours or mapped by a borrowed GuestMemory or Buffer; writev only reads them.
        let sent = unsafe { libc::writev(socket.as_raw_fd(), self.0.list.as_ptr(), self.0.count as i32) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// Where what comes is to be put.
pub struct Incoming<'a>(Pieces<'a>);

impl<'a> Incoming<'a> {
    /// Nowhere yet.
    pub fn new() -> Self {
        Self(Pieces::new())
    }

    /// Appends room of ours; false if there is no room for another piece.
    pub fn push(&mut self, bytes: &'a mut [u8]) -> bool {
        self.0.push(bytes.as_mut_ptr(), bytes.len())
    }

    /// Appends room of the guest's; false if there is no room for another piece.
    pub fn push_segment(&mut self, memory: &'a GuestMemory, segment: Segment) -> bool {
        self.0.push_segment(memory, segment)
    }

    /// Appends room of a buffer; false if there was no room for all of it.
    pub fn push_buffer(&mut self, buffer: &'a Buffer, part: Range<usize>) -> bool {
        self.0.push_buffer(buffer, part)
    }

    /// Bytes in all.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Fills it with what the socket has.
    ///
    /// # Errors
    /// Those of readv; `EFAULT` if guest memory vanished.
    pub fn receive(self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: each piece is borrowed mutably for 'a, or mapped writable by a borrowed GuestMemory or Buffer, to which no
        // references exist; readv writes no more than their lengths.
        let got = unsafe { libc::readv(socket.as_raw_fd(), self.0.list.as_ptr(), self.0.count as i32) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }
}

impl Default for Outgoing<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl Default for Incoming<'_> {
    fn default() -> Self {
        Self::new()
    }
}
