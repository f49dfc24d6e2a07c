//! Flushes succeed: with nothing to flush, after writes, and among them.

use spline_conformance::disk::Request;
use spline_conformance::place::{Place, on};
use spline_conformance::{MIB, pattern};

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let served = place.serve(64 * MIB)?;
    on(&served, || {
        let mut disk = served.open()?;
        disk.succeed(Request::Flush)?;
        disk.write(0, pattern(1, 0, 4096))?;
        disk.succeed(Request::Flush)?;
        let mixed = (0..64).map(|number| {
            let offset = number * 4096;
            (
                0,
                if number % 4 == 3 {
                    Request::Flush
                } else {
                    Request::write(offset, pattern(2, offset, 4096))
                },
            )
        });
        disk.all_succeed(mixed.collect())?;
        for number in (0..64).filter(|number| number % 4 != 3) {
            disk.holds(number * 4096, &pattern(2, number * 4096, 4096))?;
        }
        disk.all_succeed(vec![(0, Request::Flush); 100]).map(drop)
    })
}
