//! Bytes on their way to one socket: small pieces are put together, large ones are shared, one writev sends many.
//!
//! Called by `nbd::connection` and `link`. Must not know: what the bytes mean. The caller bounds it by looking at
//! [`SendQueue::bytes`] (`bounded`).

use rustix::io::Errno;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

/// Parts of buffers up to this size, bytes, are copied: cheaper than an iovec and a reference each.
const COPY_MAX: usize = 16 << 10;
/// A block of copied pieces is closed at this size, bytes, so that growing it stays cheap.
const BLOCK_BYTES: usize = 256 << 10;
/// Pieces of one writev.
const PIECES_PER_CALL: usize = 64;

#[derive(Debug)]
enum Part {
    Block(Vec<u8>),
    Shared(Rc<Vec<u8>>, Range<usize>),
}

impl Part {
    fn shared(&self) -> Option<&Rc<Vec<u8>>> {
        match self {
            Self::Block(_) => None,
            Self::Shared(data, _) => Some(data),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Block(block) => block,
            Self::Shared(data, range) => &data[range.clone()],
        }
    }
}

/// Bytes that a socket should take before its reader has read them: a large request in few calls. The system may
/// allow less.
const SOCKET_BYTES: usize = 1 << 20;

/// Asks for a socket that takes much at once; without it everything works, in more calls.
pub fn widen(socket: BorrowedFd<'_>) {
    if let Err(error) = rustix::net::sockopt::set_socket_send_buffer_size(socket, SOCKET_BYTES) {
        tracing::debug!(%error, "socket keeps its send buffer");
    }
}

/// The queue.
#[derive(Debug, Default)]
pub struct SendQueue {
    parts: VecDeque<Part>,
    /// Bytes of the first part that are already sent.
    head: usize,
    bytes: usize,
    /// Memory of the parts, bytes: a shared buffer counts whole, once, until nothing of it is left to send.
    held: usize,
    /// An emptied block, used again.
    spare: Vec<u8>,
}

impl SendQueue {
    /// Bytes not yet sent.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Memory that is kept for what is not yet sent, bytes.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Whether everything is sent.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Appends a copy of `data`.
    pub fn push(&mut self, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        self.bytes += data.len();
        self.held += data.len();
        match self.parts.back_mut() {
            Some(Part::Block(block)) if block.len() + data.len() <= BLOCK_BYTES => {
                block.extend_from_slice(data)
            }
            _ => {
                let mut block = std::mem::take(&mut self.spare);
                block.extend_from_slice(data);
                self.parts.push_back(Part::Block(block));
            }
        }
    }

    /// Appends a part of `data` without copying it, unless the buffer is small: copies of some parts beside a buffer that
    /// is kept for others would take up to twice its memory. Parts of one buffer follow each other.
    pub fn push_shared(&mut self, data: &Rc<Vec<u8>>, range: Range<usize>) {
        if data.len() <= COPY_MAX {
            return self.push(&data[range]);
        }
        if range.is_empty() {
            return;
        }
        self.bytes += range.len();
        if !self.parts.iter().rev().find_map(Part::shared).is_some_and(|last| Rc::ptr_eq(last, data)) {
            self.held += data.len();
        }
        self.parts.push_back(Part::Shared(Rc::clone(data), range));
    }

