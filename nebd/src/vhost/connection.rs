//! One front-end's connection: bytes and descriptors of a unix socket, cut into messages.
//!
//! Called by `control`. Must not know: what the messages mean. `bounded`: one message is held on its way in, at most
//! [`UNSENT_MAX`] bytes of replies on their way out. Descriptors nobody asked for are closed, here or by whoever judges the message.

use super::message::{DESCRIPTORS_MAX, HEADER_BYTES, Header, MessageError, Reply};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use thiserror::Error;

/// Replies that a front-end has not read, bytes: it waits for each, so more means that it reads none.
pub const UNSENT_MAX: usize = 64 << 10;

/// Why a connection is closed.
#[derive(Debug, Error)]
pub enum Closed {
    /// The front-end closed it between two messages.
    #[error("front-end closed the connection")]
    Gone,
    /// The front-end closed it inside a message.
    #[error("front-end closed the connection inside a message")]
    Torn,
    /// The socket failed.
    #[error("socket failed: {0}")]
    Io(#[from] io::Error),
    /// A header after which nothing can be understood.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// More descriptors than any message brings.
    #[error("too many descriptors with one message: limit={DESCRIPTORS_MAX}")]
    Descriptors,
    /// It does not read what it is sent.
    #[error("front-end reads no replies: unsent_bytes={0}")]
    Deaf(usize),
}

/// A whole message as it came.
#[derive(Debug)]
pub struct Received {
    /// Its header.
    pub header: Header,
    /// What follows it.
    pub payload: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

/// A reply on its way out.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// Goes with the first byte.
    fd: Option<OwnedFd>,
}

/// The connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    /// The message on its way in: what has come of it so far.
    partial: Vec<u8>,
    fds: Vec<OwnedFd>,
    out: VecDeque<Outgoing>,
}

impl Connection {
    /// Over a non-blocking unix stream socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, partial: Vec::new(), fds: Vec::new(), out: VecDeque::new() }
    }

    /// The socket, to be watched.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether replies wait for the socket to take them.
    pub fn is_behind(&self) -> bool {
        !self.out.is_empty()
    }

    /// Takes the next message; `None` if not all of it has come.
    ///
    /// # Errors
    /// The connection is to be closed.
    pub fn receive(&mut self) -> Result<Option<Received>, Closed> {
        loop {
            // Never past the message's end, so that descriptors come with the message that they belong to.
            let header = match self.partial.first_chunk::<HEADER_BYTES>() {
                Some(head) => Some(Header::parse(head)?),
                None => None,
            };
            let wanted = HEADER_BYTES + header.map_or(0, |header| header.payload as usize);
            match header {
                Some(header) if self.partial.len() == wanted => {
                    let payload = self.partial.split_off(HEADER_BYTES);
                    self.partial.clear();
                    return Ok(Some(Received { header, payload, fds: std::mem::take(&mut self.fds) }));
                }
                _ if !self.read(wanted)? => return Ok(None),
                _ => {}
            }
        }
    }

    /// Reads until `partial` has `wanted` bytes at most. False if nothing was there.
    fn read(&mut self, wanted: usize) -> Result<bool, Closed> {
        let have = self.partial.len();
        self.partial.resize(wanted, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let result = {
            let mut slices = [IoSliceMut::new(&mut self.partial[have..])];
            recvmsg(&self.socket, &mut slices, &mut ancillary, flags)
        };
        let received = result.as_ref().map_or(0, |received| received.bytes);
        self.partial.truncate(have + received);
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        match result {
            Ok(received) if received.flags.contains(ReturnFlags::CTRUNC) => Err(Closed::Descriptors),
            Ok(_) if self.fds.len() > DESCRIPTORS_MAX => Err(Closed::Descriptors),
            Ok(_) if received == 0 && have == 0 => Err(Closed::Gone),
            Ok(_) if received == 0 => Err(Closed::Torn),
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(Errno::INTR) => Ok(true),
            Err(Errno::CONNRESET) => Err(Closed::Gone),
            Err(error) => Err(Closed::Io(error.into())),
        }
    }

    /// Puts a reply behind the others; [`flush`](Self::flush) sends it.
    pub fn reply(&mut self, reply: Reply) {
        let (bytes, fd) = reply.encode();
        self.out.push_back(Outgoing { bytes, sent: 0, fd });
    }

    /// Sends what the socket takes.
    ///
    /// # Errors
    /// The connection is to be closed.
    pub fn flush(&mut self) -> Result<(), Closed> {
        while let Some(first) = self.out.front_mut() {
            match send(self.socket.as_fd(), &first.bytes[first.sent..], first.fd.as_ref()) {
                Ok(sent) => {
                    first.fd = None;
                    first.sent += sent;
                    if first.sent == first.bytes.len() {
                        self.out.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let unsent = self.out.iter().map(|outgoing| outgoing.bytes.len() - outgoing.sent).sum();
                    return if unsent > UNSENT_MAX { Err(Closed::Deaf(unsent)) } else { Ok(()) };
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Closed::Gone),
                Err(error) => return Err(Closed::Io(error.into())),
            }
        }
        Ok(())
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<&OwnedFd>) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
}

#[cfg(test)]
mod tests;
