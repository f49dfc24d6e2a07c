//! A front-end that goes while its requests are under way: they end for nobody, before the next guest's begin.

use anyhow::ensure;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{PATIENCE, Piece, Setup, header, kind};
use spline_harness::wait_until;

#[test]
fn nothing_comes_late() -> anyhow::Result<()> {
    play(|stage| {
        for round in 0..4u8 {
            let mut guest = stage.guest_as(Setup { inflight: true, ..Setup::default() })?;
            stage.gateway().stop()?;
            for sector in 0..16 {
                let data = Piece::Out(vec![100 + round; 512]);
                guest.ask(0, &[Piece::Out(header(kind::OUT, sector)), data, Piece::In(1)])?;
            }
            wait_until("the requests to be fetched", PATIENCE, || {
                Ok((guest.recorded(0)?.len() == 16).then_some(()))
            })?;
            let memory = guest.memory.file.try_clone()?;
            drop(guest);
            stage.gateway().cont()?;
            let mut next = stage.guest()?;
            next.write(0, &[round; 8192])?;
            ensure!(next.read(0, 8192)? == [round; 8192], "a write of a guest that has gone came late");
            drop(memory);
        }
        Ok(())
    })
}

#[test]
fn two_at_a_time() -> anyhow::Result<()> {
    play(|stage| {
        let mut first = stage.guest()?;
        // The second is turned away, or waits for the first to go; the first does not notice.
        let second = std::os::unix::net::UnixStream::connect(stage.socket())?;
        for sector in 0..100 {
            first.write(sector, &[7; 512])?;
        }
        drop(second);
        first.read(0, 512).map(drop)
    })
}
