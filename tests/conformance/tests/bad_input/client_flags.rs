//! Client flags that nobody knows: the server must drop the connection (NBD proto.md, "Client flags").

use spline_conformance::raw::{Raw, opt, option};
use spline_conformance::stage::play;

#[test]
fn unknown_flags_close_the_connection() -> anyhow::Result<()> {
    play(|stage| {
        let single = (2..32).map(|bit| 1u32 << bit);
        for flags in single.chain([3 | 1 << 2, 3 | 1 << 31, u32::MAX, !3]) {
            let mut raw = Raw::greeted(stage.socket())?;
            raw.cut_by(&[&flags.to_be_bytes()[..], &option(opt::LIST, &[])].concat())?;
        }
        Ok(())
    })
}
