//! Bytes of a link's socket together with descriptors.
//!
//! Called by both sides' links. Descriptors that nobody asked for are closed. `bounded`: at most [`FDS_MAX`] come with one call.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Descriptors that come with one call: those of a ring, or of a few regions. Linux takes 253.
pub const FDS_MAX: usize = 32;

/// Sends bytes, the descriptors with the first of them; answers how many bytes the socket took. If it took any, it took all
/// descriptors.
///
/// # Errors
/// Those of sendmsg(2); `WouldBlock` if there is no room.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if fds.len() > FDS_MAX || (!fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds))) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?)
}

/// Reads what has come, and appends the descriptors that came with it to `fds`; at most [`FDS_MAX`], more are closed. 0 is the
/// end of the stream.
///
/// # Errors
/// Those of recvmsg(2); `WouldBlock` if nothing has come.
pub fn receive(socket: BorrowedFd<'_>, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            fds.extend(came);
        }
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn descriptors_come_with_the_first_byte_of_their_message() {
        let (ours, theirs) = UnixStream::pair().expect("opens");
        let (passed, mut kept) = UnixStream::pair().expect("opens");
        assert_eq!(send(ours.as_fd(), b"plain", &[]).expect("sends"), 5);
        assert_eq!(send(ours.as_fd(), b"with", &[passed.as_fd(), ours.as_fd()]).expect("sends"), 4);
        let (mut bytes, mut fds) = ([0; 64], Vec::new());
        let mut have = receive(theirs.as_fd(), &mut bytes, &mut fds).expect("came");
        while have < 9 {
            have += receive(theirs.as_fd(), &mut bytes[have..], &mut fds).expect("came");
        }
        assert_eq!((&bytes[..9], fds.len()), (&b"plainwith"[..], 2));
        drop(passed);
        std::io::Write::write_all(&mut UnixStream::from(fds.remove(0)), b"x")
            .expect("it is the one that was passed");
        assert_eq!(std::io::Read::read(&mut kept, &mut bytes).expect("reads"), 1);
        assert_eq!(
            receive(theirs.as_fd(), &mut bytes, &mut fds).map_err(|error| error.kind()),
            Err(io::ErrorKind::WouldBlock)
        );
        assert!(send(ours.as_fd(), b"x", &[ours.as_fd(); FDS_MAX + 1]).is_err());
    }
}
