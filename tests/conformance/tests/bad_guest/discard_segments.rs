//! Discards and zeroes with no range, two, half of one, flags that nobody knows, and lengths beyond the limit.

use anyhow::ensure;
use spline_conformance::guest::stage::{SECTORS, play};
use spline_conformance::guest::{IOERR, OK, Piece, UNSUPP, header, kind, range};

#[test]
fn of_a_wrong_number_or_size() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        guest.write(0, &[1; 8192])?;
        for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
            for bytes in [
                vec![],
                vec![0; 1],
                range(0, 8, 0)[..15].to_vec(),
                [range(0, 8, 0), vec![0]].concat(),
                [range(0, 8, 0), range(8, 8, 0)].concat(),
                range(0, 8, 0).repeat(64),
            ] {
                let status =
                    guest.status(0, &[Piece::Out(header(kind, 0)), Piece::Out(bytes), Piece::In(1)])?;
                ensure!(status == IOERR || status == UNSUPP, "kind={kind} status={status}");
            }
        }
        ensure!(guest.read(0, 8192)? == [1; 8192], "something was discarded");
        Ok(())
    })
}

#[test]
fn with_unknown_flags() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        guest.write(0, &[1; 4096])?;
        let ask = |kind, flags| [Piece::Out(header(kind, 0)), Piece::Out(range(0, 8, flags)), Piece::In(1)];
        // A discard has no flags, zeroes have one (virtio 1.2, 5.2.6.2).
        for (kind, flags) in [
            (kind::DISCARD, 1),
            (kind::DISCARD, 2),
            (kind::DISCARD, u32::MAX),
            (kind::WRITE_ZEROES, 2),
            (kind::WRITE_ZEROES, 3),
            (kind::WRITE_ZEROES, 1 << 31),
        ] {
            guest.expect(&ask(kind, flags), UNSUPP)?;
        }
        ensure!(guest.read(0, 4096)? == [1; 4096], "something was discarded");
        guest.expect(&ask(kind::WRITE_ZEROES, 1), OK)?;
        ensure!(guest.read(0, 4096)? == [0; 4096]);
        Ok(())
    })
}

#[test]
fn of_lengths_beyond_all_limits() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        guest.write(0, &[1; 4096])?;
        for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
            for (sector, sectors) in [(0, u32::MAX), (1, SECTORS as u32), (u64::MAX, u32::MAX), (0, 1 << 31)]
            {
                let pieces =
                    [Piece::Out(header(kind, 0)), Piece::Out(range(sector, sectors, 0)), Piece::In(1)];
                guest.expect(&pieces, IOERR)?;
            }
            let nothing = [Piece::Out(header(kind, 0)), Piece::Out(range(0, 0, 0)), Piece::In(1)];
            let status = guest.status(0, &nothing)?;
            ensure!(status == OK || status == IOERR, "kind={kind} status={status}");
        }
        ensure!(guest.read(0, 4096)? == [1; 4096], "something was discarded");
        Ok(())
    })
}
