//! Something else where a request's magic must be: the connection is closed, and nothing behind it is carried out.

use anyhow::ensure;
use spline_conformance::raw::{REQUEST_MAGIC, Raw, cmd, request};
use spline_conformance::stage::play;

#[test]
fn closes_the_connection() -> anyhow::Result<()> {
    play(|stage| {
        for bit in 0..32 {
            let mut raw = Raw::entered(&stage.export)?;
            raw.read(0, 512)?;
            let mut bytes = request(cmd::WRITE, 0, 9, (0, 512));
            bytes[..4].copy_from_slice(&(REQUEST_MAGIC ^ 1 << bit).to_be_bytes());
            bytes.extend([0xbb; 512]);
            // A good one behind the bad one, which nobody may find.
            bytes.extend(request(cmd::WRITE, 0, 10, (512, 512)));
            bytes.extend([0xbb; 512]);
            raw.cut_by(&bytes)?;
        }
        for reply_magic in [0x6744_6698u32, 0x668e_33ef, 0, u32::MAX] {
            let mut raw = Raw::structured(&stage.export)?;
            raw.cut_by(&[&reply_magic.to_be_bytes()[..], &[0; 24]].concat())?;
        }
        let found = Raw::entered(&stage.export)?.read(0, 1024)?;
        ensure!(found == vec![0; 1024], "something was written");
        Ok(())
    })
}
