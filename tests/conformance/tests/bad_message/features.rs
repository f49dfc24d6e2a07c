//! Features that were not offered, features that change while queues run, and protocol features without their agreement.

use anyhow::ensure;
use spline_conformance::guest::message::{Verdict, request, u64s};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, Setup};
use vhost::VhostBackend;

#[test]
fn that_were_not_offered() -> anyhow::Result<()> {
    play(|stage| {
        for bit in [0, 3, 4, 24, 33, 34, 40, 63] {
            let guest = Guest::greeted(stage.socket(), Setup::default())?;
            guest.turned_down(request::SET_FEATURES, &u64s(&[guest.features | 1 << bit]), &[])?;
        }
        for bit in [8, 20, 40, 63] {
            let guest = Guest::greeted(stage.socket(), Setup::default())?;
            guest.turned_down(request::SET_PROTOCOL_FEATURES, &u64s(&[1 << 3 | 1 << bit]), &[])?;
        }
        Ok(())
    })
}

#[test]
fn again_while_queues_run() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        guest.write(0, &[1; 512])?;
        // The same again changes nothing, and QEMU does it to switch the log on and off.
        guest.frontend.set_features(guest.features)?;
        ensure!(guest.read(0, 512)? == [1; 512]);
        // Others: an error, the end of the connection, or what a queue's next start goes by.
        let verdict = guest.raw.verdict(request::SET_FEATURES, &u64s(&[guest.features & !(1 << 13)]), &[])?;
        if verdict == Verdict::Accepted {
            guest.read(0, 512)?;
        }
        Ok(())
    })
}

#[test]
fn none_at_all() -> anyhow::Result<()> {
    play(|stage| {
        let guest = Guest::greeted(stage.socket(), Setup::default())?;
        // A legacy driver: not served, or served; not harmful.
        let _ = guest.raw.verdict(request::SET_FEATURES, &u64s(&[0]), &[])?;
        Ok(())
    })
}
