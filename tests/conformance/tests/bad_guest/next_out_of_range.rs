//! A chain that goes on at a descriptor that the table does not have.

use spline_conformance::guest::ring::{Desc, NEXT};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Piece, Setup, header, kind};

#[test]
fn breaks_the_queue() -> anyhow::Result<()> {
    play(|stage| {
        for next in [128, 129, 1024, 32_768, 65_535] {
            stage.breaks(Setup::default(), |guest| {
                let place = guest.place(&[Piece::Out(header(kind::OUT, 0))])?[0];
                let desc = Desc { address: place.0, length: 16, flags: NEXT, next };
                guest.rings[0].set(&guest.memory, 0, desc)?;
                guest.offer(0, 0)
            })?;
        }
        Ok(())
    })
}
