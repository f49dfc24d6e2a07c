//! A request's data in many pieces of memory: pieces of one byte, odd pieces, pieces across pages, as many as a device takes.

use spline_conformance::disk::{Request, same};
use spline_conformance::place::{Place, on};
use spline_conformance::{MIB, pattern};

pub(crate) fn check(place: &Place) -> anyhow::Result<()> {
    let served = place.serve(64 * MIB)?;
    let mut shapes: Vec<Vec<usize>> = vec![
        vec![512],
        vec![1, 511],
        vec![511, 1],
        vec![1, 1, 1, 509],
        vec![513, 511, 7, 505],
        vec![4096, 4096],
        vec![4095, 4097],
        vec![1, 4096, 4095],
        vec![3, 65_536, 509, 12_288],
        vec![256 << 10; 4],
        vec![100_000, 300_001, 648_575],
    ];
    // As many as a ring of 128 takes beside the header and the status.
    shapes.push(vec![512; 120]);
    shapes.push((0..120).map(|piece| if piece % 2 == 0 { 500 } else { 524 }).collect());
    on(&served, || {
        let mut disk = served.open()?;
        for (number, shape) in shapes.iter().enumerate() {
            let offset = number as u64 * 2 * MIB + 512;
            let data = pattern(number as u64, offset, shape.iter().sum());
            let mut rest = &data[..];
            let pieces = shape.iter().map(|length| {
                let (piece, left) = rest.split_at(*length);
                rest = left;
                piece.to_vec()
            });
            let write = Request::Write { offset, pieces: pieces.collect() };
            disk.succeed(write)?;
            disk.holds(offset, &data)?;
            let mut reversed = shape.clone();
            reversed.reverse();
            for pieces in [shape.clone(), reversed] {
                same(offset, &disk.succeed(Request::Read { offset, pieces })?, &data)?;
            }
        }
        Ok(())
    })
}
