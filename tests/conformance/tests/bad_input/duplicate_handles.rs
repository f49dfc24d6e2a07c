//! One handle for many requests in flight: a client's own mistake; each request is answered once, nothing is mixed up
//! between connections.

use anyhow::{Context, ensure};
use spline_conformance::raw::{Raw, cmd, request};
use spline_conformance::stage::play;

const HANDLE: u64 = 0xdead_beef_dead_beef;

#[test]
fn each_request_is_answered_once() -> anyhow::Result<()> {
    play(|stage| {
        let mut both = [Raw::entered(&stage.export)?, Raw::entered(&stage.export)?];
        both[0].write(0, &[1; 4096])?;
        both[0].write(4096, &[2; 4096])?;
        stage.gateway()?.stop().context("hold the gateway back")?;
        for (raw, offset) in both.iter_mut().zip([0, 4096]) {
            for _ in 0..50 {
                raw.send(&request(cmd::READ, 0, HANDLE, (offset, 4096)))?;
            }
            raw.send(&request(cmd::FLUSH, 0, HANDLE + 1, (0, 0)))?;
        }
        stage.gateway()?.cont()?;
        for (raw, byte) in both.iter_mut().zip([1, 2]) {
            let (mut reads, mut flushes) = (0, 0);
            while reads + flushes < 51 {
                match raw.simple()? {
                    (HANDLE, 0) => {
                        ensure!(raw.bytes(4096)? == [byte; 4096], "another connection's data");
                        reads += 1;
                    }
                    (cookie, error) => {
                        ensure!((cookie, error) == (HANDLE + 1, 0), "cookie={cookie:#x} errno={error}");
                        flushes += 1;
                    }
                }
            }
            ensure!((reads, flushes) == (50, 1), "reads={reads} flushes={flushes}");
            raw.send(&request(cmd::DISC, 0, HANDLE, (0, 0)))?;
            raw.closed()?;
        }
        Ok(())
    })
}
