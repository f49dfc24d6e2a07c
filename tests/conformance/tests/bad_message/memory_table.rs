//! Regions that overlap, are empty, wrap, are too many, have no file or one that can not be mapped.

use spline_conformance::guest::memory::{BYTES, GUEST, USER};
use spline_conformance::guest::message::{request, u32s, u64s};
use spline_conformance::guest::ring::Bell;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, Setup};
use std::os::fd::{AsFd, BorrowedFd};

/// Guest address, bytes, front-end's address, offset in the file.
type Region = [u64; 4];

fn table(regions: &[Region]) -> Vec<u8> {
    let mut body = u32s(&[regions.len() as u32, 0]);
    regions.iter().for_each(|region| body.extend(u64s(region)));
    body
}

fn turned_down(stage: &spline_conformance::guest::stage::Stage, regions: &[Region]) -> anyhow::Result<()> {
    let guest = Guest::greeted(stage.socket(), Setup::default())?;
    let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|_| guest.memory.file.as_fd()).collect();
    let verdict = guest.turned_down(request::SET_MEM_TABLE, &table(regions), &fds);
    verdict.map(drop).map_err(|error| error.context(format!("{regions:x?}")))
}

#[test]
fn regions_that_no_memory_has() -> anyhow::Result<()> {
    play(|stage| {
        let half = BYTES / 2;
        for regions in [
            vec![[GUEST, 0, USER, 0]],
            // Around the end of all addresses, and of all offsets.
            vec![[u64::MAX - 4095, BYTES, USER, 0]],
            vec![[GUEST, BYTES, u64::MAX - 4095, 0]],
            vec![[GUEST, BYTES, USER, u64::MAX - 4095]],
            vec![[GUEST, u64::MAX, USER, 0]],
            vec![[GUEST, 1 << 62, USER, 0]],
            // One over the other.
            vec![[GUEST, BYTES, USER, 0], [GUEST + half, half, USER + BYTES, 0]],
            vec![[GUEST, BYTES, USER, 0], [GUEST, BYTES, USER + BYTES, 0]],
            vec![[GUEST, BYTES, USER, 0], [GUEST + BYTES, half, USER + 4096, 0]],
        ] {
            turned_down(stage, &regions)?;
        }
        Ok(())
    })
}

#[test]
fn regions_beyond_their_file() -> anyhow::Result<()> {
    play(|stage| {
        for region in [[GUEST, BYTES + 4096, USER, 0], [GUEST, BYTES, USER, 4096], [GUEST, 4096, USER, BYTES]]
        {
            turned_down(stage, &[region])?;
        }
        Ok(())
    })
}

#[test]
fn none_and_too_many() -> anyhow::Result<()> {
    play(|stage| {
        let region = |at: u64| [GUEST + at * 65_536, 65_536, USER + at * 65_536, at * 65_536];
        // Messages bring at most 32 descriptors here.
        for count in [0u64, 33, 100] {
            turned_down(stage, &(0..count).map(region).collect::<Vec<_>>())?;
        }
        // A number that is not what follows.
        for (said, given) in [(0, 1), (2, 1), (u32::MAX, 1), (8, 1)] {
            let guest = Guest::greeted(stage.socket(), Setup::default())?;
            let mut body = table(&(0..given).map(region).collect::<Vec<_>>());
            body[..4].copy_from_slice(&said.to_le_bytes());
            let fds = vec![guest.memory.file.as_fd(); given as usize];
            guest.turned_down(request::SET_MEM_TABLE, &body, &fds)?;
        }
        Ok(())
    })
}

#[test]
fn files_missing_or_too_many() -> anyhow::Result<()> {
    play(|stage| {
        let regions = [[GUEST, 65_536, USER, 0], [GUEST + 65_536, 65_536, USER + 65_536, 65_536]];
        for count in [0, 1, 3, 8, 100, 253] {
            let guest = Guest::greeted(stage.socket(), Setup::default())?;
            let fds = vec![guest.memory.file.as_fd(); count];
            guest.turned_down(request::SET_MEM_TABLE, &table(&regions), &fds)?;
        }
        Ok(())
    })
}

#[test]
fn files_that_can_not_be_mapped() -> anyhow::Result<()> {
    play(|stage| {
        let (reader, _writer) = std::io::pipe()?;
        let bell = Bell::new()?;
        let (socket, _other) = std::os::unix::net::UnixStream::pair()?;
        let read_only = std::fs::File::open(stage.rig.dir().join("disk.img"))?;
        let directory = std::fs::File::open(stage.rig.dir())?;
        for fd in [reader.as_fd(), bell.fd(), socket.as_fd(), read_only.as_fd(), directory.as_fd()] {
            let guest = Guest::greeted(stage.socket(), Setup::default())?;
            guest.turned_down(request::SET_MEM_TABLE, &table(&[[GUEST, 65_536, USER, 0]]), &[fd])?;
        }
        Ok(())
    })
}
