//! The log of changed pages: too small, beyond its file, or truncated while it is in use.

use rustix::fs::MemfdFlags;
use spline_conformance::guest::message::{Verdict, request, u64s};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, Setup, feature};
use std::fs::File;
use std::os::fd::AsFd;
use vhost::VhostBackend;

fn file(bytes: u64) -> anyhow::Result<File> {
    let file: File = rustix::fs::memfd_create("log", MemfdFlags::CLOEXEC)?.into();
    file.set_len(bytes)?;
    Ok(file)
}

fn logged() -> Setup {
    Setup { features: Setup::default().features | feature::LOG_ALL, ..Setup::default() }
}

#[test]
fn beyond_its_file() -> anyhow::Result<()> {
    play(|stage| {
        let log = file(4096)?;
        for (bytes, offset) in [
            (0, 0),
            (8192, 0),
            (4096, 1),
            (4096, 4096),
            (u64::MAX, 0),
            (1 << 62, 0),
            (4096, u64::MAX),
            (4096, u64::MAX - 4095),
        ] {
            let guest = Guest::greeted(stage.socket(), logged())?;
            guest.turned_down(request::SET_LOG_BASE, &u64s(&[bytes, offset]), &[log.as_fd()])?;
        }
        let guest = Guest::greeted(stage.socket(), logged())?;
        guest.turned_down(request::SET_LOG_BASE, &u64s(&[4096, 0]), &[])?;
        Ok(())
    })
}

#[test]
fn smaller_than_the_memory() -> anyhow::Result<()> {
    play(|stage| {
        // Guest addresses begin at 1 GiB: page 262144 lies in the log's byte 32768, behind this one's end.
        let log = file(4096)?;
        let mut guest = stage.guest_as(logged())?;
        if guest.raw.verdict(request::SET_LOG_BASE, &u64s(&[4096, 0]), &[log.as_fd()])? != Verdict::Closed {
            guest.write(0, &[1; 512])?;
            guest.read(0, 512)?;
        }
        Ok(())
    })
}

#[test]
fn truncated_while_it_is_in_use() -> anyhow::Result<()> {
    play(|stage| {
        let log = file(1 << 20)?;
        let mut guest = stage.guest_as(logged())?;
        let verdict = guest.raw.verdict(request::SET_LOG_BASE, &u64s(&[1 << 20, 0]), &[log.as_fd()])?;
        anyhow::ensure!(verdict != Verdict::Closed, "a log as it should be was turned down");
        guest.read(0, 512)?;
        log.set_len(0)?;
        let _ = guest.frontend.get_features();
        let _ = guest.ask(
            0,
            &[
                spline_conformance::guest::Piece::Out(spline_conformance::guest::header(0, 0)),
                spline_conformance::guest::Piece::In(512),
                spline_conformance::guest::Piece::In(1),
            ],
        )?;
        let _ = guest.raw.verdict(request::GET_FEATURES, &[], &[])?;
        drop(guest);
        stage.works(false)
    })
}

#[test]
fn what_is_written_is_logged() -> anyhow::Result<()> {
    play(|stage| {
        let log = file(1 << 20)?;
        let mut guest = stage.guest_as(logged())?;
        guest.raw.verdict(request::SET_LOG_BASE, &u64s(&[1 << 20, 0]), &[log.as_fd()])?;
        let before = guest.memory.take(0)?;
        guest.read(0, 65_536)?;
        let mut pages = vec![0; 1 << 20];
        std::os::unix::fs::FileExt::read_exact_at(&log, &mut pages, 0)?;
        // Sixteen pages of data at least, in the buffers' part of memory.
        let first = before / 4096;
        let dirty =
            (first..first + 20).filter(|page| pages[(page / 8) as usize] & 1 << (page % 8) != 0).count();
        anyhow::ensure!(dirty >= 16, "a read's data was not logged: pages={dirty}");
        Ok(())
    })
}
