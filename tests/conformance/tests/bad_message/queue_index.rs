//! Queues that the device does not have.

use spline_conformance::guest::Guest;
use spline_conformance::guest::message::{request, u32s, u64s};
use spline_conformance::guest::ring::Bell;
use spline_conformance::guest::stage::play;

#[test]
fn is_turned_down() -> anyhow::Result<()> {
    play(|stage| {
        for index in [4u32, 16, 255, 256, 65_536, u32::MAX] {
            for kind in [
                request::SET_VRING_NUM,
                request::SET_VRING_BASE,
                request::SET_VRING_ENABLE,
                request::SET_VRING_ADDR,
            ] {
                let guest = Guest::greeted(stage.socket(), Default::default())?;
                let mut body = u32s(&[index, 1]);
                if kind == request::SET_VRING_ADDR {
                    body.extend(u64s(&[0, 0, 0, 0]));
                }
                guest.turned_down(kind, &body, &[])?;
            }
        }
        // Here the index has eight bits (vhost-user, "A vring index").
        for index in [4u64, 16, 255] {
            for kind in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
                let guest = Guest::greeted(stage.socket(), Default::default())?;
                guest.turned_down(kind, &u64s(&[index]), &[Bell::new()?.fd()])?;
            }
        }
        Ok(())
    })
}
