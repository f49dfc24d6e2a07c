//! Offsets and lengths that are no multiples of the announced 512 bytes: refused to a client that asked for the block
//! sizes and so is held to them, served to one that did not (NBD proto.md, "Block size constraints").

use anyhow::ensure;
use spline_conformance::pattern;
use spline_conformance::raw::{INFO_BLOCK_SIZE, Raw, cmd, errno};
use spline_conformance::stage::play;

const RANGES: [(u64, u32); 6] = [(1, 512), (0, 1), (511, 1), (513, 1023), (4095, 2), (0, 511)];

#[test]
fn refused_to_who_knows_the_block_size() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::haggling(stage.socket())?;
        raw.go(stage.name(), &[INFO_BLOCK_SIZE])?;
        for range in RANGES {
            for command in [cmd::READ, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES] {
                raw.expect_errno((command, 0), range, &[], errno::EINVAL)?;
            }
            let data = vec![0xbb; range.1 as usize];
            raw.expect_errno((cmd::WRITE, 0), range, &data, errno::EINVAL)?;
        }
        ensure!(raw.read(0, 8192)? == vec![0; 8192], "a refused write was carried out");
        raw.write(512, &[7; 512])?;
        ensure!(raw.read(512, 512)? == [7; 512]);
        Ok(())
    })
}

#[test]
fn served_to_who_does_not() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        let mut expected = pattern(1, 0, 8192);
        raw.write(0, &expected)?;
        for (seed, (offset, length)) in RANGES.into_iter().enumerate() {
            let data = pattern(100 + seed as u64, offset, length as usize);
            raw.write(offset, &data)?;
            expected[offset as usize..][..length as usize].copy_from_slice(&data);
            ensure!(raw.read(offset, length)? == data, "offset={offset} length={length}");
        }
        ensure!(raw.read(0, 8192)? == expected, "a neighbour was touched");
        Ok(())
    })
}
