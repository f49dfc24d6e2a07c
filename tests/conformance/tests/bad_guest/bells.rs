//! Descriptors that are no eventfds, or eventfds in a bad way: at worst the guest is not told.

use spline_conformance::guest::message::request;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, Piece, header, kind};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

fn give(guest: &Guest, request: u32, fd: BorrowedFd<'_>) -> anyhow::Result<()> {
    guest.raw.verdict(request, &0u64.to_le_bytes(), &[fd]).map(drop)
}

/// Asks for something; whether it is served is the guest's own fault.
fn ask(guest: &mut Guest) -> anyhow::Result<()> {
    for _ in 0..4 {
        guest.ask(0, &[Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)])?;
    }
    Ok(())
}

#[test]
fn a_full_counter_that_would_block() -> anyhow::Result<()> {
    play(|stage| {
        for request in [request::SET_VRING_CALL, request::SET_VRING_ERR] {
            let mut guest = stage.guest()?;
            let full = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
            rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes())?;
            give(&guest, request, full.as_fd())?;
            ask(&mut guest)?;
            guest.offer(0, 9999)?;
            // If a thread hung in it, the next guest would not be served.
            drop(guest);
            stage.works(false)?;
        }
        Ok(())
    })
}

#[test]
fn files_pipes_and_sockets() -> anyhow::Result<()> {
    play(|stage| {
        let (reader, writer) = std::io::pipe()?;
        let (socket, other) = std::os::unix::net::UnixStream::pair()?;
        let (null, zero) =
            (File::options().read(true).write(true).open("/dev/null")?, File::open("/dev/zero")?);
        drop(other);
        for request in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
            for fd in [reader.as_fd(), writer.as_fd(), socket.as_fd(), null.as_fd(), zero.as_fd()] {
                let mut guest = stage.guest()?;
                give(&guest, request, fd)?;
                let _ = ask(&mut guest);
                let _ = guest.offer(0, 9999);
            }
        }
        stage.works(false)
    })
}
