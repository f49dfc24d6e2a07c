//! Descriptors beside messages that take none, too many beside those that take some: all of them are closed.

use spline_conformance::guest::message::{Raw, request, u32s, u64s};
use spline_conformance::guest::ring::Bell;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, Setup};
use std::os::fd::BorrowedFd;

#[test]
fn are_closed() -> anyhow::Result<()> {
    play(|stage| {
        let bell = Bell::new()?;
        let inflight = [u64s(&[0, 0]), u32s(&[0x0080_0001])].concat();
        for (kind, body) in [
            (request::GET_FEATURES, vec![]),
            (request::SET_OWNER, vec![]),
            (request::SET_FEATURES, u64s(&[1 << 32])),
            (request::SET_VRING_NUM, u32s(&[0, 128])),
            (request::GET_CONFIG, [u32s(&[0, 8, 0]), vec![0; 8]].concat()),
            // CVE-2022-0669: here they were forgotten elsewhere.
            (request::GET_INFLIGHT_FD, inflight.clone()),
            (request::SET_INFLIGHT_FD, inflight),
            (request::SET_VRING_KICK, u64s(&[0])),
            (request::SET_VRING_CALL, u64s(&[0])),
            (request::SET_VRING_ERR, u64s(&[0])),
            (request::SET_VRING_KICK, u64s(&[0x100])),
            (request::SET_BACKEND_REQ_FD, vec![]),
            (request::SET_LOG_BASE, u64s(&[4096, 0])),
            (request::SET_LOG_FD, vec![]),
            (request::ADD_MEM_REG, u64s(&[0, 0, 4096, 0, 0])),
            (request::REM_MEM_REG, u64s(&[0, 0, 4096, 0, 0])),
            (request::RESET_DEVICE, vec![]),
            (999, vec![]),
        ] {
            for count in [1, 2, 33, 253] {
                let guest = Guest::greeted(stage.socket(), Setup::default())?;
                let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| bell.fd()).collect();
                let _ = guest.raw.verdict(kind, &body, &fds)?;
                let _ = guest.raw.verdict(kind, &body, &fds);
            }
        }
        Ok(())
    })
}

#[test]
fn beside_half_a_message() -> anyhow::Result<()> {
    play(|stage| {
        let bell = Bell::new()?;
        for _ in 0..20 {
            let raw = Raw::connect(stage.socket())?;
            let fds = [bell.fd(); 100];
            for byte in u32s(&[request::SET_MEM_TABLE, 1]) {
                if raw.send(&[byte], &fds).is_err() {
                    break;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn replaced_again_and_again() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        for _ in 0..200 {
            for kind in [request::SET_VRING_CALL, request::SET_VRING_ERR, request::SET_VRING_KICK] {
                let ring = &guest.rings[0];
                let fd = match kind {
                    request::SET_VRING_CALL => ring.call.fd(),
                    request::SET_VRING_ERR => ring.error.fd(),
                    _ => ring.kick.fd(),
                };
                guest.raw.verdict(kind, &u64s(&[0]), &[fd])?;
            }
        }
        guest.read(0, 512).map(drop)
    })
}
