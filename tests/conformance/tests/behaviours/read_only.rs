//! A disk that refuses writes says so; it is read, and what would change it is refused.

use anyhow::ensure;
use spline_conformance::MIB;
use spline_conformance::disk::Request;
use spline_conformance::place::{Place, on};

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let served = place.serve_read_only(8 * MIB)?;
    on(&served, || {
        // A driver that means to write does not take it; NBD clients find out by its flags.
        ensure!(
            served.open().map_or(true, |disk| disk.facts().read_only),
            "it does not say that it is read-only"
        );
        let mut disk = served.open_with(1, true)?;
        ensure!(disk.facts().read_only && disk.facts().size == 8 * MIB, "{:?}", disk.facts());
        disk.holds(0, &vec![0; MIB as usize])?;
        disk.refuse(Request::write(0, vec![1; 4096]))?;
        disk.refuse(Request::Discard { offset: 0, length: 4096 })?;
        disk.refuse(Request::Zero { offset: 0, length: 4096, unmap: false })?;
        disk.succeed(Request::Flush)?;
        disk.holds(0, &[0; 4096])
    })
}
