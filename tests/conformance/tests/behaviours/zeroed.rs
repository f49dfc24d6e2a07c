//! A zeroed range reads as zeros, with its space kept or given back, and what lies around it stays.

use spline_conformance::disk::Request;
use spline_conformance::place::{Place, on};
use spline_conformance::{MIB, pattern};

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let served = place.serve(64 * MIB)?;
    on(&served, || {
        let mut disk = served.open()?;
        for (round, unmap) in [(0, false), (1, true)] {
            let base = round * 32 * MIB;
            let mut content = pattern(round, base, 18 << 20);
            for (at, piece) in content.chunks(MIB as usize).enumerate() {
                disk.write(base + at as u64 * MIB, piece.to_vec())?;
            }
            for (offset, length) in [
                (512, 512),
                (4096, 4096),
                (8704, 7680),
                (MIB - 512, 1024),
                (2 * MIB, 3 * MIB),
                (15 * MIB + 512, 2 * MIB),
            ] {
                disk.succeed(Request::Zero { offset: base + offset, length, unmap })?;
                content[offset as usize..(offset + length) as usize].fill(0);
            }
            for (at, piece) in content.chunks(MIB as usize).enumerate() {
                disk.holds(base + at as u64 * MIB, piece)?;
            }
            // A range that never held anything.
            disk.succeed(Request::Zero { offset: base + 25 * MIB, length: MIB, unmap })?;
            disk.holds(base + 25 * MIB, &vec![0; MIB as usize])?;
            disk.write(base + 2 * MIB, pattern(9, 0, 4096))?;
            disk.holds(base + 2 * MIB, &pattern(9, 0, 4096))?;
        }
        Ok(())
    })
}
