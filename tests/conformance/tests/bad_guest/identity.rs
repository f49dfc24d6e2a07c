//! GET_ID: twenty bytes of serial number; a buffer that is shorter or longer does no harm.

use anyhow::ensure;
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{IOERR, OK, Piece, UNANSWERED, header, kind};

#[test]
fn whatever_the_buffer() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        let chain = guest.ask(0, &[Piece::Out(header(kind::GET_ID, 0)), Piece::In(20), Piece::In(1)])?;
        let (_, written) = guest.used(0)?;
        ensure!(guest.memory.read(chain.status(), 1)? == [OK] && written == 21, "written={written}");
        let serial = guest.memory.read(chain.pieces[1].0, 20)?;
        ensure!(
            serial[0] != 0 && serial.iter().all(|byte| *byte == 0 || (32..127).contains(byte)),
            "{serial:?}"
        );
        for length in [0, 1, 19, 21, 512, 4096] {
            let pieces = [Piece::Out(header(kind::GET_ID, 0)), Piece::In(length), Piece::In(1)];
            let chain = guest.ask(0, &pieces)?;
            let (_, written) = guest.used(0)?;
            let status = guest.memory.read(chain.status(), 1)?[0];
            ensure!(status == OK || status == IOERR, "length={length} status={status}");
            ensure!(written <= length + 1, "length={length} written={written}");
            // Nothing behind twenty bytes is anybody's.
            let found = guest.memory.read(chain.pieces[1].0, length as usize)?;
            let behind = found.iter().skip(20).all(|byte| *byte == UNANSWERED || *byte == 0);
            ensure!(behind, "length={length}");
        }
        Ok(())
    })
}
