//! Writes to a read-only export: EPERM, a write's data is skipped, and reads go on (NBD proto.md, "Transmission flags").

use anyhow::ensure;
use spline_conformance::raw::{Raw, cmd, errno, flag};
use spline_conformance::stage::{DISK, play_on};

#[test]
fn is_not_permitted() -> anyhow::Result<()> {
    play_on(&|rig| rig.export(&rig.create("disk", DISK)?, true), 8 << 10, |stage| {
        let mut raw = Raw::haggling(stage.socket())?;
        let (_, flags) = raw.go(stage.name(), &[])?;
        // READ_ONLY; neither TRIM, WRITE_ZEROES nor FAST_ZERO.
        ensure!(flags & 2 != 0 && flags & (1 << 5 | 1 << 6 | 1 << 11) == 0, "flags={flags:#x}");
        for range in [(0, 512), (1, 1), (0, 1 << 20), (DISK, 512), (u64::MAX, 512)] {
            for flags in [0, flag::FUA] {
                let data = vec![0xbb; range.1 as usize];
                raw.expect_errno((cmd::WRITE, flags), range, &data, errno::EPERM)?;
                raw.expect_errno((cmd::WRITE_ZEROES, flags), range, &[], errno::EPERM)?;
                raw.expect_errno((cmd::TRIM, flags), range, &[], errno::EPERM)?;
            }
        }
        raw.expect_errno((cmd::FLUSH, 0), (0, 0), &[], 0)?;
        ensure!(raw.read(0, 1 << 20)? == vec![0; 1 << 20], "a refused write was carried out");
        Ok(())
    })
}
