//! A client that asks and asks and never reads an answer: what nebd holds for it is bounded, and only it waits.

use anyhow::ensure;
use spline_conformance::raw::{Raw, cmd, opt, option, request};
use spline_conformance::stage::{DISK, Stage, play_on};
use std::io::Write;
use std::os::unix::net::UnixStream;

/// What all connections may hold together, 64 MiB, and what the allocator leaves over.
const GROWTH_KIB: u64 = 80 << 10;
/// Clients that never read, at once: alone each could hold 52 MiB.
const CLIENTS: usize = 12;

/// Sends until the server takes no more; answers the bytes that it took.
fn flood(stage: &Stage, prefix: &[u8], message: &[u8], most: usize) -> anyhow::Result<(UnixStream, usize)> {
    let mut stream = UnixStream::connect(stage.socket())?;
    stream.write_all(prefix)?;
    stream.set_nonblocking(true)?;
    let (mut sent, mut full) = (0, 0);
    let batch = message.repeat(1 + 65_536 / message.len());
    // Full again and again while another connection is served: it is the server that does not take it.
    while full < 20 && sent < most {
        match stream.write(&batch[sent % message.len()..]) {
            Ok(bytes) => (sent, full) = (sent + bytes, 0),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                full += 1;
                stage.works()?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok((stream, sent))
}

/// Client flags and EXPORT_NAME of the default export.
fn enter() -> Vec<u8> {
    [&3u32.to_be_bytes()[..], &option(opt::EXPORT_NAME, &[])].concat()
}

#[test]
fn large_reads() -> anyhow::Result<()> {
    play_on(&|rig| rig.serve("disk", DISK), GROWTH_KIB, |stage| {
        let read = request(cmd::READ, 0, 1, (0, 8 << 20));
        let (stream, sent) = flood(stage, &enter(), &read, 64 << 20)?;
        ensure!(sent < 8 << 20, "requests are taken without end: bytes={sent}");
        stage.works()?;
        drop(stream);
        stage.works()
    })
}

#[test]
fn small_reads() -> anyhow::Result<()> {
    play_on(&|rig| rig.serve("disk", DISK), GROWTH_KIB, |stage| {
        let read = request(cmd::READ, 0, 1, (0, 4096));
        let (_stream, sent) = flood(stage, &enter(), &read, 64 << 20)?;
        ensure!(sent < 8 << 20, "requests are taken without end: bytes={sent}");
        stage.works()
    })
}

#[test]
fn refused_requests() -> anyhow::Result<()> {
    play_on(&|rig| rig.serve("disk", DISK), GROWTH_KIB, |stage| {
        let unknown = request(99, 0, 1, (0, 4096));
        let (_stream, sent) = flood(stage, &enter(), &unknown, 256 << 20)?;
        ensure!(sent < 64 << 20, "requests are answered without end: bytes={sent}");
        stage.works()
    })
}

#[test]
fn many_at_once() -> anyhow::Result<()> {
    // Together they hold what one may hold, and a share each of 1 MiB beside it.
    play_on(&|rig| rig.serve("disk", DISK), GROWTH_KIB + CLIENTS as u64 * 2048, |stage| {
        let read = request(cmd::READ, 0, 1, (0, 1 << 20));
        let floods = (0..CLIENTS)
            .map(|_| flood(stage, &enter(), &read, 64 << 20))
            .collect::<anyhow::Result<Vec<_>>>()?;
        ensure!(floods.iter().all(|(_, sent)| *sent < 8 << 20));
        let mut raw = Raw::entered(&stage.export)?;
        for round in 0..50 {
            raw.write(round * 4096, &[round as u8; 4096])?;
        }
        Ok(())
    })
}

#[test]
fn writes_that_do_not_go_on() -> anyhow::Result<()> {
    play_on(&|rig| rig.serve("disk", DISK), GROWTH_KIB + CLIENTS as u64 * 2048, |stage| {
        let length: u32 = 32 << 20;
        let begun = [enter(), request(cmd::WRITE, 0, 1, (0, length))].concat();
        // All but the last bytes: nothing is ever written.
        let most = length as usize - (1 << 20);
        let _halves = (0..CLIENTS)
            .map(|_| flood(stage, &begun, &[7; 4096], most))
            .collect::<anyhow::Result<Vec<_>>>()?;
        stage.works()
    })
}
