//! GET_VRING_BASE while requests are in flight: it is answered when they are, and then nothing more comes.

use anyhow::ensure;
use spline_conformance::guest::message::{request, u32s};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{OK, PATIENCE, Piece, Setup, header, kind};
use spline_harness::wait_until;

#[test]
fn waits_for_the_answers() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest_as(Setup { inflight: true, ..Setup::default() })?;
        guest.write(0, &[1; 4096])?;
        stage.gateway().stop()?;
        let read = [Piece::Out(header(kind::IN, 0)), Piece::In(4096), Piece::In(1)];
        let chains = (0..16).map(|_| guest.ask(0, &read)).collect::<anyhow::Result<Vec<_>>>()?;
        wait_until("the requests to be fetched", PATIENCE, || {
            Ok((guest.recorded(0)?.len() == 16).then_some(()))
        })?;
        guest.raw.say(request::GET_VRING_BASE, &u32s(&[0, 0]), &[])?;
        stage.gateway().cont()?;
        let base = guest.raw.reply(request::GET_VRING_BASE)?;
        ensure!(base == u32s(&[0, 17]), "base={base:?}");
        ensure!(guest.rings[0].unseen(&guest.memory)? == 16, "answered before the requests were");
        for chain in &chains {
            ensure!(guest.memory.read(chain.status(), 1)? == [OK]);
        }
        Ok(())
    })
}
