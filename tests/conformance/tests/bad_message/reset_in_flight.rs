//! RESET_DEVICE and RESET_OWNER while requests are in flight: nothing of them comes late, and the device is set up anew.

use anyhow::ensure;
use spline_conformance::guest::message::{Verdict, request};
use spline_conformance::guest::ring::Ring;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{PATIENCE, Piece, Setup, UNANSWERED, header, kind};
use spline_harness::wait_until;

#[test]
fn nothing_comes_late() -> anyhow::Result<()> {
    play(|stage| {
        for reset in [request::RESET_DEVICE, request::RESET_OWNER] {
            let mut guest = stage.guest_as(Setup { inflight: true, ..Setup::default() })?;
            guest.write(0, &[1; 4096])?;
            stage.gateway().stop()?;
            let read = [Piece::Out(header(kind::IN, 0)), Piece::In(4096), Piece::In(1)];
            let chains = (0..16).map(|_| guest.ask(0, &read)).collect::<anyhow::Result<Vec<_>>>()?;
            wait_until("the requests to be fetched", PATIENCE, || {
                Ok((guest.recorded(0)?.len() == 16).then_some(()))
            })?;
            guest.raw.say(reset, &[], &[])?;
            stage.gateway().cont()?;
            // Answered when the reset is over.
            guest.raw.call(request::GET_FEATURES, &[], &[])?;
            let answered = guest.rings[0].unseen(&guest.memory)?;
            ensure!(answered == 0, "answered after a reset: reset={reset} answered={answered}");
            let used = guest.rings[0].seen;
            // Set up anew, on fresh rings.
            guest.rings[0] = Ring::new(0, 128)?;
            guest.rings[0].clear(&guest.memory)?;
            guest.inflight = None;
            guest.start()?;
            guest.write(0, &[2; 4096])?;
            ensure!(guest.read(0, 4096)? == [2; 4096]);
            ensure!(used == 1 && guest.rings[0].unseen(&guest.memory)? == 0, "an answer came late");
            for chain in chains {
                ensure!(guest.memory.read(chain.status(), 1)? == [UNANSWERED], "a status came late");
            }
        }
        Ok(())
    })
}

#[test]
fn again_and_again() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        for round in 0..20u8 {
            guest.ask(0, &[Piece::Out(header(kind::IN, 0)), Piece::In(4096), Piece::In(1)])?;
            let verdict = guest.raw.verdict(request::RESET_DEVICE, &[], &[])?;
            ensure!(verdict == Verdict::Accepted, "{verdict:?}");
            guest.rings[0] = Ring::new(0, 128)?;
            guest.rings[0].clear(&guest.memory)?;
            guest.start()?;
            guest.write(0, &[round; 512])?;
        }
        Ok(())
    })
}
