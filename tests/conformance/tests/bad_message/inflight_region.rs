//! The record of what is in flight comes back from the front-end: of a wrong size, of no file, full of garbage. Nothing of it is
//! believed unseen.

use spline_conformance::guest::message::{Verdict, request, u64s};
use spline_conformance::guest::ring::Bell;
use spline_conformance::guest::stage::{Stage, play};
use spline_conformance::guest::{Guest, Setup};
use spline_conformance::pattern;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

fn setup() -> Setup {
    Setup { inflight: true, queues: 2, ..Setup::default() }
}

/// The body of SET_INFLIGHT_FD.
fn body(bytes: u64, offset: u64, queues: u16, size: u16) -> Vec<u8> {
    let mut body = u64s(&[bytes, offset]);
    body.extend(queues.to_le_bytes());
    body.extend(size.to_le_bytes());
    body
}

#[test]
fn of_a_wrong_size() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = Guest::greeted(stage.socket(), setup())?;
        let (area, file) = guest.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, 2, 128))?;
        drop(guest);
        let bytes = area.mmap_size;
        for wrong in [
            body(0, 0, 2, 128),
            body(1, 0, 2, 128),
            body(bytes - 1, 0, 2, 128),
            body(bytes, u64::MAX, 2, 128),
            body(bytes, 1, 2, 128),
            body(bytes, bytes, 2, 128),
            body(bytes, 0, 0, 128),
            body(bytes, 0, 3, 128),
            body(bytes, 0, u16::MAX, u16::MAX),
            body(bytes, 0, 2, 0),
            body(bytes, 0, 2, 256),
        ] {
            let guest = Guest::greeted(stage.socket(), setup())?;
            guest.turned_down(request::SET_INFLIGHT_FD, &wrong, &[file.as_fd()])?;
        }
        Ok(())
    })
}

#[test]
fn of_no_file() -> anyhow::Result<()> {
    play(|stage| {
        let (reader, _writer) = std::io::pipe()?;
        let bell = Bell::new()?;
        let none: Vec<BorrowedFd<'_>> = Vec::new();
        for fds in [none, vec![reader.as_fd()], vec![bell.fd()], vec![bell.fd(); 2]] {
            let guest = Guest::greeted(stage.socket(), setup())?;
            guest.turned_down(request::SET_INFLIGHT_FD, &body(1 << 16, 0, 2, 128), &fds)?;
        }
        Ok(())
    })
}

#[test]
fn too_much_is_asked_for() -> anyhow::Result<()> {
    play(|stage| {
        for (queues, size) in
            [(0, 0), (0, 128), (2, 0), (17, 128), (u16::MAX, 128), (2, u16::MAX), (u16::MAX, u16::MAX)]
        {
            let guest = Guest::greeted(stage.socket(), setup())?;
            let verdict = guest.raw.verdict(request::GET_INFLIGHT_FD, &body(0, 0, queues, size), &[])?;
            // An answer without memory is an error too.
            anyhow::ensure!(matches!(verdict, Verdict::Closed | Verdict::Refused | Verdict::Accepted));
        }
        Ok(())
    })
}

/// A guest whose record was spoilt while nobody was connected; whether it is taken, and what of its queue then, is open.
fn spoilt(stage: &Stage, spoil: impl Fn(u64) -> Vec<(u64, Vec<u8>)>) -> anyhow::Result<()> {
    let mut guest = stage.guest_as(setup())?;
    guest.write(0, &[1; 512])?;
    // The connection goes, memory and record stay.
    guest.raw.stream()?.shutdown(std::net::Shutdown::Both)?;
    if let Some((area, file)) = &guest.inflight {
        let each = area.mmap_size / u64::from(area.num_queues);
        for (at, bytes) in spoil(each) {
            file.write_all_at(&bytes, at)?;
        }
    }
    if guest.reconnect(stage.socket()).is_ok() {
        guest.rings[0].kick.ring()?;
        let _ = guest.raw.verdict(request::GET_FEATURES, &[], &[])?;
    }
    drop(guest);
    stage.works(false)
}

#[test]
fn full_of_garbage() -> anyhow::Result<()> {
    play(|stage| {
        spoilt(stage, |each| vec![(0, vec![0xff; each as usize])])?;
        spoilt(stage, |each| vec![(0, vec![0; each as usize])])?;
        (0..8).try_for_each(|seed| spoilt(stage, |each| vec![(0, pattern(seed, 0, each as usize))]))
    })
}

#[test]
fn of_another_version_or_with_links_astray() -> anyhow::Result<()> {
    play(|stage| {
        let word = |number: u16| number.to_le_bytes().to_vec();
        // struct QueueRegionSplit: features, version at 8, desc_num at 10, last_batch_head at 12, used_idx at 14; then of
        // each descriptor: inflight, 5 bytes, next at 6, counter at 8.
        for (at, number) in [
            (8, 0),
            (8, 2),
            (8, 65_535),
            (10, 0),
            (10, 64),
            (10, 65_535),
            (12, 128),
            (12, 65_535),
            (14, 60_000),
        ] {
            spoilt(stage, |_| vec![(at, word(number))])?;
        }
        // All are in flight, and their links go round or astray; the used index says that a batch was interrupted.
        for next in [0u16, 1, 127, 128, 65_535] {
            spoilt(stage, |_| {
                let state = [&[1, 0, 0, 0, 0, 0][..], &next.to_le_bytes(), &7u64.to_le_bytes()].concat();
                vec![(14, word(0)), (12, word(3)), (16, state.repeat(128))]
            })?;
        }
        // Counters at the end of what they hold.
        spoilt(stage, |_| {
            let state = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &u64::MAX.to_le_bytes()].concat();
            vec![(16, state.repeat(128))]
        })
    })
}
