//! Sectors beyond the disk's end, and beyond what numbers hold.

use spline_conformance::guest::stage::{SECTORS, play};
use spline_conformance::guest::{IOERR, OK, Piece, header, kind, range};

#[test]
fn is_refused() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        for sector in
            [SECTORS, SECTORS - 7, 1 << 40, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX - 7, u64::MAX]
        {
            let header_of = |kind| Piece::Out(header(kind, sector));
            guest.expect(&[header_of(kind::IN), Piece::In(4096), Piece::In(1)], IOERR)?;
            guest.expect(&[header_of(kind::OUT), Piece::Out(vec![9; 4096]), Piece::In(1)], IOERR)?;
            for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
                let pieces = [Piece::Out(header(kind, 0)), Piece::Out(range(sector, 8, 0)), Piece::In(1)];
                guest.expect(&pieces, IOERR)?;
            }
        }
        guest.expect(&[Piece::Out(header(kind::IN, SECTORS - 8)), Piece::In(4096), Piece::In(1)], OK)
    })
}
