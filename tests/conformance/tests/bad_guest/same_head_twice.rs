//! The same head offered again before it was answered: the queue breaks, or each offer is answered; never one twice as often.

use anyhow::ensure;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{PATIENCE, Piece, Setup, header, kind};
use spline_harness::wait_until;

#[test]
fn while_it_is_in_flight() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest_as(Setup { inflight: true, ..Setup::default() })?;
        stage.gateway().stop()?;
        let pieces = [Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)];
        let chain = guest.ask(0, &pieces)?;
        wait_until("the request to be fetched", PATIENCE, || {
            Ok((guest.recorded(0)?.len() == 1).then_some(()))
        })?;
        for _ in 0..8 {
            guest.offer(0, chain.head)?;
        }
        guest.broken(0)?;
        stage.gateway().cont()?;
        // What was fetched before is answered, once.
        ensure!(guest.used(0)?.0 == u32::from(chain.head));
        guest.mend(0)?;
        ensure!(guest.rings[0].unseen(&guest.memory)? == 0, "answered more than once");
        Ok(())
    })
}

#[test]
fn in_one_go() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        stage.gateway().stop()?;
        let chain = guest.describe(0, &[Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)])?;
        for _ in 0..16 {
            guest.rings[0].offer(&guest.memory, chain.head)?;
        }
        guest.rings[0].kick.ring()?;
        guest.broken(0)?;
        stage.gateway().cont()?;
        guest.mend(0)
    })
}
