//! Regions one by one: over others, unknown ones taken away, without a file, and as many as the device takes.

use anyhow::ensure;
use spline_conformance::guest::memory::{BYTES, GUEST, USER};
use spline_conformance::guest::message::{Verdict, request, u64s};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, Setup};
use std::os::fd::AsFd;
use vhost::vhost_user::VhostUserFrontend;

/// The body of ADD_MEM_REG and REM_MEM_REG: padding, guest address, bytes, front-end's address, offset.
fn body(guest: u64, bytes: u64, user: u64, offset: u64) -> Vec<u8> {
    u64s(&[0, guest, bytes, user, offset])
}

#[test]
fn what_makes_no_sense_is_turned_down() -> anyhow::Result<()> {
    play(|stage| {
        for (kind, region, files) in [
            (request::ADD_MEM_REG, body(GUEST, BYTES, USER, 0), 1),
            (request::ADD_MEM_REG, body(GUEST + BYTES - 4096, 8192, USER + BYTES, 0), 1),
            (request::ADD_MEM_REG, body(GUEST + BYTES, 4096, USER, 0), 1),
            (request::ADD_MEM_REG, body(GUEST + BYTES, 0, USER + BYTES, 0), 1),
            (request::ADD_MEM_REG, body(GUEST + BYTES, 4096, USER + BYTES, 0), 0),
            (request::ADD_MEM_REG, body(GUEST + BYTES, 4096, USER + BYTES, 0), 2),
            (request::ADD_MEM_REG, body(u64::MAX - 4095, 8192, USER + BYTES, 0), 1),
            (request::ADD_MEM_REG, body(GUEST + BYTES, 4096, USER + BYTES, BYTES), 1),
            (request::REM_MEM_REG, body(GUEST + BYTES, 4096, USER + BYTES, 0), 0),
            (request::REM_MEM_REG, body(GUEST, 4096, USER, 0), 0),
        ] {
            let guest = stage.guest()?;
            let fds = vec![guest.memory.file.as_fd(); files];
            guest.turned_down(kind, &region, &fds)?;
        }
        Ok(())
    })
}

#[test]
fn to_the_limit() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = Guest::greeted(stage.socket(), Setup::default())?;
        let slots = guest.frontend.get_max_mem_slots()?;
        ensure!((8..=4096).contains(&slots), "slots={slots}");
        let region = |at: u64| body(GUEST + at * 4096, 4096, USER + at * 4096, at % 4096 * 4096);
        for at in 0..slots {
            let verdict =
                guest.raw.verdict(request::ADD_MEM_REG, &region(at), &[guest.memory.file.as_fd()])?;
            ensure!(verdict == Verdict::Accepted, "at={at} of {slots}: {verdict:?}");
        }
        guest.turned_down(request::ADD_MEM_REG, &region(slots), &[guest.memory.file.as_fd()]).map(drop)
    })
}

#[test]
fn taken_away_from_under_a_queue() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        guest.write(0, &[1; 512])?;
        let verdict = guest.raw.verdict(request::REM_MEM_REG, &body(GUEST, BYTES, USER, 0), &[])?;
        if verdict == Verdict::Accepted {
            // Its rings lie nowhere now.
            let _ = guest.offer(0, 0);
            let _ = guest.broken(0);
        }
        drop(guest);
        stage.works(false)
    })
}
