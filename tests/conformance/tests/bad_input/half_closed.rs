//! A client that closes its sending side: what it asked before is answered, then the server closes; a message that can no
//! longer become whole is forgotten.

use anyhow::ensure;
use spline_conformance::raw::{Raw, cmd, info_data, opt, option, rep, request};
use spline_conformance::stage::play;

#[test]
fn in_the_handshake() -> anyhow::Result<()> {
    play(|stage| {
        let mut silent = Raw::greeted(stage.socket())?;
        silent.half_close()?;
        silent.closed()?;
        let mut raw = Raw::haggling(stage.socket())?;
        raw.send(&option(opt::LIST, &[]))?;
        raw.send(&option(opt::GO, &info_data(stage.name(), &[])))?;
        raw.half_close()?;
        raw.expect_replies(opt::LIST, &[rep::SERVER, rep::ACK])?;
        raw.expect_replies(opt::GO, &[rep::INFO, rep::ACK])?;
        raw.closed()
    })
}

#[test]
fn with_requests_in_flight() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        for cookie in 0..64u64 {
            let data = [cookie as u8; 4096];
            raw.send(&[&request(cmd::WRITE, 0, cookie, (cookie * 4096, 4096))[..], &data].concat())?;
        }
        raw.half_close()?;
        let mut answered = (0..64).map(|_| raw.simple()).collect::<anyhow::Result<Vec<_>>>()?;
        answered.sort_unstable();
        ensure!(answered.iter().enumerate().all(|(at, found)| *found == (at as u64, 0)), "{answered:?}");
        raw.closed()
    })
}

#[test]
fn in_the_middle_of_a_message() -> anyhow::Result<()> {
    play(|stage| {
        let whole = [&request(cmd::WRITE, 0, 1, (0, 4096))[..], &[0xbb; 4096]].concat();
        for end in [1, 4, 27, 28, 29, 1000, whole.len() - 1] {
            let mut raw = Raw::entered(&stage.export)?;
            raw.send(&whole[..end])?;
            raw.half_close()?;
            raw.closed()?;
        }
        let found = Raw::entered(&stage.export)?.read(0, 4096)?;
        ensure!(found == vec![0; 4096], "half a write was carried out");
        Ok(())
    })
}
