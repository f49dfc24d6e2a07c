//! Four queues at once: what one has written and been told of, another reads; none waits for another.

use anyhow::ensure;
use spline_conformance::disk::{Request, same};
use spline_conformance::place::{Place, QUEUES, on};
use spline_conformance::{MIB, pattern};

const EACH: u64 = 64;

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let served = place.serve(64 * MIB)?;
    on(&served, || {
        let queues = usize::from(QUEUES);
        let mut disk = served.open_with(queues, false)?;
        ensure!(disk.queues() == queues);
        let offset = |number: u64| number * 8192;
        let all = EACH * u64::from(QUEUES);
        let writes = (0..all).map(|number| {
            let data = pattern(number, offset(number), 8192);
            (number as usize % queues, Request::write(offset(number), data))
        });
        disk.all_succeed(writes.collect())?;
        // Each reads what its neighbour has written.
        let reads =
            (0..all).map(|number| ((number as usize + 1) % queues, Request::read(offset(number), 8192)));
        for (number, found) in (0..).zip(disk.all_succeed(reads.collect())?) {
            same(offset(number), &found, &pattern(number, offset(number), 8192))?;
        }
        // One queue alone, while the others are idle.
        for queue in 0..queues {
            let at = offset(all + queue as u64);
            disk.all_succeed(vec![(queue, Request::write(at, pattern(7, at, 4096)))])?;
            let found = disk.all_succeed(vec![(queue, Request::read(at, 4096)), (queue, Request::Flush)])?;
            same(at, &found[0], &pattern(7, at, 4096))?;
        }
        Ok(())
    })
}
