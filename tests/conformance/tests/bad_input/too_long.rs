//! Requests for more than 32 MiB: a read is refused; a write's data is skipped and it is refused, or, if it is absurdly
//! long, the connection is closed; commands without data may be as long as the disk.

use anyhow::ensure;
use spline_conformance::raw::{Raw, cmd, errno, request};
use spline_conformance::stage::{DISK, play};

const LIMIT: u32 = 32 << 20;

#[test]
fn reads_are_refused() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        for length in [LIMIT + 1, DISK as u32, 1 << 31, u32::MAX] {
            raw.expect_errno((cmd::READ, 0), (0, length), &[], errno::EINVAL)?;
        }
        raw.read(0, 512).map(drop)
    })
}

#[test]
fn writes_are_skipped_without_taking_memory() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        for length in [LIMIT + 1, LIMIT + 4096] {
            raw.expect_errno((cmd::WRITE, 0), (0, length), &vec![0xbb; length as usize], errno::EINVAL)?;
        }
        ensure!(raw.read(0, 4096)? == vec![0; 4096], "a refused write was carried out");
        Ok(())
    })
}

#[test]
fn writes_without_end_close_the_connection() -> anyhow::Result<()> {
    play(|stage| {
        for length in [2 * LIMIT + 1, 1 << 31, u32::MAX] {
            let mut raw = Raw::entered(&stage.export)?;
            raw.cut_by(&[&request(cmd::WRITE, 0, 1, (0, length))[..], &[0xbb; 4096]].concat())?;
        }
        ensure!(Raw::entered(&stage.export)?.read(0, 4096)? == vec![0; 4096]);
        Ok(())
    })
}

#[test]
fn promised_data_that_never_comes_takes_no_memory() -> anyhow::Result<()> {
    play(|stage| {
        // Each says that it will write 32 MiB, which is allowed, and then says nothing.
        let mut promises = Vec::new();
        for _ in 0..16 {
            let mut raw = Raw::entered(&stage.export)?;
            raw.send(&request(cmd::WRITE, 0, 1, (0, LIMIT)))?;
            raw.send(&[0xbb; 1000])?;
            promises.push(raw);
        }
        stage.works()
    })
}

#[test]
fn commands_without_data_may_be_as_long_as_the_disk() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::entered(&stage.export)?;
        // Not over the bystander's part.
        let most = (DISK - (1 << 20)) as u32;
        raw.write(0, &[0xbb; 4096])?;
        for command in [cmd::WRITE_ZEROES, cmd::TRIM] {
            raw.expect_errno((command, 0), (0, most), &[], 0)?;
        }
        raw.expect_errno((cmd::CACHE, 0), (0, DISK as u32), &[], 0)?;
        ensure!(raw.read(0, 4096)? == vec![0; 4096]);
        for (command, wanted) in [(cmd::WRITE_ZEROES, errno::ENOSPC), (cmd::TRIM, errno::EINVAL)] {
            raw.expect_errno((command, 0), (0, u32::MAX), &[], wanted)?;
        }
        Ok(())
    })
}
