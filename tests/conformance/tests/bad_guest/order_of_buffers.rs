//! A buffer that the device reads behind one that it writes (virtio 1.2, 2.7.4.2 forbids it).

use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Piece, Setup, header, kind};

#[test]
fn breaks_the_queue() -> anyhow::Result<()> {
    play(|stage| {
        for pieces in [
            vec![Piece::In(512), Piece::Out(header(kind::IN, 0)), Piece::In(1)],
            vec![Piece::Out(header(kind::OUT, 0)), Piece::In(1), Piece::Out(vec![1; 512])],
            vec![Piece::In(1), Piece::Out(header(kind::FLUSH, 0))],
        ] {
            stage.breaks(Setup::default(), |guest| guest.ask(0, &pieces).map(drop))?;
        }
        Ok(())
    })
}
