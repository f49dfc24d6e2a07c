//! The configuration beyond its end, and writes to it.

use anyhow::ensure;
use spline_conformance::guest::message::{request, u32s};
use spline_conformance::guest::stage::{SECTORS, play};
use spline_conformance::guest::{Guest, Setup};

/// Bytes of a device's configuration at most (VHOST_USER_MAX_CONFIG_SIZE).
const MOST: u32 = 256;

#[test]
fn is_read_within_its_bounds() -> anyhow::Result<()> {
    play(|stage| {
        let mut guest = Guest::greeted(stage.socket(), Setup::default())?;
        let whole = guest.config(0, 60)?;
        ensure!(whole[..8] == SECTORS.to_le_bytes(), "{whole:?}");
        for offset in [0, 1, 8, 59] {
            ensure!(guest.config(offset, 1)? == whole[offset as usize..][..1], "offset={offset}");
        }
        Ok(())
    })
}

#[test]
fn beyond_its_end() -> anyhow::Result<()> {
    play(|stage| {
        for (offset, size, room) in [
            (0, 0, 0),
            (0, MOST + 1, MOST + 1),
            (MOST, 1, 1),
            (MOST - 1, 2, 2),
            (u32::MAX, 2, 2),
            (u32::MAX - 1, 8, 8),
            (1 << 31, 1 << 31, 8),
            (0, u32::MAX, 8),
            // What is said is not what is there.
            (0, 60, 8),
            (0, 8, 60),
        ] {
            let guest = Guest::greeted(stage.socket(), Setup::default())?;
            let body = [u32s(&[offset, size, 0]), vec![0; room as usize]].concat();
            // An error is a reply without content, or the end of the connection.
            if let Ok(reply) = guest.raw.call(request::GET_CONFIG, &body, &[]) {
                ensure!(reply.is_empty(), "offset={offset} size={size} {reply:?}");
            }
        }
        Ok(())
    })
}

#[test]
fn is_not_written() -> anyhow::Result<()> {
    play(|stage| {
        for (offset, size) in [(0, 8), (32, 1), (u32::MAX, 1), (0, MOST + 1)] {
            let mut guest = Guest::greeted(stage.socket(), Setup::default())?;
            let before = guest.config(0, 60)?;
            let body = [u32s(&[offset, size, 0]), vec![0xff; size as usize]].concat();
            let _ = guest.raw.verdict(request::SET_CONFIG, &body, &[])?;
            drop(guest);
            let mut guest = Guest::greeted(stage.socket(), Setup::default())?;
            ensure!(guest.config(0, 60)? == before, "the configuration was changed");
        }
        Ok(())
    })
}
