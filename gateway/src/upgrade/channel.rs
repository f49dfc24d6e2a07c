//! The socket between the old and the new process: packets with descriptors, each whole or not at all.
//!
//! Called by both sides of a take-over. Must not know what is said. `bounded`: packets and descriptors have limits, and what is
//! beyond them ends the conversation.

use super::message::{Message, MessageError, PACKET_BYTES_MAX};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Most descriptors beside one message: what Linux takes (SCM_MAX_FD).
pub(crate) const FDS_MAX: usize = 253;
/// Longest wait for the other process to take a message: guests wait for one that hangs, and this one goes with it.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// Why a conversation can not go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    /// The other process has ended, or let go of its end.
    #[error("the other process has closed its end")]
    Closed,
    #[error("socket failed: error={0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Message(#[from] MessageError),
    /// Longer than a message may be, or with more descriptors than were to come.
    #[error("message is larger than it may be")]
    Large,
    #[error("message at the wrong time: expected={expected} came={came}")]
    Order { expected: &'static str, came: &'static str },
    /// Other descriptors than the message says.
    #[error("descriptors do not fit the message: message={message} descriptors={count}")]
    Descriptors { message: &'static str, count: usize },
}

/// One end.
#[derive(Debug)]
pub(crate) struct Channel {
    /// Of packets, whatever its type says: it is used for waiting only.
    socket: UnixStream,
}

impl Channel {
    /// Two ends; the second is for another process.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self::over(ours)?, theirs))
    }

    /// The end that this process was given.
    ///
    /// # Errors
    /// If it is no such socket.
    pub(crate) fn over(socket: OwnedFd) -> io::Result<Self> {
        if rustix::net::sockopt::socket_type(&socket)? != SocketType::SEQPACKET {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a socket for packets"));
        }
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UnixStream::from_std(socket)? })
    }

    /// Sends a message and, beside it, descriptors; waits while the other side has enough to read.
    ///
    /// # Errors
    /// If the other side is gone.
    pub(crate) async fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let packet = message.encode();
        let sending = self.socket.async_io(Interest::WRITABLE, || send(self.socket.as_fd(), &packet, fds));
        match tokio::time::timeout(SEND_LIMIT, sending).await {
            Ok(sent) => sent.map_err(ended),
            Err(_) => Err(ended(io::ErrorKind::TimedOut.into())),
        }
    }

    /// Sends a message if the other side can take it at once: it is told, or has not heard of it.
    ///
    /// # Errors
    /// If the other side is gone, or has not read what it was sent before.
    pub(crate) fn send_now(&self, message: &Message) -> Result<(), ChannelError> {
        send(self.socket.as_fd(), &message.encode(), &[]).map_err(ended)
    }

    /// The next message and what came beside it.
    ///
    /// # Errors
    /// If the other side is gone, or does not speak as agreed.
    pub(crate) async fn receive(&self) -> Result<(Message, Vec<OwnedFd>), ChannelError> {
        let mut packet = vec![0; PACKET_BYTES_MAX + 1];
        let received =
            self.socket.async_io(Interest::READABLE, || Ok(receive(self.socket.as_fd(), &mut packet)?)).await;
        let (bytes, whole, fds) = received.map_err(ended)?;
        match bytes {
            0 => Err(ChannelError::Closed),
            _ if !whole || bytes > PACKET_BYTES_MAX => Err(ChannelError::Large),
            _ => Ok((Message::decode(&packet[..bytes])?, fds)),
        }
    }

    /// The next message, which must come without descriptors.
    ///
    /// # Errors
    /// As [`Channel::receive`].
    pub(crate) async fn hear(&self) -> Result<Message, ChannelError> {
        let (message, fds) = self.receive().await?;
        match fds.len() {
            0 => Ok(message),
            count => Err(ChannelError::Descriptors { message: message.name(), count }),
        }
    }
}

fn ended(error: io::Error) -> ChannelError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ChannelError::Closed,
        _ => error.into(),
    }
}

fn send(socket: BorrowedFd<'_>, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    // A packet is sent as a whole.
    sendmsg(socket, &[IoSlice::new(packet)], &mut control, flags)?;
    Ok(())
}

/// Bytes of the packet, whether it is whole with all that came beside it, and that.
fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> Result<(usize, bool, Vec<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            fds.extend(came);
        }
    }
    let whole = !received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok((received.bytes, whole, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_come_whole_and_with_what_is_theirs() {
        let (ours, theirs) = Channel::pair().expect("opens");
        let raw = theirs.try_clone().expect("a descriptor");
        let theirs = Channel::over(theirs).expect("a socket for packets");
        ours.send(&Message::Prepare { sessions: 1 }, &[]).await.expect("sends");
        ours.send(&Message::Commit, &[raw.as_fd(), raw.as_fd()]).await.expect("sends");
        assert_eq!(theirs.hear().await.expect("comes"), Message::Prepare { sessions: 1 });
        let (message, fds) = theirs.receive().await.expect("comes");
        assert_eq!((message, fds.len()), (Message::Commit, 2));
        drop(fds);

        // What a broken child may say.
        theirs.send(&Message::Proven, &[raw.as_fd()]).await.expect("sends");
        assert!(matches!(ours.hear().await, Err(ChannelError::Descriptors { .. })));
        rustix::net::send(&raw, b"hello?", SendFlags::empty()).expect("sends");
        assert!(matches!(ours.hear().await, Err(ChannelError::Message(MessageError::Magic { bytes: 6 }))));
        rustix::net::send(&raw, &[b'S'; PACKET_BYTES_MAX + 9], SendFlags::empty()).expect("sends");
        assert!(matches!(ours.hear().await, Err(ChannelError::Large)));
        drop((raw, theirs));
        assert!(matches!(ours.hear().await, Err(ChannelError::Closed)));
        assert!(matches!(ours.send(&Message::Commit, &[]).await, Err(ChannelError::Closed)));
        let (stream, _) = std::os::unix::net::UnixStream::pair().expect("opens");
        assert!(Channel::over(stream.into()).is_err(), "a stream has no packets");
    }

    #[tokio::test]
    async fn a_reader_that_does_not_read_makes_the_writer_wait() {
        let (ours, theirs) = Channel::pair().expect("opens");
        let theirs = Channel::over(theirs).expect("a socket for packets");
        let flood = tokio::spawn(async move {
            for sessions in 0..10_000 {
                ours.send(&Message::Prepare { sessions }, &[]).await.expect("sends");
            }
        });
        for sessions in 0..10_000 {
            assert_eq!(theirs.hear().await.expect("comes"), Message::Prepare { sessions });
        }
        flood.await.expect("no panic");
    }
}
