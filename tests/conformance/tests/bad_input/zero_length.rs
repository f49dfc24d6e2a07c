//! Requests for no bytes at all: the specification leaves the answer open but not the connection; ours are done at once.
//! Where there is no such place, or a status is asked of nothing, EINVAL; a write past the end ENOSPC.

use anyhow::ensure;
use spline_conformance::raw::{Raw, chunk, cmd, errno, flag};
use spline_conformance::stage::{DISK, play};

#[test]
fn by_simple_replies() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        for command in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES] {
            for offset in [0, 1, 4096, DISK - 1, DISK] {
                raw.expect_errno((command, 0), (offset, 0), &[], 0)?;
                raw.expect_errno((command, flag::FUA), (offset, 0), &[], 0)?;
            }
            let past =
                if matches!(command, cmd::WRITE | cmd::WRITE_ZEROES) { errno::ENOSPC } else { errno::EINVAL };
            for offset in [DISK + 1, u64::MAX] {
                raw.expect_errno((command, 0), (offset, 0), &[], past)?;
            }
        }
        // A flush is of everything: it has no range.
        raw.expect_errno((cmd::FLUSH, 0), (0, 0), &[], 0)?;
        raw.expect_errno((cmd::FLUSH, 0), (0, 512), &[], errno::EINVAL)?;
        raw.expect_errno((cmd::FLUSH, 0), (512, 0), &[], errno::EINVAL)?;
        raw.read(0, 512).map(drop)
    })
}

#[test]
fn by_structured_replies() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::structured(&stage.export)?;
        let cookie = raw.ask((cmd::READ, 0), (0, 0), &[])?;
        let none = raw.chunk()?;
        ensure!(
            none.done && none.cookie == cookie && none.kind == chunk::NONE && none.data.is_empty(),
            "{none:?}"
        );
        for (command, offset) in [(cmd::READ, DISK + 1), (cmd::READ, u64::MAX), (cmd::BLOCK_STATUS, 0)] {
            raw.ask((command, 0), (offset, 0), &[])?;
            let refused = raw.chunk()?;
            ensure!(refused.errno() == errno::EINVAL, "{refused:?}");
            // An error with an offset must name one inside the request, and there is none.
            ensure!(refused.done && refused.kind == chunk::ERROR, "{refused:?}");
        }
        Ok(())
    })
}
