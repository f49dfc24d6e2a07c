//! Messages before those that they build upon: an error, the end of the connection, or nothing; never a queue that runs.

use spline_conformance::guest::message::{Raw, Verdict, request, u32s, u64s};
use spline_conformance::guest::ring::Bell;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, PATIENCE, Setup};
use std::os::fd::BorrowedFd;
use vhost::VhostBackend;

#[test]
fn everything_first() -> anyhow::Result<()> {
    play(|stage| {
        let bell = Bell::new()?;
        let none: &[BorrowedFd<'_>] = &[];
        for (kind, body, fds) in [
            (request::GET_VRING_BASE, u32s(&[0, 0]), none),
            (request::SET_VRING_ENABLE, u32s(&[0, 1]), none),
            (request::SET_VRING_KICK, u64s(&[0]), &[bell.fd()]),
            (request::SET_VRING_CALL, u64s(&[0]), &[bell.fd()]),
            (request::SET_VRING_ADDR, [u32s(&[0, 0]), u64s(&[4096, 8192, 12_288, 0])].concat(), none),
            (request::SET_VRING_BASE, u32s(&[0, 70_000]), none),
            (request::GET_CONFIG, u32s(&[0, 60, 0]), none),
            (request::GET_INFLIGHT_FD, [u64s(&[0, 0]), u32s(&[0x0080_0001])].concat(), none),
            (request::RESET_DEVICE, vec![], none),
            (request::RESET_OWNER, vec![], none),
            (request::GET_QUEUE_NUM, vec![], none),
            (request::GET_MAX_MEM_SLOTS, vec![], none),
            (request::REM_MEM_REG, u64s(&[0, 0, 4096, 0, 0]), none),
            (request::SET_PROTOCOL_FEATURES, u64s(&[u64::MAX]), none),
            (request::SET_BACKEND_REQ_FD, vec![], none),
        ] {
            let raw = Raw::connect(stage.socket())?;
            raw.say(kind, &body, fds)?;
            // Alive, or closed: both are answers.
            let _ = raw.stream()?.shutdown(std::net::Shutdown::Write);
            raw.closed().map_err(|error| error.context(format!("kind={kind}")))?;
        }
        Ok(())
    })
}

#[test]
fn a_queue_without_memory() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = Guest::greeted(stage.socket(), Setup::default())?;
        // No SET_MEM_TABLE: the addresses lie nowhere.
        let error = guest.start_queue(0);
        anyhow::ensure!(error.is_err(), "a queue without memory was started");
        Ok(())
    })
}

#[test]
fn a_queue_without_addresses_or_size() -> anyhow::Result<()> {
    play(|stage| {
        for number in [false, true] {
            let mut guest = Guest::greeted(stage.socket(), Setup::default())?;
            guest.frontend.set_mem_table(&[guest.memory.region()])?;
            if number {
                guest.frontend.set_vring_num(0, 128)?;
            }
            let kick = guest.rings[0].kick.fd();
            let mut verdict = guest.raw.verdict(request::SET_VRING_KICK, &u64s(&[0]), &[kick])?;
            if verdict == Verdict::Accepted {
                verdict = guest.raw.verdict(request::SET_VRING_ENABLE, &u32s(&[0, 1]), &[])?;
            }
            guest.memory.write(guest.rings[0].available + 2, &[1, 0])?;
            guest.rings[0].kick.ring()?;
            if verdict == Verdict::Accepted {
                // It goes on as if nothing had been: the queue does not run.
                guest.frontend.get_features()?;
                anyhow::ensure!(guest.rings[0].unseen(&guest.memory)? == 0);
            }
            guest.rings[0].offered = 0;
            guest.rings[0].clear(&guest.memory)?;
        }
        Ok(())
    })
}

#[test]
fn twice_over() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        guest.write(0, &[1; 512])?;
        // A front-end that repeats itself: whatever becomes of it, it ends, and soon.
        for _ in 0..3 {
            if guest.raw.verdict(request::SET_OWNER, &[], &[])? == Verdict::Closed {
                return Ok(());
            }
            let number = u32s(&[0, 128]);
            if guest.raw.verdict(request::SET_VRING_NUM, &number, &[])? == Verdict::Closed {
                return Ok(());
            }
        }
        spline_harness::wait_until("an end", PATIENCE, || Ok(guest.read(0, 512).ok().map(drop)))
    })
}
