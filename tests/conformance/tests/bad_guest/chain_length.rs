//! Chains that loop, or are longer than the queue.

use spline_conformance::guest::ring::{Desc, NEXT, WRITE};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{OK, Piece, Setup, header, kind};

#[test]
fn a_loop_of_two() -> anyhow::Result<()> {
    play(|stage| {
        stage.breaks(Setup::default(), |guest| {
            let place = guest.place(&[Piece::Out(header(kind::OUT, 0))])?[0];
            for (at, next) in [(0, 1), (1, 0)] {
                let desc = Desc { address: place.0, length: 16, flags: NEXT, next };
                guest.rings[0].set(&guest.memory, at, desc)?;
            }
            guest.offer(0, 0)
        })
    })
}

#[test]
fn a_descriptor_that_goes_on_at_itself() -> anyhow::Result<()> {
    play(|stage| {
        for flags in [NEXT, NEXT | WRITE] {
            stage.breaks(Setup::default(), |guest| {
                let place = guest.place(&[Piece::In(512)])?[0];
                let desc = Desc { address: place.0, length: 512, flags, next: 5 };
                guest.rings[0].set(&guest.memory, 5, desc)?;
                guest.offer(0, 5)
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_loop_at_the_end_of_a_long_chain() -> anyhow::Result<()> {
    play(|stage| {
        stage.breaks(Setup { size: 1024, ..Setup::default() }, |guest| {
            let place = guest.place(&[Piece::Out(header(kind::OUT, 0))])?[0];
            for at in 0..1024 {
                let next = if at == 1023 { 700 } else { at + 1 };
                let desc = Desc { address: place.0, length: 1, flags: NEXT, next };
                guest.rings[0].set(&guest.memory, at, desc)?;
            }
            guest.offer(0, 0)
        })
    })
}

#[test]
fn as_long_as_the_queue() -> anyhow::Result<()> {
    play(|stage| {
        for size in [4, 128, 1024] {
            let mut guest = stage.guest_as(Setup { size, ..Setup::default() })?;
            let mut pieces = vec![Piece::Out(header(kind::OUT, 0))];
            pieces.extend(vec![Piece::Out(vec![7; 512]); usize::from(size) - 2]);
            pieces.push(Piece::In(1));
            guest.expect(&pieces, OK)?;
        }
        Ok(())
    })
}
