//! More requests in flight than a queue holds: each is answered once, with its own data.

use spline_conformance::disk::{Request, same};
use spline_conformance::place::{Place, on};
use spline_conformance::{MIB, pattern};

const REQUESTS: u64 = 400;

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let served = place.serve(64 * MIB)?;
    on(&served, || {
        let mut disk = served.open()?;
        // Not in the order of the disk, and of several lengths.
        let place_of = |number: u64| (number * 37 % REQUESTS * 16_384, 512usize << (number % 6));
        let data_of = |number: u64, round: u64| {
            let (offset, length) = place_of(number);
            pattern(round * REQUESTS + number, offset, length)
        };
        for round in 1..=2 {
            let writes =
                (0..REQUESTS).map(|number| (0, Request::write(place_of(number).0, data_of(number, round))));
            disk.all_succeed(writes.collect())?;
            let reads = (0..REQUESTS).map(|number| {
                let (offset, length) = place_of(number);
                (0, Request::read(offset, length))
            });
            for (number, found) in (0..).zip(disk.all_succeed(reads.collect())?) {
                same(place_of(number).0, &found, &data_of(number, round))?;
            }
        }
        Ok(())
    })
}
