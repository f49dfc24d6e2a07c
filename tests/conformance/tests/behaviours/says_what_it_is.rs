//! The size to the sector, a block size, and that it takes writes, discards and zeroes.

use anyhow::ensure;
use spline_conformance::MIB;
use spline_conformance::place::{Place, on};

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    for size in [MIB, 64 * MIB, 3 * 1024 * MIB] {
        let served = place.serve(size)?;
        on(&served, || {
            let disk = served.open()?;
            let facts = disk.facts();
            ensure!(facts.size == size, "{facts:?} wanted={size}");
            ensure!(
                facts.block_size.is_power_of_two() && (512..=4096).contains(&facts.block_size),
                "{facts:?}"
            );
            ensure!(!facts.read_only && facts.discards && facts.zeroes, "{facts:?}");
            Ok(())
        })?;
    }
    Ok(())
}
