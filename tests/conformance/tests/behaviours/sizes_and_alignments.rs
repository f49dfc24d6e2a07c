//! Writes of every length from a sector to a MiB at every alignment to a sector change their own bytes, and no others.

use spline_conformance::disk::Disk;
use spline_conformance::place::{Place, on};
use spline_conformance::{MIB, pattern};

const DISK: u64 = 64 * MIB;
/// Bytes around a write that must stay.
const AROUND: u64 = 8192;

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let served = place.serve(DISK)?;
    on(&served, || {
        let mut disk = served.open()?;
        for (number, length) in
            [512, 1024, 2560, 4096, 4608, 16 << 10, 66_048, 1 << 20].into_iter().enumerate()
        {
            // Around where chunks of 16 MiB meet.
            for at in
                [0, 512, 3584, 4096, 16 * MIB - 512, 16 * MIB - length / 1024 * 512 - 512, DISK - length]
            {
                untouched_around(&mut *disk, number as u64, at, length)?;
            }
        }
        Ok(())
    })
}

fn untouched_around(disk: &mut dyn Disk, number: u64, at: u64, length: u64) -> anyhow::Result<()> {
    let from = at.saturating_sub(AROUND);
    let until = (at + length + AROUND).min(DISK);
    let mut expected = disk.read(from, (until - from) as usize)?;
    let data = pattern(number * DISK + at + 1, at, length as usize);
    disk.write(at, data.clone())?;
    expected[(at - from) as usize..(at - from + length) as usize].copy_from_slice(&data);
    disk.holds(from, &expected)
}
