//! Command flags that the command does not have: EINVAL, a write's data is skipped, nothing is carried out (NBD proto.md,
//! "Command flags": a client must not set a bit that is not documented for the command).

use anyhow::ensure;
use spline_conformance::raw::{Raw, cmd, errno, flag};
use spline_conformance::stage::play;

#[test]
fn are_invalid_and_nothing_is_done() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        raw.write(0, &[0x77; 4096])?;
        for (command, known) in [
            (cmd::READ, flag::FUA),
            (cmd::WRITE, flag::FUA),
            (cmd::FLUSH, flag::FUA),
            (cmd::TRIM, flag::FUA),
            (cmd::CACHE, flag::FUA),
            (cmd::WRITE_ZEROES, flag::FUA | flag::NO_HOLE | flag::FAST_ZERO),
        ] {
            let unknown = (0..16).map(|bit| 1u16 << bit).filter(|bit| known & bit == 0);
            for flags in unknown.chain([!known, u16::MAX]) {
                let length = if command == cmd::FLUSH { 0 } else { 4096 };
                let data = vec![0xbb; if command == cmd::WRITE { 4096 } else { 0 }];
                raw.expect_errno((command, flags), (0, length), &data, errno::EINVAL)?;
            }
        }
        ensure!(raw.read(0, 4096)? == vec![0x77; 4096], "a refused request was carried out");
        Ok(())
    })
}
