//! The socket of a link whose requests travel in a ring: frames in both directions, and descriptors of memory from nebd.
//!
//! Used by the link's `ring`. What it reads is foreign: every field is checked before it is used. `bounded`: a read takes at most
//! [`READ_BYTES`] and the descriptors of a few frames; what is not written yet is a few frames, of which one of a kind counts.

use super::Breach;
use crate::shared::REGIONS_MAX;
use spline_link::memory::SharedMemory;
use spline_link::{HEADER_BYTES, Header, Message, passing};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Bytes of one read: more frames than come at once.
const READ_BYTES: usize = 4096;
/// Bytes that wait for a nebd that does not read: sizes and farewells, of which there are few. More are left out:
/// a nebd that has not read thousands of them reads none.
const UNSENT_MAX: usize = 64 << 10;

/// Bytes of frames that are read before they are looked at: every region that a link may have, told at once.
const UNREAD_MAX: usize = 2 * REGIONS_MAX * HEADER_BYTES;

/// Something that nebd said.
pub(super) enum Said {
    /// Requests may name this memory.
    Region(u32, SharedMemory),
    /// They do not any more.
    RegionGone(u32),
    /// It ends for good.
    Detach,
    /// The socket was closed.
    Closed,
}

/// The socket, and what is on its way in and out.
pub(super) struct Control {
    stream: UnixStream,
    /// Read, less than a frame.
    partial: Vec<u8>,
    /// Came, and belong to frames that are not looked at yet.
    fds: VecDeque<OwnedFd>,
    out: Vec<u8>,
}

impl Control {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, partial: Vec::new(), fds: VecDeque::new(), out: Vec::new() }
    }

    /// Goes on with what another process has read and not looked at.
    pub(super) fn going_on(stream: UnixStream, partial: Vec<u8>, fds: Vec<OwnedFd>) -> Self {
        Self { partial, fds: fds.into(), ..Self::new(stream) }
    }

    /// The socket again, with what was read and not looked at.
    pub(super) fn into_parts(self) -> io::Result<(OwnedFd, Vec<u8>, Vec<OwnedFd>)> {
        let stream = self.stream.into_std()?;
        Ok((stream.into(), self.partial, self.fds.into()))
    }

    /// The next thing that nebd said. Progress is kept between polls.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Said, Breach>> {
        loop {
            if let Some((head, rest)) = self.partial.split_first_chunk::<HEADER_BYTES>() {
                let message = Header::decode(head)?.message;
                self.partial = rest.to_vec();
                return Poll::Ready(self.understand(message));
            }
            match ready!(self.poll_read(cx))? {
                0 => return Poll::Ready(Ok(Said::Closed)),
                _ => continue,
            }
        }
    }

    fn understand(&mut self, message: Message) -> Result<Said, Breach> {
        match message {
            Message::Region { number, offset, length } => {
                let file = self.fds.pop_front().ok_or(Breach::Region(number))?;
                Ok(Said::Region(number, SharedMemory::map(file, offset, length)?))
            }
            Message::RegionGone { number } => Ok(Said::RegionGone(number)),
            Message::Detach => Ok(Said::Detach),
            _ => Err(Breach::Direction),
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let Self { stream, partial, fds, .. } = self;
            match stream.try_io(Interest::READABLE, || read(stream, partial, fds)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Reads what is in the socket now, whether or not the runtime has heard of it.
    pub(super) fn read_now(&mut self) -> io::Result<()> {
        loop {
            if self.partial.len() > UNREAD_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "too many frames at once"));
            }
            match read(&self.stream, &mut self.partial, &mut self.fds) {
                // The end of the stream is seen again by whoever polls.
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Queues a frame.
    pub(super) fn push(&mut self, message: Message) {
        if self.out.len() < UNSENT_MAX {
            self.out.extend_from_slice(&Header::bare(message).encode());
        }
    }

    /// Whether everything that was queued is written.
    pub(super) fn is_flushed(&self) -> bool {
        self.out.is_empty()
    }

    /// Writes until everything is written.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.stream.try_write(&self.out) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.out.clear();
                    return Poll::Ready(Err(error));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

fn read(stream: &UnixStream, partial: &mut Vec<u8>, fds: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
    let mut bytes = [0; READ_BYTES];
    let mut came = Vec::new();
    let count = passing::receive(stream.as_fd(), &mut bytes, &mut came)?;
    partial.extend_from_slice(&bytes[..count]);
    fds.extend(came);
    // A frame brings one at most.
    if fds.len() > partial.len() / HEADER_BYTES + 1 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "descriptors that belong to no frame"));
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_that_nobody_looks_at_are_not_read_without_limit() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let mut control = Control::new(ours);
        let frames =
            Header::bare(Message::RegionGone { number: 1 }).encode().repeat(READ_BYTES / HEADER_BYTES);
        let mut sent = 0;
        let mut refused = None;
        // A socket holds less than all of it.
        while refused.is_none() && sent < 4 * UNREAD_MAX {
            while let Ok(count) = theirs.try_write(&frames) {
                sent += count;
            }
            refused = control.read_now().err();
        }
        assert_eq!(refused.expect("is cut").kind(), io::ErrorKind::InvalidData);
        assert!(control.partial.len() <= UNREAD_MAX + READ_BYTES);
    }
}
