//! Buffers outside the guest's memory: before it, behind it, half in it, at the front-end's addresses, and around the end of
//! all addresses.

use spline_conformance::guest::memory::{BYTES, GUEST, USER};
use spline_conformance::guest::ring::{Desc, NEXT, WRITE};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Piece, Setup, header, kind};

#[test]
fn breaks_the_queue() -> anyhow::Result<()> {
    play(|stage| {
        for (address, length) in [
            (0, 512),
            (GUEST - 512, 512),
            (GUEST - 1, 512),
            (GUEST + BYTES - 511, 512),
            (GUEST + BYTES, 512),
            (GUEST, u32::MAX),
            (GUEST + BYTES - 512, 0x8000_0000),
            (USER, 512),
            (u64::MAX, 512),
            (u64::MAX - 511, 512),
            (u64::MAX - 510, 512),
            (u64::MAX - 0xffff_fffe, u32::MAX),
        ] {
            for flags in [0, WRITE] {
                stage.fails(Setup::default(), |guest| {
                    let kind = if flags == 0 { kind::OUT } else { kind::IN };
                    let places = guest.place(&[Piece::Out(header(kind, 0)), Piece::In(1)])?;
                    let parts = [
                        Desc { address: places[0].0, length: 16, flags: NEXT, next: 0 },
                        Desc { address, length, flags, next: 0 },
                        Desc { address: places[1].0, length: 1, flags: WRITE, next: 0 },
                    ];
                    let head = guest.rings[0].chain(&guest.memory, &parts)?;
                    guest.offer(0, head)?;
                    Ok(places[1].0)
                })?;
            }
        }
        Ok(())
    })
}
