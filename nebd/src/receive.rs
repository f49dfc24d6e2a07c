//! Reading from sockets: small messages through one shared buffer, large payloads straight to where they stay.
//!
//! Called by `nbd::connection` and `link`. Must not know: what the bytes mean.

use crate::area::Buffer;
use crate::vectored::Incoming;
use rustix::io::Errno;
use std::io;
use std::os::fd::BorrowedFd;

/// Bytes of the shared buffer: 64 requests of 4 KiB in one read.
pub const SCRATCH_BYTES: usize = 256 << 10;
/// Reads from one socket before the others get their turn.
pub const READS_PER_TURN: usize = 4;
/// Payloads of which at least so many bytes are missing, and which came alone, are read to where they stay; what is smaller comes
/// through the shared buffer, many in one read.
pub const DIRECT_MIN: usize = 32 << 10;

/// What a read brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Received {
    /// This many bytes are there.
    Bytes {
        /// Valid bytes, from the front of the buffer.
        count: usize,
        /// The socket had no more.
        drained: bool,
    },
    /// Nothing to read now.
    Nothing,
    /// The other side will send no more.
    Closed,
}

/// Reads behind what is left over of the last read. Afterwards the front of `scratch` holds `partial` and the new
/// bytes, and `partial` is empty.
///
/// # Errors
/// Those of read.
pub fn read_after(socket: BorrowedFd<'_>, partial: &mut Vec<u8>, scratch: &mut [u8]) -> io::Result<Received> {
    let kept = partial.len();
    let Some(free) = scratch.get_mut(kept..).filter(|free| !free.is_empty()) else {
        // Left-overs are parts of one message header; a full buffer of them is a defect of the caller.
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message header larger than the buffer"));
    };
    let offered = free.len();
    match retry(|| Ok(rustix::io::read(socket, &mut *free)?)) {
        Ok(0) => Ok(Received::Closed),
        Ok(new) => {
            scratch[..kept].copy_from_slice(partial);
            partial.clear();
            Ok(Received::Bytes { count: kept + new, drained: new < offered })
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
        Err(error) => Err(error),
    }
}

/// Reads what is missing of `payload` behind its first `have` bytes, as far as it has come, and what comes behind it into
/// `scratch`. Answers how many bytes went into the payload, and what `scratch` holds.
///
/// # Errors
/// Those of readv.
pub fn read_direct(
    socket: BorrowedFd<'_>,
    (payload, have): (&Buffer, usize),
    scratch: &mut [u8],
) -> io::Result<(usize, Received)> {
    let read = || {
        let mut incoming = Incoming::new();
        let whole = incoming.push_buffer(payload, have..payload.length());
        let wanted = incoming.bytes();
        if whole {
            incoming.push(&mut *scratch);
        }
        let offered = incoming.bytes();
        incoming.receive(socket).map(|got| (got, wanted, offered))
    };
    match retry(read) {
        Ok((0, ..)) => Ok((0, Received::Closed)),
        Ok((got, wanted, offered)) => {
            let count = got.saturating_sub(wanted);
            Ok((got - count, Received::Bytes { count, drained: got < offered }))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok((0, Received::Nothing)),
        Err(error) => Err(error),
    }
}

fn retry<T>(mut read: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match read() {
            Err(error) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::area::Area;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn left_overs_come_first_and_payloads_go_straight() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        let (mut scratch, mut partial) = ([0; 64], b"ab".to_vec());
        assert_eq!(read_after(ours.as_fd(), &mut partial, &mut scratch).expect("reads"), Received::Nothing);
        assert_eq!(partial, b"ab");
        theirs.write_all(b"cdefgh").expect("writes");
        let got = read_after(ours.as_fd(), &mut partial, &mut scratch[..4]).expect("reads");
        assert_eq!((got, &scratch[..4]), (Received::Bytes { count: 4, drained: false }, &b"abcd"[..]));
        let area = Area::create(1 << 20).expect("creates");
        let payload = area.take(4).expect("fits");
        payload.write(0, b">");
        let got = read_direct(ours.as_fd(), (&payload, 1), &mut scratch).expect("reads");
        assert_eq!(got, (3, Received::Bytes { count: 1, drained: true }));
        assert_eq!((&payload.to_vec()[..], scratch[0]), (&b">efg"[..], b'h'));
        let got = read_direct(ours.as_fd(), (&payload, 1), &mut scratch).expect("reads");
        assert_eq!(got, (0, Received::Nothing));
        drop(theirs);
        assert_eq!(read_after(ours.as_fd(), &mut partial, &mut scratch).expect("reads"), Received::Closed);
        let got = read_direct(ours.as_fd(), (&payload, 0), &mut scratch).expect("reads");
        assert_eq!(got, (0, Received::Closed));
    }
}
