//! Rings outside the memory, half outside, misaligned, around the end of all addresses; at the guest's addresses instead of the
//! front-end's.

use spline_conformance::guest::memory::{BYTES, GUEST, USER};
use spline_conformance::guest::message::{Verdict, request, u32s, u64s};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, Setup};
use vhost::VhostBackend;

#[test]
fn is_turned_down() -> anyhow::Result<()> {
    play(|stage| {
        let good = [USER, USER + (64 << 10), USER + (32 << 10)];
        for part in 0..3 {
            for address in
                [0, 1, GUEST, USER - 16, USER + BYTES, USER + BYTES - 16, USER + 1, u64::MAX - 15, u64::MAX]
            {
                // An odd place does for none of them: 16, 2, 4.
                let mut places = good;
                places[part] = address;
                let guest = Guest::greeted(stage.socket(), Setup::default())?;
                guest.frontend.set_mem_table(&[guest.memory.region()])?;
                guest.frontend.set_vring_num(0, 128)?;
                let [descriptors, used, available] = places;
                let body = [u32s(&[0, 0]), u64s(&[descriptors, used, available, 0])].concat();
                let mut verdict = guest.raw.verdict(request::SET_VRING_ADDR, &body, &[])?;
                // At the latest when the queue is started.
                if verdict == Verdict::Accepted {
                    let kick = guest.rings[0].kick.fd();
                    verdict = guest.raw.verdict(request::SET_VRING_KICK, &u64s(&[0]), &[kick])?;
                }
                if verdict == Verdict::Accepted {
                    verdict = guest.raw.verdict(request::SET_VRING_ENABLE, &u32s(&[0, 1]), &[])?;
                }
                anyhow::ensure!(verdict != Verdict::Accepted, "part={part} address={address:#x}");
            }
        }
        Ok(())
    })
}