    /// Sends what the socket takes. Answers whether everything is sent.
    ///
    /// # Errors
    /// Those of writev, but not `EAGAIN`: that is "not everything".
    pub fn write_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while self.bytes > 0 {
            let mut pieces = [IoSlice::new(&[]); PIECES_PER_CALL];
            let mut count = 0;
            for (piece, part) in pieces.iter_mut().zip(&self.parts) {
                let skip = if count == 0 { self.head } else { 0 };
                *piece = IoSlice::new(&part.bytes()[skip..]);
                count += 1;
            }
            let offered: usize = pieces[..count].iter().map(|piece| piece.len()).sum();
            match rustix::io::writev(socket, &pieces[..count]) {
                Ok(sent) => {
                    self.advance(sent);
                    if sent < offered {
                        return Ok(false);
                    }
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Gives memory back; what is not sent stays.
    pub fn shrink(&mut self) {
        self.spare = Vec::new();
        self.parts.shrink_to_fit();
    }

    /// Takes everything out, for tests of what would be sent.
    #[cfg(test)]
    pub fn take(&mut self) -> Vec<u8> {
        let all = self.parts.iter().flat_map(|part| part.bytes()).copied().skip(self.head).collect();
        *self = Self::default();
        all
    }

    fn advance(&mut self, mut sent: usize) {
        self.bytes -= sent;
        while let Some(part) = self.parts.front_mut() {
            let left = part.bytes().len() - self.head;
            if sent < left {
                self.head += sent;
                return;
            }
            sent -= left;
            self.head = 0;
            match self.parts.pop_front() {
                Some(Part::Block(mut block)) => {
                    self.held -= block.len();
                    if self.spare.capacity() < block.capacity() {
                        block.clear();
                        self.spare = block;
                    }
                }
                Some(Part::Shared(data, _)) => {
                    let next = self.parts.iter().find_map(Part::shared);
                    if !next.is_some_and(|next| Rc::ptr_eq(next, &data)) {
                        self.held -= data.len();
                    }
                }
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_buffer_is_held_until_nothing_of_it_is_left_to_send() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        let (mut queue, size) = (SendQueue::default(), 8 << 20);
        let data = Rc::new(vec![7; size]);
        queue.push(b"head");
        queue.push_shared(&data, 0..1 << 20);
        queue.push(b"hole");
        queue.push_shared(&data, size - (1 << 20)..size);
        drop(data);
        assert_eq!((queue.bytes(), queue.held()), ((2 << 20) + 8, size + 8));
        let mut buffer = vec![0; 4096];
        while !queue.write_to(ours.as_fd()).expect("writes") {
            assert!(queue.held() >= size, "unsent={} held={}", queue.bytes(), queue.held());
            assert!(theirs.read(&mut buffer).expect("reads") > 0);
        }
        assert_eq!((queue.bytes(), queue.held()), (0, 0));
    }

    #[test]
    fn many_parts_of_a_buffer_hold_it_once() {
        let mut queue = SendQueue::default();
        let data = Rc::new(vec![7; 1 << 20]);
        for start in (0..data.len()).step_by(20 << 10) {
            queue.push_shared(&data, start..(start + (16 << 10)).min(data.len()));
        }
        queue.push_shared(&data, 0..20 << 10);
        assert_eq!(queue.held(), data.len());
        let small = Rc::new(vec![7; COPY_MAX]);
        queue.push_shared(&small, 0..1024);
        assert_eq!(queue.held(), data.len() + 1024);
    }

    #[test]
    fn everything_arrives_in_order_through_a_small_socket() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        let large = Rc::new((0..1_000_000u32).map(|i| (i % 251) as u8).collect::<Vec<u8>>());
        let (mut queue, mut expected) = (SendQueue::default(), Vec::new());
        for round in 0..5usize {
            queue.push(&[round as u8; 100]);
            expected.extend_from_slice(&[round as u8; 100]);
            queue.push_shared(&large, round..large.len() - round);
            expected.extend_from_slice(&large[round..large.len() - round]);
        }
        assert_eq!(queue.bytes(), expected.len());
        let (mut got, mut buffer) = (Vec::new(), vec![0; 70_000]);
        while got.len() < expected.len() {
            queue.write_to(ours.as_fd()).expect("writes");
            let read = theirs.read(&mut buffer).expect("reads");
            got.extend_from_slice(&buffer[..read]);
        }
        assert!(got == expected && queue.is_empty());
        assert!(queue.write_to(ours.as_fd()).expect("writes nothing"));
        drop(theirs);
        queue.push(b"x");
        assert!(queue.write_to(ours.as_fd()).is_err());
    }
}
