//! Data that is not a multiple of a sector is refused; none at all, and more than one request may have, does no harm.

use anyhow::ensure;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{IOERR, OK, Piece, header, kind};

#[test]
fn not_a_multiple_of_a_sector() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        guest.write(0, &[1; 4096])?;
        for length in [1, 511, 513, 1000, 4095] {
            let header_of = |kind| Piece::Out(header(kind, 0));
            guest.expect(&[header_of(kind::OUT), Piece::Out(vec![2; length]), Piece::In(1)], IOERR)?;
            guest.expect(&[header_of(kind::IN), Piece::In(length as u32), Piece::In(1)], IOERR)?;
        }
        ensure!(guest.read(0, 4096)? == [1; 4096], "half a sector was written");
        Ok(())
    })
}

#[test]
fn nothing() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        for kind in [kind::IN, kind::OUT] {
            let status = guest.status(0, &[Piece::Out(header(kind, 0)), Piece::In(1)])?;
            ensure!(status == OK || status == IOERR, "kind={kind} status={status}");
        }
        Ok(())
    })
}

#[test]
fn flushes_with_data() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        for pieces in [
            vec![Piece::Out(header(kind::FLUSH, u64::MAX)), Piece::In(1)],
            vec![Piece::Out(header(kind::FLUSH, 0)), Piece::Out(vec![3; 700]), Piece::In(1)],
            vec![Piece::Out(header(kind::FLUSH, 0)), Piece::In(700)],
        ] {
            let status = guest.status(0, &pieces)?;
            ensure!(status == OK || status == IOERR, "status={status}");
        }
        Ok(())
    })
}

#[test]
fn four_mebibytes_and_more_in_one_request() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        // One buffer many times over: 100 of 1 MiB are more than a request may have.
        let place = guest.place(&[Piece::Out(vec![5; 1 << 20])])?[0];
        for (count, wanted) in [(4, OK), (40, IOERR), (100, IOERR)] {
            let ends = guest.place(&[Piece::Out(header(kind::OUT, 0)), Piece::In(1)])?;
            let desc = |(address, length): (u64, u32), flags| spline_conformance::guest::ring::Desc {
                address,
                length,
                flags,
                next: 0,
            };
            let mut parts = vec![desc(ends[0], 0)];
            parts.extend(vec![desc(place, 0); count]);
            parts.push(desc(ends[1], spline_conformance::guest::ring::WRITE));
            let head = guest.rings[0].chain(&guest.memory, &parts)?;
            guest.offer(0, head)?;
            guest.used(0)?;
            let status = guest.memory.read(ends[1].0, 1)?[0];
            ensure!(status == wanted, "count={count} status={status} wanted={wanted}");
        }
        Ok(())
    })
}
