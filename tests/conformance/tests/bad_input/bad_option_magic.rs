//! Something else where an option's magic must be: the connection is closed, there is no way to find the next option.

use spline_conformance::raw::{OPTION_MAGIC, Raw, opt, option, rep};
use spline_conformance::stage::play;

#[test]
fn closes_the_connection() -> anyhow::Result<()> {
    play(|stage| {
        for bit in 0..64 {
            let mut bytes = option(opt::LIST, &[]);
            bytes[..8].copy_from_slice(&(OPTION_MAGIC ^ 1 << bit).to_be_bytes());
            Raw::haggling(stage.socket())?.cut_by(&bytes)?;
        }
        let mut later = Raw::haggling(stage.socket())?;
        later.expect(opt::LIST, &[], &[rep::SERVER, rep::ACK])?;
        later.cut_by(&[0; 16])?;
        // The server's own words, thrown back.
        Raw::greeted(stage.socket())?.cut_by(b"NBDMAGICIHAVEOPT\0\x03")?;
        Raw::haggling(stage.socket())?.cut_by(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    })
}
