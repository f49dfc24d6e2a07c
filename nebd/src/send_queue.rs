//! Bytes on their way to one socket: small pieces are put together, data of requests stays where it is, one writev sends many.
//!
//! Called by `nbd::connection` and `link`. Must not know: what the bytes mean. The caller bounds it by looking at
//! [`SendQueue::bytes`] (`bounded`).

use crate::area::Buffer;
use crate::vectored::Outgoing;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

/// Parts of buffers up to this size, bytes, are copied: that is cheaper than a page that is kept for them.
const COPY_MAX: usize = 1 << 10;
/// Memory of copied pieces that is kept to be used again, bytes.
const KEPT_BYTES: usize = 256 << 10;

#[derive(Debug)]
enum Part {
    /// The next bytes of `own`.
    Own(usize),
    Shared(Rc<Buffer>, Range<usize>),
}

impl Part {
    fn shared(&self) -> Option<&Rc<Buffer>> {
        match self {
            Self::Own(_) => None,
            Self::Shared(data, _) => Some(data),
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
    /// Copied pieces, one behind the other; the first `own_sent` bytes are sent.
    own: Vec<u8>,
    own_sent: usize,
    bytes: usize,
    /// Memory of the parts, bytes: a shared buffer counts whole, once, until nothing of it is left to send.
    held: usize,
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
        self.own.extend_from_slice(data);
        self.pushed(data.len());
    }

    /// Appends a part of `data` without copying it, unless the buffer is small: copies of some parts beside a buffer that
    /// is kept for others would take up to twice its memory. Parts of one buffer follow each other.
    pub fn push_buffer(&mut self, data: &Rc<Buffer>, range: Range<usize>) {
        if data.length() <= COPY_MAX {
            let (at, length) = (self.own.len(), range.len());
            self.own.resize(at + length, 0);
            data.read(range.start, &mut self.own[at..]);
            return self.pushed(length);
        }
        if range.is_empty() {
            return;
        }
        self.bytes += range.len();
        if !self.parts.iter().rev().find_map(Part::shared).is_some_and(|last| Rc::ptr_eq(last, data)) {
            self.held += data.held();
        }
        self.parts.push_back(Part::Shared(Rc::clone(data), range));
    }

    /// `length` bytes were appended to `own`.
    fn pushed(&mut self, length: usize) {
        self.bytes += length;
        self.held += length;
        match self.parts.back_mut() {
            _ if length == 0 => {}
            Some(Part::Own(last)) => *last += length,
            _ => self.parts.push_back(Part::Own(length)),
        }
    }

    /// Sends what the socket takes. Answers whether everything is sent.
    ///
    /// # Errors
    /// Those of writev, but not `EAGAIN`: that is "not everything".
    pub fn write_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while self.bytes > 0 {
            let outgoing = self.gather();
            let offered = outgoing.bytes();
            match outgoing.send(socket) {
                Ok(sent) => {
                    self.advance(sent);
                    if sent < offered {
                        return Ok(false);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// What fits one call.
    fn gather(&self) -> Outgoing<'_> {
        let mut outgoing = Outgoing::new();
        let mut own = &self.own[self.own_sent..];
        for part in &self.parts {
            let fitted = match part {
                Part::Own(length) => {
                    let (front, rest) = own.split_at(*length);
                    own = rest;
                    outgoing.push(front)
                }
                Part::Shared(data, range) => outgoing.push_buffer(data, range.clone()),
            };
            if !fitted {
                break;
            }
        }
        outgoing
    }

    /// Gives memory back; what is not sent stays.
    pub fn shrink(&mut self) {
        self.drop_sent();
        self.own.shrink_to_fit();
        self.parts.shrink_to_fit();
    }

    /// Takes everything out, for tests of what would be sent.
    #[cfg(test)]
    pub fn take(&mut self) -> Vec<u8> {
        let (mut all, mut own) = (Vec::new(), &self.own[self.own_sent..]);
        for part in &self.parts {
            match part {
                Part::Own(length) => {
                    let (front, rest) = own.split_at(*length);
                    own = rest;
                    all.extend_from_slice(front);
                }
                Part::Shared(data, range) => all.extend_from_slice(&data.to_vec()[range.clone()]),
            }
        }
        *self = Self::default();
        all
    }

    fn advance(&mut self, mut sent: usize) {
        self.bytes -= sent;
        while let Some(part) = self.parts.front_mut() {
            let left = match part {
                Part::Own(length) => {
                    let taken = sent.min(*length);
                    (*length, self.own_sent, self.held) =
                        (*length - taken, self.own_sent + taken, self.held - taken);
                    sent -= taken;
                    *length
                }
                Part::Shared(_, range) => {
                    let taken = sent.min(range.len());
                    (range.start, sent) = (range.start + taken, sent - taken);
                    range.len()
                }
            };
            if left > 0 {
                break;
            }
            if let Some(Part::Shared(data, _)) = self.parts.pop_front() {
                let next = self.parts.iter().find_map(Part::shared);
                if !next.is_some_and(|next| Rc::ptr_eq(next, &data)) {
                    self.held -= data.held();
                }
            }
        }
        // What is moved is never more than what was sent.
        if self.own_sent >= self.own.len() / 2 {
            self.drop_sent();
        }
    }

    fn drop_sent(&mut self) {
        self.own.drain(..self.own_sent);
        self.own_sent = 0;
        if self.own.is_empty() && self.own.capacity() > KEPT_BYTES {
            self.own = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::area::Area;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn buffer(length: usize) -> Rc<Buffer> {
        let buffer = Area::create(64 << 20).expect("creates").take(length).expect("fits");
        let bytes: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
        buffer.write(0, &bytes);
        Rc::new(buffer)
    }

    #[test]
    fn a_buffer_is_held_until_nothing_of_it_is_left_to_send() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        let (mut queue, size) = (SendQueue::default(), 8 << 20);
        let data = buffer(size);
        queue.push(b"head");
        queue.push_buffer(&data, 0..1 << 20);
        queue.push(b"hole");
        queue.push_buffer(&data, size - (1 << 20)..size);
        assert_eq!((queue.bytes(), queue.held()), ((2 << 20) + 8, size + 8));
        let mut buffer = vec![0; 4096];
        while !queue.write_to(ours.as_fd()).expect("writes") {
            assert!(queue.held() >= size, "unsent={} held={}", queue.bytes(), queue.held());
            assert!(theirs.read(&mut buffer).expect("reads") > 0);
        }
        assert_eq!((queue.bytes(), queue.held()), (0, 0));
        assert_eq!(Rc::strong_count(&data), 1);
    }

    #[test]
    fn many_parts_of_a_buffer_hold_it_once() {
        let mut queue = SendQueue::default();
        let data = buffer(1 << 20);
        for start in (0..data.length()).step_by(20 << 10) {
            queue.push_buffer(&data, start..(start + (16 << 10)).min(data.length()));
        }
        queue.push_buffer(&data, 0..20 << 10);
        assert_eq!(queue.held(), data.length());
        let small = buffer(COPY_MAX);
        queue.push_buffer(&small, 0..100);
        assert_eq!((queue.held(), Rc::strong_count(&small)), (data.length() + 100, 1));
    }

    #[test]
    fn everything_arrives_in_order_through_a_small_socket() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        let (large, small) = (buffer(1_000_000), buffer(700));
        let bytes = large.to_vec();
        let (mut queue, mut expected) = (SendQueue::default(), Vec::new());
        for round in 0..200usize {
            queue.push(&[round as u8; 100]);
            expected.extend_from_slice(&[round as u8; 100]);
            let part = if round < 5 { round..bytes.len() - round } else { round..round + 5000 };
            queue.push_buffer(&large, part.clone());
            expected.extend_from_slice(&bytes[part]);
            queue.push_buffer(&small, 3..700);
            expected.extend_from_slice(&bytes[3..700]);
        }
        assert_eq!(queue.bytes(), expected.len());
        let (mut got, mut buffer) = (Vec::new(), vec![0; 70_000]);
        while got.len() < expected.len() {
            queue.write_to(ours.as_fd()).expect("writes");
            let read = theirs.read(&mut buffer).expect("reads");
            got.extend_from_slice(&buffer[..read]);
        }
        assert!(got == expected && queue.is_empty() && queue.held() == 0);
        assert!(queue.write_to(ours.as_fd()).expect("writes nothing"));
        drop(theirs);
        queue.push(b"x");
        assert!(queue.write_to(ours.as_fd()).is_err());
    }
}
