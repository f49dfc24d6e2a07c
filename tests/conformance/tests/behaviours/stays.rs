//! What was written is there for the next client, and for the one after its server was killed.

use spline_conformance::place::{Place, on};
use spline_conformance::{MIB, pattern};

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let mut served = place.serve(64 * MIB)?;
    on(&served, || {
        for round in 0..5u64 {
            // The client before has gone without a word.
            let mut disk = served.open()?;
            for before in 0..round {
                disk.holds(before * 5 * MIB, &pattern(before, 0, 1 << 20))?;
            }
            disk.write(round * 5 * MIB, pattern(round, 0, 1 << 20))?;
        }
        Ok(())
    })?;
    served.restart()?;
    on(&served, || {
        let mut disk = served.open()?;
        (0..5u64).try_for_each(|round| disk.holds(round * 5 * MIB, &pattern(round, 0, 1 << 20)))
    })
}
