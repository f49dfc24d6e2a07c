//! Commands that nobody knows: EINVAL, and the connection goes on. Whatever their length says, no data follows.

use spline_conformance::raw::{Raw, cmd, errno, flag};
use spline_conformance::stage::play;

#[test]
fn is_invalid_and_the_connection_goes_on() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        for command in (cmd::BLOCK_STATUS + 1..40).chain([255, 256, 0x7fff, 0x8000, 0xfffe, 0xffff]) {
            for range in [(0, 0), (0, 512), (u64::MAX, u32::MAX)] {
                for flags in [0, flag::FUA, 0xffff] {
                    raw.expect_errno((command, flags), range, &[], errno::EINVAL)?;
                }
            }
        }
        raw.read(0, 512)?;
        let mut structured = Raw::structured(&stage.export)?;
        let cookie = structured.ask((99, 0), (0, 512), &[])?;
        let chunk = structured.chunk()?;
        anyhow::ensure!(chunk.done && chunk.cookie == cookie && chunk.errno() == errno::EINVAL, "{chunk:?}");
        Ok(())
    })
}
