//! A client that goes while its requests are under way: by DISC it still gets every answer; without a word its requests
//! end for nobody, and nothing of it is left.

use anyhow::{Context, ensure};
use spline_conformance::raw::{Raw, cmd, request};
use spline_conformance::stage::{Stage, play};

/// Sends writes, reads and a flush that stay in flight: the gateway is held back.
fn busy(stage: &Stage) -> anyhow::Result<Raw> {
    let mut raw = Raw::entered(&stage.export)?;
    for cookie in 0..16 {
        let place = (cookie * 4096, 4096);
        raw.send(&[&request(cmd::WRITE, 0, cookie, place)[..], &[cookie as u8 + 1; 4096]].concat())?;
        raw.send(&request(cmd::READ, 0, 100 + cookie, (1 << 20, 65_536)))?;
    }
    raw.send(&request(cmd::FLUSH, 0, 200, (0, 0)))?;
    Ok(raw)
}

#[test]
fn a_goodbye_waits_for_the_answers() -> anyhow::Result<()> {
    play(|stage| {
        stage.gateway()?.stop().context("hold the gateway back")?;
        let mut raw = busy(stage)?;
        raw.send(&request(cmd::DISC, 0, 300, (0, 0)))?;
        // Behind a goodbye nothing counts.
        raw.send(&request(cmd::WRITE, 0, 301, (0, 4096)))?;
        raw.send(&[0xbb; 4096])?;
        stage.gateway()?.cont()?;
        let mut answered = Vec::new();
        for _ in 0..33 {
            let (cookie, error) = raw.simple()?;
            ensure!(error == 0, "cookie={cookie} errno={error}");
            if (100..200).contains(&cookie) {
                raw.bytes(65_536)?;
            }
            answered.push(cookie);
        }
        answered.sort_unstable();
        let expected: Vec<u64> = (0..16).chain(100..116).chain([200]).collect();
        ensure!(answered == expected, "answered={answered:?}");
        raw.closed()?;
        let found = Raw::entered(&stage.export)?.read(0, 16 * 4096)?;
        let expected: Vec<u8> = (0..16).flat_map(|block| [block + 1; 4096]).collect();
        ensure!(found == expected, "what was answered is there, and nothing after the goodbye");
        Ok(())
    })
}

#[test]
fn going_without_a_word_leaves_nothing_behind() -> anyhow::Result<()> {
    play(|stage| {
        stage.gateway()?.stop().context("hold the gateway back")?;
        for _ in 0..8 {
            drop(busy(stage)?);
        }
        // In the middle of a write's data.
        let mut cut = Raw::entered(&stage.export)?;
        cut.send(&request(cmd::WRITE, 0, 1, (2 << 20, 1 << 20)))?;
        cut.send(&[0xbb; 5000])?;
        drop(cut);
        stage.gateway()?.cont()?;
        let mut next = Raw::entered(&stage.export)?;
        // Its writes came before ours on the link, so they have ended one way or the other.
        next.write(0, &[0x33; 65_536])?;
        ensure!(next.read(0, 65_536)? == vec![0x33; 65_536], "a write of a client that has gone came late");
        ensure!(next.read(2 << 20, 1 << 20)? == vec![0; 1 << 20], "half a write was carried out");
        Ok(())
    })
}
