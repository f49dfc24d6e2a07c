//! Writes to a device that was offered as read-only (virtio 1.2, 5.2.6.2: IOERR; what is not offered: UNSUPP).

use anyhow::ensure;
use spline_conformance::guest::stage::play_as;
use spline_conformance::guest::{IOERR, Piece, UNSUPP, feature, header, kind, range};
use spline_harness::vhost::Shown;
use vhost::VhostBackend;

#[test]
fn is_refused() -> anyhow::Result<()> {
    play_as(Shown { read_only: true, ..Shown::default() }, |stage| {
        let mut guest = stage.guest()?;
        ensure!(guest.frontend.get_features()? & feature::READ_ONLY != 0, "it does not say so");
        guest.expect(&[Piece::Out(header(kind::OUT, 0)), Piece::Out(vec![1; 512]), Piece::In(1)], IOERR)?;
        for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
            let pieces = [Piece::Out(header(kind, 0)), Piece::Out(range(0, 8, 0)), Piece::In(1)];
            let status = guest.status(0, &pieces)?;
            ensure!(status == IOERR || status == UNSUPP, "kind={kind} status={status}");
        }
        ensure!(guest.read(0, 512)? == [0; 512], "something was written");
        Ok(())
    })
}
