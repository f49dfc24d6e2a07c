//! Tables of descriptors elsewhere in memory: well-formed ones work; sizes that no table has, tables in tables, tables beside
//! other descriptors, tables outside memory and tables that were not agreed upon break the queue.

use anyhow::ensure;
use spline_conformance::guest::ring::{Desc, INDIRECT, NEXT, WRITE};
use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, OK, Piece, Setup, UNANSWERED, feature, header, kind};

fn setup() -> Setup {
    Setup { features: feature::INDIRECT, ..Setup::default() }
}

/// A read of a sector as three descriptors, and where its status goes.
fn read(guest: &mut Guest) -> anyhow::Result<(Vec<Desc>, u64)> {
    let places = guest.place(&[Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)])?;
    let flags = [NEXT, NEXT | WRITE, WRITE];
    let descs = places.iter().zip(flags).zip(1..);
    let descs = descs.map(|(((address, length), flags), next)| Desc {
        address: *address,
        length: *length,
        flags,
        next,
    });
    Ok((descs.collect(), places[2].0))
}

/// Puts a table into memory, so many bytes off where it should be aligned; answers its address.
fn table(guest: &mut Guest, descs: &[Desc], off: u64) -> anyhow::Result<u64> {
    let bytes: Vec<u8> = descs.iter().flat_map(Desc::bytes).collect();
    let address = guest.memory.take(bytes.len() as u64 + 32)?.next_multiple_of(16) + off;
    guest.memory.write(address, &bytes)?;
    Ok(address)
}

fn point(guest: &mut Guest, desc: Desc) -> anyhow::Result<()> {
    guest.rings[0].set(&guest.memory, 0, desc)?;
    guest.offer(0, 0)
}

#[test]
fn well_formed() -> anyhow::Result<()> {
    play(|stage| {
        for off in [0, 1, 8] {
            let mut guest = stage.guest_as(setup())?;
            let (descs, status) = read(&mut guest)?;
            let address = table(&mut guest, &descs, off)?;
            point(&mut guest, Desc { address, length: 48, flags: INDIRECT, next: 0 })?;
            ensure!(guest.used(0)? == (0, 513), "off={off}");
            ensure!(guest.memory.read(status, 1)? == [OK], "off={off}");
        }
        Ok(())
    })
}

#[test]
fn longer_than_the_queue() -> anyhow::Result<()> {
    play(|stage| {
        // Drivers must not (virtio 1.2, 2.7.5.3.1), QEMU lets them: served or broken, never anything else.
        let mut guest = stage.guest_as(Setup { size: 8, ..setup() })?;
        let places = guest.place(&[Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)])?;
        let mut descs = vec![Desc { address: places[0].0, length: 16, flags: NEXT, next: 1 }];
        descs.extend((0..512).map(|at| Desc {
            address: places[1].0 + at,
            length: 1,
            flags: NEXT | WRITE,
            next: at as u16 + 2,
        }));
        descs.push(Desc { address: places[2].0, length: 1, flags: WRITE, next: 0 });
        let address = table(&mut guest, &descs, 0)?;
        point(&mut guest, Desc { address, length: descs.len() as u32 * 16, flags: INDIRECT, next: 0 })?;
        spline_harness::wait_until("an end", spline_conformance::guest::PATIENCE, || {
            let status = guest.memory.read(places[2].0, 1)?[0];
            ensure!(status == OK || status == UNANSWERED, "status={status}");
            Ok((status == OK || guest.rings[0].error.is_rung()?).then_some(()))
        })?;
        guest.mend(0)
    })
}

#[test]
fn of_a_wrong_size() -> anyhow::Result<()> {
    play(|stage| {
        for length in [0, 1, 15, 17, 47, 16 * 1025, 0x10_0000, 0xffff_fff0, 0xffff_ffff] {
            stage.breaks(setup(), |guest| {
                let (descs, _) = read(guest)?;
                let address = table(guest, &descs, 0)?;
                point(guest, Desc { address, length, flags: INDIRECT, next: 0 })
            })?;
        }
        Ok(())
    })
}

#[test]
fn within_another() -> anyhow::Result<()> {
    play(|stage| {
        stage.breaks(setup(), |guest| {
            let (descs, _) = read(guest)?;
            let inner = table(guest, &descs, 0)?;
            let outer = table(guest, &[Desc { address: inner, length: 48, flags: INDIRECT, next: 0 }], 0)?;
            point(guest, Desc { address: outer, length: 16, flags: INDIRECT, next: 0 })
        })?;
        stage.breaks(setup(), |guest| {
            // Itself.
            let address = table(guest, &[Desc { address: 0, length: 0, flags: 0, next: 0 }], 0)?;
            let own = Desc { address, length: 16, flags: INDIRECT, next: 0 };
            guest.memory.write(address, &own.bytes())?;
            point(guest, own)
        })
    })
}

#[test]
fn beside_other_descriptors() -> anyhow::Result<()> {
    play(|stage| {
        stage.breaks(setup(), |guest| {
            let (descs, _) = read(guest)?;
            let address = table(guest, &descs, 0)?;
            guest.rings[0].set(&guest.memory, 1, descs[2])?;
            point(guest, Desc { address, length: 48, flags: INDIRECT | NEXT, next: 1 })
        })
    })
}

#[test]
fn that_loop_or_go_astray() -> anyhow::Result<()> {
    play(|stage| {
        for next in [0, 1, 3, 65_535] {
            stage.breaks(setup(), |guest| {
                let (mut descs, _) = read(guest)?;
                descs[1].next = next;
                let address = table(guest, &descs, 0)?;
                point(guest, Desc { address, length: 48, flags: INDIRECT, next: 0 })
            })?;
        }
        Ok(())
    })
}

#[test]
fn outside_memory() -> anyhow::Result<()> {
    play(|stage| {
        for address in [0, 0x1000, 0x3fff_fff0, 0x4000_0000 + (16 << 20) - 16, u64::MAX - 15, u64::MAX] {
            stage.breaks(setup(), |guest| {
                point(guest, Desc { address, length: 48, flags: INDIRECT, next: 0 })
            })?;
        }
        Ok(())
    })
}

#[test]
fn that_were_not_agreed_upon() -> anyhow::Result<()> {
    play(|stage| {
        stage.breaks(Setup::default(), |guest| {
            let (descs, _) = read(guest)?;
            let address = table(guest, &descs, 0)?;
            point(guest, Desc { address, length: 48, flags: INDIRECT, next: 0 })
        })
    })
}
