//! vhost-user messages byte by byte (QEMU, docs/interop/vhost-user), with any descriptors beside them.

use super::PATIENCE;
use anyhow::{Context, bail, ensure};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// Requests.
pub mod request {
    #![allow(missing_docs)]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Version 1, no flags.
pub const PLAIN: u32 = 1;
/// Version 1, the sender wants a reply.
pub const NEED_REPLY: u32 = 1 | 8;
/// Version 1, a reply.
pub const REPLY: u32 = 1 | 4;
/// Descriptors in one message at most: what Linux takes (SCM_MAX_FD).
const FDS_MAX: usize = 253;
/// After this long the connection of a test is cut, so that a device that never answers fails the test instead of holding it.
const HUNG: Duration = Duration::from_secs(120);

/// What became of a message that wanted an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It was carried out.
    Accepted,
    /// The device answered with an error.
    Refused,
    /// The device closed the connection.
    Closed,
}

/// A connection.
#[derive(Debug)]
pub struct Raw {
    stream: UnixStream,
    // Dropped first of all that the watch looks at.
    _alive: mpsc::Sender<()>,
}

/// A message.
pub fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = body.len() as u32;
    [&request.to_le_bytes()[..], &flags.to_le_bytes(), &size.to_le_bytes(), body].concat()
}

/// A body of 32-bit numbers.
pub fn u32s(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A body of 64-bit numbers.
pub fn u64s(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

impl Raw {
    /// Connects.
    ///
    /// # Errors
    /// If nobody listens.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let watched = stream.try_clone()?;
        let (alive, watch) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            if watch.recv_timeout(HUNG) == Err(RecvTimeoutError::Timeout) {
                let _ = watched.shutdown(std::net::Shutdown::Both);
            }
        });
        Ok(Self { stream, _alive: alive })
    }

    /// The same connection.
    ///
    /// # Errors
    /// Those of the system.
    pub fn stream(&self) -> anyhow::Result<UnixStream> {
        Ok(self.stream.try_clone()?)
    }

    /// Sends bytes, and descriptors with the first of them.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut beside = SendAncillaryBuffer::new(&mut room);
        ensure!(fds.is_empty() || beside.push(SendAncillaryMessage::ScmRights(fds)), "too many descriptors");
        let mut sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL)?;
        while sent < bytes.len() {
            let mut nothing = SendAncillaryBuffer::new(&mut []);
            sent +=
                sendmsg(&self.stream, &[IoSlice::new(&bytes[sent..])], &mut nothing, SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    /// Sends a message that wants no answer.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn say(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        self.send(&message(request, PLAIN, body), fds)
    }

    /// Sends a message and answers the body of the reply; descriptors beside it are closed.
    ///
    /// # Errors
    /// If it is a reply to something else, or none comes.
    pub fn call(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> anyhow::Result<Vec<u8>> {
        self.send(&message(request, PLAIN, body), fds)?;
        self.reply(request)
    }

    /// The next reply, which must be to this request.
    ///
    /// # Errors
    /// If it is not.
    pub fn reply(&self, request: u32) -> anyhow::Result<Vec<u8>> {
        let mut head = [0; 12];
        (&self.stream).read_exact(&mut head).context("no reply")?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        ensure!(word(0) == request && word(4) == REPLY, "not a reply to {request}: {head:x?}");
        ensure!(word(8) <= 4096, "a long reply: {head:x?}");
        let mut body = vec![0; word(8) as usize];
        (&self.stream).read_exact(&mut body).context("half a reply")?;
        Ok(body)
    }

    /// Sends a message that wants an answer, and says what became of it.
    ///
    /// # Errors
    /// If what comes is no answer.
    pub fn verdict(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> anyhow::Result<Verdict> {
        let sent = self.send(&message(request, NEED_REPLY, body), fds);
        if let Err(error) = sent {
            let cut = error
                .downcast_ref::<Errno>()
                .is_some_and(|errno| matches!(*errno, Errno::PIPE | Errno::CONNRESET));
            return if cut { Ok(Verdict::Closed) } else { Err(error) };
        }
        let mut head = [0; 12];
        match (&self.stream).read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                return Ok(Verdict::Closed);
            }
            Err(error) => bail!("no answer to {request}: {error}"),
        }
        let size = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
        ensure!(head[..8] == u32s(&[request, REPLY])[..] && size <= 4096, "not an answer: {head:x?}");
        let mut body = vec![0; size as usize];
        (&self.stream).read_exact(&mut body).context("half a reply")?;
        Ok(if size == 8 && body != [0; 8] { Verdict::Refused } else { Verdict::Accepted })
    }

    /// The device closes the connection, whatever it says before.
    ///
    /// # Errors
    /// If it stays.
    pub fn closed(&self) -> anyhow::Result<()> {
        let mut said = [0; 4096];
        loop {
            match (&self.stream).read(&mut said) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => bail!("should have closed: {error}"),
            }
        }
    }
}
