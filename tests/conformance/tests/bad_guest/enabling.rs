//! Kicks without work, work without kicks, and queues that are not enabled.

use anyhow::ensure;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{OK, Piece, Setup, header, kind};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

#[test]
fn kicks_without_work() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        for _ in 0..20_000 {
            guest.rings[0].kick.ring()?;
        }
        guest.read(0, 512).map(drop)
    })
}

#[test]
fn a_queue_that_is_not_enabled_is_left_alone() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest_as(Setup { queues: 2, ..Setup::default() })?;
        guest.frontend.set_vring_enable(0, false)?;
        let pieces = [Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)];
        let chain = guest.ask(0, &pieces)?;
        // The other goes on meanwhile.
        for _ in 0..100 {
            ensure!(guest.status(1, &pieces)? == OK);
        }
        ensure!(guest.rings[0].unseen(&guest.memory)? == 0, "served without being enabled");
        guest.frontend.set_vring_enable(0, true)?;
        ensure!(guest.finish(0, &chain)? == OK);
        Ok(())
    })
}

#[test]
fn work_that_came_before_the_queue_was_started() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        guest.frontend.get_vring_base(0)?;
        let chain = guest.ask(0, &[Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)])?;
        guest.start_queue(0)?;
        ensure!(guest.finish(0, &chain)? == OK);
        Ok(())
    })
}

#[test]
fn stopped_and_started_again_and_again() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        for round in 0..100u64 {
            guest.write(round, &[round as u8; 512])?;
            let base = guest.frontend.get_vring_base(0)?;
            ensure!(
                base == u32::from(guest.rings[0].offered),
                "base={base} offered={}",
                guest.rings[0].offered
            );
            guest.start_queue(0)?;
            ensure!(guest.read(round, 512)? == [round as u8; 512]);
        }
        Ok(())
    })
}
