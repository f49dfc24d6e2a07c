//! Requests with no place for a status: none at all, one that the device may not write. And headers that are cut off.

use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Piece, Setup, header, kind};

#[test]
fn none() -> anyhow::Result<()> {
    play(|stage| {
        for pieces in [
            vec![Piece::Out(header(kind::OUT, 0))],
            vec![Piece::Out(header(kind::OUT, 0)), Piece::Out(vec![1; 512])],
            vec![Piece::Out(header(kind::FLUSH, 0))],
            vec![Piece::Out(header(kind::IN, 0))],
            vec![Piece::Out(Vec::new())],
        ] {
            stage.breaks(Setup::default(), |guest| guest.ask(0, &pieces).map(drop))?;
        }
        Ok(())
    })
}

#[test]
fn one_that_the_device_may_not_write() -> anyhow::Result<()> {
    play(|stage| {
        for data in [512, 1024] {
            stage.breaks(Setup::default(), |guest| {
                let pieces =
                    [Piece::Out(header(kind::OUT, 0)), Piece::Out(vec![1; data]), Piece::Out(vec![0xff])];
                guest.ask(0, &pieces).map(drop)
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_header_that_is_cut_off() -> anyhow::Result<()> {
    play(|stage| {
        for length in [0, 1, 8, 15] {
            stage.fails(Setup::default(), |guest| {
                let head = header(kind::FLUSH, 0)[..length].to_vec();
                Ok(guest.ask(0, &[Piece::Out(head), Piece::In(1)])?.status())
            })?;
        }
        stage.fails(Setup::default(), |guest| Ok(guest.ask(0, &[Piece::In(513)])?.status()))
    })
}
