//! Where bad inputs are tried: a disk, a bystander who works on it all the while, and eyes on nebd's memory and sockets.
//!
//! Called by the tests of bad inputs. Must never know: what is bad about an input.

use crate::raw::Raw;
use crate::{MIB, pattern};
use anyhow::{Context, bail, ensure};
use spline_harness::{Export, Process, Rig, wait_until};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// Bytes of the disk: more than the largest request, so that length alone makes a request bad. All of it is a hole.
pub const DISK: u64 = 64 * MIB;
/// The bystander's own part of the disk, at its end.
const BYSTANDER: u64 = 64 << 10;
/// How much nebd may grow by an input that has no right to memory: its buffers and the allocator's slack, KiB.
const GROWTH_KIB: u64 = 8 << 10;
/// Between two rounds of the bystander, so that it leaves the machine to the test.
const PAUSE: Duration = Duration::from_millis(1);
/// Far above what the end of a connection takes.
const LIMIT: Duration = Duration::from_secs(30);

/// A disk on which something bad happens.
#[derive(Debug)]
pub struct Stage {
    /// The gateway behind it, on the file engine: what is tested is in front.
    pub rig: Rig,
    /// The disk.
    pub export: Export,
}

/// Tries an input on a disk; afterwards the bystander must have worked throughout, every socket of the input must be
/// closed, and nebd must not have grown.
///
/// # Errors
/// What did not hold.
pub fn play(test: impl FnOnce(&Stage) -> anyhow::Result<()>) -> anyhow::Result<()> {
    play_on(&|rig| rig.serve("disk", DISK), GROWTH_KIB, test)
}

/// As [`play`], on a disk that `serve` makes, with another limit of nebd's growth in KiB.
///
/// # Errors
/// What did not hold.
pub fn play_on(
    serve: &dyn Fn(&Rig) -> anyhow::Result<Export>,
    growth_kib: u64,
    test: impl FnOnce(&Stage) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let export = serve(&rig)?;
    let mut stage = Stage { rig, export };
    let mut witness = Raw::entered(&stage.export)?;
    let read_only = stage.read_only()?;
    // When the second is answered, nebd has forgotten whoever asked before.
    (0..2).try_for_each(|round| work(&mut witness, round, read_only))?;
    let (sockets, peak) = (stage.sockets()?, stage.peak_kib()?);
    let (stop, stopped) = mpsc::channel::<()>();
    let bystander = std::thread::spawn(move || -> anyhow::Result<Raw> {
        let mut round = 1;
        loop {
            let last = stopped.recv_timeout(PAUSE) != Err(RecvTimeoutError::Timeout);
            round += 1;
            work(&mut witness, round, read_only).with_context(|| format!("round={round}"))?;
            if last {
                return Ok(witness);
            }
        }
    });
    let outcome = test(&stage).and_then(|()| stage.wait_until_quiet(sockets));
    drop(stop);
    let Ok(worked) = bystander.join() else { bail!("the bystander panicked") };
    outcome.with_context(|| stage.export.nebd.log_tail())?;
    worked.context("another connection was disturbed")?;
    stage.export.nebd.assert_running()?;
    let grown = stage.peak_kib()?.saturating_sub(peak);
    ensure!(grown <= growth_kib, "nebd grew: kib={grown} limit={growth_kib}");
    ensure!(!stage.export.nebd.log()?.contains("panicked"), "{}", stage.export.nebd.log_tail());
    Ok(())
}

/// One round of the bystander: writes a block of its part and reads it back.
fn work(witness: &mut Raw, round: u64, read_only: bool) -> anyhow::Result<()> {
    let place = DISK - BYSTANDER + round % (BYSTANDER / 4096) * 4096;
    if read_only {
        return witness.read(place, 4096).map(drop);
    }
    let data = pattern(round, place, 4096);
    witness.write(place, &data)?;
    ensure!(witness.read(place, 4096)? == data, "read something else than was written: offset={place}");
    Ok(())
}

impl Stage {
    /// Where clients connect.
    pub fn socket(&self) -> &Path {
        &self.export.socket
    }

    /// The export's name.
    pub fn name(&self) -> &[u8] {
        self.export.volume.as_bytes()
    }

    /// The gateway behind the disk, to be held back so that requests stay in flight.
    ///
    /// # Errors
    /// Never, on this stage.
    pub fn gateway(&self) -> anyhow::Result<&Process> {
        match &self.rig {
            Rig::File { gateway, .. } => Ok(gateway),
            Rig::Cluster(_) => bail!("the stage is on files"),
        }
    }

    /// A second connection that works as every other, to show that what came before has not harmed the disk.
    ///
    /// # Errors
    /// If it does not work.
    pub fn works(&self) -> anyhow::Result<()> {
        Raw::entered(&self.export)?.read(0, 512).map(drop)
    }

    fn read_only(&self) -> anyhow::Result<bool> {
        let (_, flags) = Raw::haggling(self.socket())?.go(self.name(), &[])?;
        Ok(flags & 2 != 0)
    }

    /// Open sockets of nebd.
    fn sockets(&self) -> anyhow::Result<usize> {
        let dir = format!("/proc/{}/fd", self.nebd_id()?);
        let links = std::fs::read_dir(&dir)?.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        Ok(links.filter(|to| to.to_string_lossy().starts_with("socket:")).count())
    }

    /// Waits until nebd has closed every socket that the test opened.
    fn wait_until_quiet(&self, sockets: usize) -> anyhow::Result<()> {
        wait_until("nebd to close the sockets", LIMIT, || {
            let open = self.sockets()?;
            ensure!(open <= sockets, "open={open} before={sockets}");
            Ok(Some(()))
        })
    }

    /// The most memory that nebd has ever had, KiB (VmHWM).
    fn peak_kib(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.nebd_id()?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    fn nebd_id(&self) -> anyhow::Result<u32> {
        self.export.nebd.id().context("nebd does not run")
    }
}
