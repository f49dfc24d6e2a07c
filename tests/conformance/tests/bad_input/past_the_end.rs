//! Ranges that end one byte past the disk: ENOSPC for what writes, EINVAL for the rest (NBD proto.md, "Error values");
//! ranges that end with the disk are served.

use anyhow::ensure;
use spline_conformance::raw::{Raw, cmd, errno};
use spline_conformance::stage::{DISK, play};

#[test]
fn by_one_byte() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        for range in [(DISK, 1), (DISK - 1, 2), (DISK - 511, 512), (DISK - 4096, 4097), (0, DISK as u32 + 1)]
        {
            for command in [cmd::READ, cmd::TRIM, cmd::CACHE] {
                raw.expect_errno((command, 0), range, &[], errno::EINVAL)?;
            }
            raw.expect_errno((cmd::WRITE_ZEROES, 0), range, &[], errno::ENOSPC)?;
            if range.1 <= 4097 {
                let data = vec![0xbb; range.1 as usize];
                raw.expect_errno((cmd::WRITE, 0), range, &data, errno::ENOSPC)?;
            }
        }
        // Behind the bystander nothing may have changed, so the very last byte is only read.
        ensure!(raw.read(DISK - 1, 1)?.len() == 1);
        for command in [cmd::CACHE, cmd::READ] {
            raw.expect_errno((command, 0), (DISK - 512, 512), &[], 0)?;
        }
        ensure!(raw.bytes(512)?.len() == 512);
        Ok(())
    })
}
