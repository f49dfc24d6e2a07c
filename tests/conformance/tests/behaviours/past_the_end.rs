//! What reaches beyond the end is refused and changes nothing; the client is served on.

use spline_conformance::disk::Request;
use spline_conformance::place::{Place, on};
use spline_conformance::{MIB, pattern};

const DISK: u64 = 8 * MIB;

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let served = place.serve(DISK)?;
    on(&served, || {
        let mut disk = served.open()?;
        let last = pattern(1, DISK - 4096, 4096);
        disk.write(DISK - 4096, last.clone())?;
        for (offset, length) in [
            (DISK, 512u64),
            (DISK - 512, 1024),
            (DISK - 4096, 8192),
            (2 * DISK, 4096),
            (1 << 40, 512),
            (u64::MAX - 511, 512),
            (u64::MAX - 1023, 512),
        ] {
            disk.refuse(Request::read(offset, length as usize))?;
            disk.refuse(Request::write(offset, vec![0xbb; length as usize]))?;
            // Drivers add the length themselves, and can not beyond what numbers hold.
            if offset.checked_add(length).is_some() {
                disk.refuse(Request::Discard { offset, length })?;
                disk.refuse(Request::Zero { offset, length, unmap: true })?;
                disk.refuse(Request::Zero { offset, length, unmap: false })?;
            }
        }
        disk.holds(DISK - 4096, &last)?;
        // And among others in flight each has its own answer.
        let mixed = (0..32).map(|number| (0, Request::read(DISK - 512 + number % 2 * 512, 512)));
        for (number, answer) in disk.all(mixed.collect())?.into_iter().enumerate() {
            anyhow::ensure!(answer.is_ok() == (number % 2 == 0), "number={number} ok={}", answer.is_ok());
        }
        Ok(())
    })
}
