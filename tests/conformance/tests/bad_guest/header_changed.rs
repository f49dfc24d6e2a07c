//! A guest that changes a request once the device has fetched it: what was fetched is what is done.

use anyhow::ensure;
use spline_conformance::guest::ring::{Desc, WRITE};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{OK, PATIENCE, Piece, Setup, header, kind};
use spline_harness::wait_until;

#[test]
fn nothing_changes() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest_as(Setup { inflight: true, ..Setup::default() })?;
        guest.write(800, &[4; 512])?;
        stage.gateway().stop()?;
        let write = [Piece::Out(header(kind::OUT, 0)), Piece::Out(vec![1; 512]), Piece::In(1)];
        let chain = guest.ask(0, &write)?;
        wait_until("the request to be fetched", PATIENCE, || {
            Ok((guest.recorded(0)?.len() == 1).then_some(()))
        })?;
        // Now the header says something else, and so do the descriptors.
        guest.memory.write(chain.pieces[0].0, &header(kind::OUT, 800))?;
        for at in 0..3 {
            let elsewhere = Desc { address: u64::MAX - 4, length: u32::MAX, flags: WRITE, next: 60_000 };
            guest.rings[0].set(&guest.memory, chain.head + at, elsewhere)?;
        }
        stage.gateway().cont()?;
        ensure!(guest.finish(0, &chain)? == OK);
        ensure!(guest.read(800, 512)? == [4; 512], "the changed header was obeyed");
        ensure!(guest.read(0, 512)? == [1; 512], "the fetched header was not obeyed");
        Ok(())
    })
}
