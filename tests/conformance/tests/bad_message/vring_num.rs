//! Sizes that no queue has: none, not a power of two, more than the device takes.

use spline_conformance::guest::Guest;
use spline_conformance::guest::message::{Verdict, request, u32s};
use spline_conformance::guest::stage::play;

#[test]
fn is_turned_down() -> anyhow::Result<()> {
    play(|stage| {
        for size in [0, 3, 100, 127, 2048, 32_768, 65_535, 65_536 + 128, u32::MAX] {
            let mut guest = Guest::greeted(stage.socket(), Default::default())?;
            let verdict = guest.raw.verdict(request::SET_VRING_NUM, &u32s(&[0, size]), &[])?;
            // Or when the queue is started.
            if verdict == Verdict::Accepted {
                vhost::VhostBackend::set_mem_table(&guest.frontend, &[guest.memory.region()])?;
                let addresses = guest.addresses(0);
                let body = [
                    u32s(&[0, 0]),
                    spline_conformance::guest::message::u64s(&[
                        addresses.desc_table_addr,
                        addresses.used_ring_addr,
                        addresses.avail_ring_addr,
                        0,
                    ]),
                ];
                guest.turned_down(request::SET_VRING_ADDR, &body.concat(), &[])?;
            }
            guest.rings.clear();
        }
        Ok(())
    })
}
