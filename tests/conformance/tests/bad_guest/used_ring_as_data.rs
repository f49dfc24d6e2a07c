//! Buffers that are the queue itself: the guest breaks what is its own, nobody else's.

use anyhow::ensure;
use spline_conformance::guest::ring::{Desc, WRITE};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, PATIENCE, Piece, Setup, header, kind};
use spline_harness::wait_until;

/// Reads a sector full of `byte` into some place of the queue.
fn into(guest: &mut Guest, place: u64, byte: u8) -> anyhow::Result<u64> {
    guest.write(0, &[byte; 512])?;
    let ends = guest.place(&[Piece::Out(header(kind::IN, 0)), Piece::In(1)])?;
    let parts = [
        Desc { address: ends[0].0, length: 16, flags: 0, next: 0 },
        Desc { address: place, length: 512, flags: WRITE, next: 0 },
        Desc { address: ends[1].0, length: 1, flags: WRITE, next: 0 },
    ];
    let head = guest.rings[0].chain(&guest.memory, &parts)?;
    guest.offer(0, head)?;
    Ok(ends[1].0)
}

#[test]
fn only_the_queue_suffers() -> anyhow::Result<()> {
    play(|stage| {
        for byte in [0, 0xff] {
            for part in 0..3 {
                let mut guest = stage.guest_as(Setup::default())?;
                let ring = &guest.rings[0];
                let place = [ring.used, ring.available, ring.descriptors][part];
                let status = into(&mut guest, place, byte)?;
                wait_until("an end", PATIENCE, || {
                    let answered = guest.memory.read(status, 1)?[0] != 0xff;
                    Ok((answered || guest.rings[0].error.is_rung()?).then_some(()))
                })?;
                guest.rings[0].kick.ring()?;
                drop(guest);
                stage.works(false)?;
            }
        }
        Ok(())
    })
}

#[test]
fn the_used_ring_is_written_out() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        let ends = guest.place(&[Piece::Out(header(kind::OUT, 8)), Piece::In(1)])?;
        let parts = [
            Desc { address: ends[0].0, length: 16, flags: 0, next: 0 },
            Desc { address: guest.rings[0].used, length: 512, flags: 0, next: 0 },
            Desc { address: ends[1].0, length: 1, flags: WRITE, next: 0 },
        ];
        let head = guest.rings[0].chain(&guest.memory, &parts)?;
        guest.offer(0, head)?;
        guest.used(0)?;
        ensure!(guest.memory.read(ends[1].0, 1)? == [0]);
        Ok(())
    })
}

#[test]
fn data_status_and_header_in_one_place() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = stage.guest()?;
        let place = guest.place(&[Piece::Out(header(kind::IN, 0))])?[0].0;
        let parts = [
            Desc { address: place, length: 16, flags: 0, next: 0 },
            Desc { address: place, length: 512, flags: WRITE, next: 0 },
            Desc { address: place, length: 1, flags: WRITE, next: 0 },
        ];
        for _ in 0..10 {
            guest.memory.write(place, &header(kind::IN, 0))?;
            let head = guest.rings[0].chain(&guest.memory, &parts)?;
            guest.offer(0, head)?;
            guest.used(0)?;
        }
        Ok(())
    })
}
