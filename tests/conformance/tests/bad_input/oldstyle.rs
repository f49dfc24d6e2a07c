//! Clients of the old negotiations: oldstyle sends requests at once and is closed; newstyle that is not fixed knows
//! EXPORT_NAME only, and is served by it (NBD proto.md, "Newstyle negotiation").

use anyhow::ensure;
use spline_conformance::raw::{Raw, cmd, opt, option, request};
use spline_conformance::stage::{DISK, play};

#[test]
fn oldstyle_is_closed() -> anyhow::Result<()> {
    play(|stage| {
        Raw::greeted(stage.socket())?.cut_by(&request(cmd::READ, 0, 1, (0, 512)))?;
        let pipelined = request(cmd::READ, 0, 1, (0, 512)).repeat(1000);
        Raw::greeted(stage.socket())?.cut_by(&pipelined)
    })
}

#[test]
fn newstyle_that_is_not_fixed_is_served_by_name_only() -> anyhow::Result<()> {
    play(|stage| {
        for other in [opt::LIST, opt::INFO, opt::GO, opt::STARTTLS, opt::STRUCTURED_REPLY, opt::ABORT, 77] {
            let mut raw = Raw::greeted(stage.socket())?;
            raw.send(&0u32.to_be_bytes())?;
            raw.cut_by(&option(other, &[]))?;
        }
        let mut raw = Raw::greeted(stage.socket())?;
        raw.send(&0u32.to_be_bytes())?;
        raw.send(&option(opt::EXPORT_NAME, stage.name()))?;
        let answer = raw.bytes(8 + 2 + 124)?;
        ensure!(answer[..8] == DISK.to_be_bytes(), "size={:?}", &answer[..8]);
        ensure!(answer[10..].iter().all(|byte| *byte == 0), "124 bytes of zeros: {answer:?}");
        ensure!(raw.read(0, 512)? == vec![0; 512]);
        Ok(())
    })
}
