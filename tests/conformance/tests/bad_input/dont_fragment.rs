//! The "do not fragment" flag: EINVAL without structured replies, since the server did not offer it; with them a read
//! comes in one content chunk, holes and all (NBD proto.md, "NBD_CMD_FLAG_DF").

use anyhow::ensure;
use spline_conformance::raw::{Raw, chunk, cmd, errno, flag};
use spline_conformance::stage::play;

#[test]
fn without_structured_replies_is_invalid() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        for range in [(0, 512), (0, 1 << 20), (0, 0)] {
            raw.expect_errno((cmd::READ, flag::DF), range, &[], errno::EINVAL)?;
        }
        raw.read(0, 512).map(drop)
    })
}

#[test]
fn one_chunk_over_data_and_holes() -> anyhow::Result<()> {
    play(|stage| {
        let mut writer = Raw::entered(&stage.export)?;
        writer.write(64 << 10, &[9; 4096])?;
        let mut raw = Raw::structured(&stage.export)?;
        raw.ask((cmd::READ, 0), (0, 256 << 10), &[])?;
        let mut kinds = Vec::new();
        while let Some(part) = Some(raw.chunk()?) {
            kinds.push(part.kind);
            if part.done {
                break;
            }
        }
        ensure!(kinds == [chunk::OFFSET_HOLE, chunk::OFFSET_DATA, chunk::OFFSET_HOLE], "kinds={kinds:?}");
        for length in [65_536u32, 256 << 10, 1 << 20] {
            let cookie = raw.ask((cmd::READ, flag::DF), (0, length), &[])?;
            let whole = raw.chunk()?;
            let (at, data) = whole.data.split_at(8);
            ensure!(whole.done && whole.cookie == cookie && whole.kind == chunk::OFFSET_DATA);
            ensure!(at == [0; 8] && data.len() == length as usize, "bytes={}", data.len());
            let expected = |at: usize| if (64 << 10..68 << 10).contains(&at) { 9 } else { 0 };
            ensure!(data.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
        }
        // Other commands do not have the flag.
        raw.ask((cmd::BLOCK_STATUS, flag::DF), (0, 4096), &[])?;
        ensure!(raw.chunk()?.errno() == errno::EINVAL);
        Ok(())
    })
}
