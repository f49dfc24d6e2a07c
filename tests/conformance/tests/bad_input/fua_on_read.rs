//! FUA with commands that write nothing: the server must accept it with every command (NBD proto.md,
//! "NBD_CMD_FLAG_FUA").

use anyhow::ensure;
use spline_conformance::raw::{Raw, chunk, cmd, flag};
use spline_conformance::stage::play;

#[test]
fn is_accepted_with_every_command() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        raw.expect_errno((cmd::WRITE, flag::FUA), (0, 4096), &[0x42; 4096], 0)?;
        raw.expect_errno((cmd::READ, flag::FUA), (0, 4096), &[], 0)?;
        ensure!(raw.bytes(4096)? == [0x42; 4096]);
        for (command, length) in
            [(cmd::FLUSH, 0), (cmd::CACHE, 4096), (cmd::TRIM, 4096), (cmd::WRITE_ZEROES, 4096)]
        {
            raw.expect_errno((command, flag::FUA), (0, length), &[], 0)?;
        }
        raw.expect_errno((cmd::READ, flag::FUA), (0, 512), &[], 0)?;
        raw.bytes(512)?;
        let mut structured = Raw::structured(&stage.export)?;
        structured.ask((cmd::BLOCK_STATUS, flag::FUA), (0, 4096), &[])?;
        let status = structured.chunk()?;
        ensure!(status.kind == chunk::BLOCK_STATUS, "{status:?}");
        // A goodbye with FUA is a goodbye.
        structured.ask((cmd::DISC, flag::FUA), (0, 0), &[])?;
        structured.closed()
    })
}
