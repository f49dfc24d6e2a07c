//! Reading from sockets: small messages through one shared buffer, large payloads straight into their own.
//!
//! Called by `nbd::connection` and `link`. Must not know: what the bytes mean.

use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use std::io;
use std::os::fd::BorrowedFd;

/// Bytes of the shared buffer: 64 requests of 4 KiB in one read.
pub const SCRATCH_BYTES: usize = 256 << 10;
/// Reads from one socket before the others get their turn.
pub const READS_PER_TURN: usize = 4;

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
    match retry(|| rustix::io::read(socket, &mut *free)) {
        Ok(0) => Ok(Received::Closed),
        Ok(new) => {
            scratch[..kept].copy_from_slice(partial);
            partial.clear();
            Ok(Received::Bytes { count: kept + new, drained: new < offered })
        }
        Err(Errno::AGAIN) => Ok(Received::Nothing),
        Err(error) => Err(error.into()),
    }
}

/// Reads the `missing` bytes of `payload`, as far as they have come. Should its allocation be larger than asked for,
/// what was read too far is put into `partial`. `count` is the payload's new length.
///
/// # Errors
/// Those of read.
pub fn read_payload(
    socket: BorrowedFd<'_>,
    payload: &mut Vec<u8>,
    missing: usize,
    partial: &mut Vec<u8>,
) -> io::Result<Received> {
    let end = payload.len() + missing;
    payload.reserve_exact(missing);
    match retry(|| rustix::io::read(socket, spare_capacity(payload))) {
        Ok(0) => Ok(Received::Closed),
        Ok(new) => {
            if payload.len() > end {
                partial.extend_from_slice(&payload[end..]);
                payload.truncate(end);
            }
            Ok(Received::Bytes { count: payload.len(), drained: new < missing })
        }
        Err(Errno::AGAIN) => Ok(Received::Nothing),
        Err(error) => Err(error.into()),
    }
}

fn retry(mut read: impl FnMut() -> rustix::io::Result<usize>) -> rustix::io::Result<usize> {
    loop {
        match read() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let mut payload = Vec::with_capacity(100);
        payload.push(b'>');
        let got = read_payload(ours.as_fd(), &mut payload, 3, &mut partial).expect("reads");
        assert_eq!((got, &payload[..]), (Received::Bytes { count: 4, drained: false }, &b">efg"[..]));
        assert_eq!(partial, b"h", "what was read too far is kept");
        drop(theirs);
        assert_eq!(read_after(ours.as_fd(), &mut partial, &mut scratch).expect("reads"), Received::Closed);
    }
}
