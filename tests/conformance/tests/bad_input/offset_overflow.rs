//! Offset plus length past 2^64, where a careless sum comes out small: refused like every range past the end.

use anyhow::ensure;
use spline_conformance::raw::{Raw, chunk, cmd, errno};
use spline_conformance::stage::play;

const RANGES: [(u64, u32); 5] =
    [(u64::MAX, 1), (u64::MAX, 512), (u64::MAX - 511, 512), (u64::MAX - 4095, 8192), (1 << 63, 4096)];

#[test]
fn is_past_the_end() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        for range in RANGES {
            for command in [cmd::READ, cmd::TRIM, cmd::CACHE] {
                raw.expect_errno((command, 0), range, &[], errno::EINVAL)?;
            }
            let data = vec![0xbb; range.1 as usize];
            raw.expect_errno((cmd::WRITE, 0), range, &data, errno::ENOSPC)?;
            raw.expect_errno((cmd::WRITE_ZEROES, 0), range, &[], errno::ENOSPC)?;
        }
        for range in [(u64::MAX, u32::MAX), (u64::MAX - u64::from(u32::MAX) + 1, u32::MAX)] {
            raw.expect_errno((cmd::READ, 0), range, &[], errno::EINVAL)?;
            raw.expect_errno((cmd::WRITE_ZEROES, 0), range, &[], errno::ENOSPC)?;
        }
        ensure!(raw.read(0, 8192)? == vec![0; 8192], "something was written at the start");
        Ok(())
    })
}

#[test]
fn with_structured_replies_too() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::structured(&stage.export)?;
        for range in RANGES {
            for command in [cmd::READ, cmd::BLOCK_STATUS] {
                let cookie = raw.ask((command, 0), range, &[])?;
                let refused = raw.chunk()?;
                ensure!(
                    refused.done && refused.cookie == cookie && refused.kind == chunk::ERROR,
                    "{refused:?}"
                );
                ensure!(refused.errno() == errno::EINVAL, "{refused:?}");
            }
        }
        Ok(())
    })
}
