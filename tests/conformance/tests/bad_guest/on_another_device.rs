//! The guest itself, where it is well-behaved, on a device that nobody here wrote: what it does is what guests do.

use anyhow::ensure;
use spline_conformance::guest::{Guest, IOERR, OK, Piece, Setup, UNSUPP, feature, header, kind, range};
use spline_conformance::{MIB, pattern};
use spline_harness::storage_daemon::Serving;
use spline_harness::{StorageDaemon, tempdir};

#[test]
fn is_a_guest_as_others_are() -> anyhow::Result<()> {
    let dir = tempdir()?;
    let file = dir.path().join("disk");
    std::fs::File::create(&file)?.set_len(MIB)?;
    let daemon = StorageDaemon::start(dir.path(), "daemon", &file, Serving { read_only: false, queues: 2 })?;
    for features in [Setup::default().features, Setup::default().features | feature::INDIRECT] {
        let mut guest = Guest::started(&daemon.socket, Setup { queues: 2, features, ..Setup::default() })?;
        for sector in 0..200 {
            let data = pattern(sector, 0, 1024);
            guest.write(sector, &data)?;
            ensure!(guest.read(sector, 1024)? == data);
        }
        let pieces = [
            vec![Piece::Out(vec![1, 0, 0]), Piece::Out(header(kind::OUT, 1)[3..].to_vec())],
            vec![Piece::Out(vec![9; 500]), Piece::Out(vec![9; 12]), Piece::In(1)],
        ];
        guest.expect(&pieces.concat(), OK)?;
        ensure!(guest.read(1, 512)? == [9; 512]);
        guest.expect(&[Piece::Out(header(99, 0)), Piece::In(1)], UNSUPP)?;
        guest.expect(&[Piece::Out(header(kind::IN, 2048)), Piece::In(512), Piece::In(1)], IOERR)?;
        guest
            .expect(&[Piece::Out(header(kind::DISCARD, 0)), Piece::Out(range(0, 8, 0)), Piece::In(1)], OK)?;
        guest.expect(&[Piece::Out(header(kind::FLUSH, 0)), Piece::In(1)], OK)?;
        ensure!(guest.status(1, &[Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)])? == OK);
        ensure!(guest.config(0, 8)? == (MIB / 512).to_le_bytes());
    }
    Ok(())
}
