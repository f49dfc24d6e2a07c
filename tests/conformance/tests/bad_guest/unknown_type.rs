//! Types of requests that the device does not have: UNSUPP (virtio 1.2, 5.2.6).

use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Piece, UNSUPP, header};

#[test]
fn is_unsupported() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        // Among them the legacy barrier and SCSI commands, lifetime, secure erase and zones, which are not offered.
        for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 24, 1 << 31, u32::MAX] {
            guest.expect(&[Piece::Out(header(kind, 0)), Piece::In(1)], UNSUPP)?;
            guest.expect(&[Piece::Out(header(kind, 0)), Piece::Out(vec![1; 512]), Piece::In(1)], UNSUPP)?;
            guest.expect(&[Piece::Out(header(kind, 0)), Piece::In(512), Piece::In(1)], UNSUPP)?;
        }
        Ok(())
    })
}
