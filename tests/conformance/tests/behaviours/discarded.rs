//! A discarded range reads as zeros, what lies around it stays, and it can be written again.

use spline_conformance::disk::Request;
use spline_conformance::place::{Place, on};
use spline_conformance::{MIB, pattern};

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let served = place.serve(64 * MIB)?;
    on(&served, || {
        let mut disk = served.open()?;
        let mut content = pattern(1, 0, 34 << 20);
        for (at, piece) in content.chunks(MIB as usize).enumerate() {
            disk.write(at as u64 * MIB, piece.to_vec())?;
        }
        for (offset, length) in [
            (512, 512),
            (4096, 4096),
            (8704, 7680),
            (MIB - 512, 1024),
            (2 * MIB, 3 * MIB),
            (16 * MIB - 4096, 8192),
            (20 * MIB + 512, 13 * MIB),
        ] {
            disk.succeed(Request::Discard { offset, length })?;
            content[offset as usize..(offset + length) as usize].fill(0);
        }
        for (at, piece) in content.chunks(MIB as usize).enumerate() {
            disk.holds(at as u64 * MIB, piece)?;
        }
        // A range that never held anything.
        disk.succeed(Request::Discard { offset: 50 * MIB, length: MIB })?;
        disk.write(2 * MIB + 512, pattern(2, 0, 4096))?;
        disk.holds(2 * MIB + 512, &pattern(2, 0, 4096))?;
        disk.holds(2 * MIB, &[0; 512])
    })
}
