//! A front-end that asks and asks and never reads an answer: what nebd holds for it is bounded, and only it waits.

use anyhow::ensure;
use spline_conformance::guest::message::{PLAIN, Raw, message, request};
use spline_conformance::guest::stage::play;
use std::io::{ErrorKind, Write};

#[test]
fn is_bounded() -> anyhow::Result<()> {
    play(|stage| {
        let raw = Raw::connect(stage.socket())?;
        let batch = message(request::GET_FEATURES, PLAIN, &[]).repeat(4096);
        let mut stream = raw.stream()?;
        stream.set_nonblocking(true)?;
        let (mut sent, mut full) = (0, 0);
        let mut neighbour = stage.neighbour()?;
        // Full again and again while the neighbour is served: it is the device that does not take it.
        while full < 20 && sent < 64 << 20 {
            match stream.write(&batch[sent % 12..]) {
                Ok(bytes) => (sent, full) = (sent + bytes, 0),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    full += 1;
                    neighbour.read(0, 512)?;
                }
                // It may be cut, too.
                Err(_) => return Ok(()),
            }
        }
        ensure!(sent < 8 << 20, "answered without end: bytes={sent}");
        Ok(())
    })
}
