//! Where bad guests are tried: a nebd with their disk and a neighbour's, who works all the while, and eyes on nebd's memory,
//! threads and descriptors.
//!
//! Called by the tests of bad guests and bad messages. Must never know: what is bad about a guest.

use super::{Guest, OK, Piece, Setup, header, kind};
use crate::raw;
use crate::{MIB, pattern};
use anyhow::{Context, bail, ensure};
use spline_harness::vhost::Shown;
use spline_harness::{Process, Rig, VhostExport, nbd, wait_until};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// Bytes of the disk.
pub const DISK: u64 = 64 * MIB;
/// Sectors of the disk.
pub const SECTORS: u64 = DISK / 512;
/// Sectors at the disk's end that tests leave alone.
const PROBE: u64 = 64;
/// How much nebd may grow by a guest that has no right to memory: its buffers and the allocator's slack, KiB.
const GROWTH_KIB: u64 = 8 << 10;
/// Between two rounds of the neighbour, so that it leaves the machine to the test.
const PAUSE: Duration = Duration::from_millis(1);
/// Far above what the end of a connection takes.
const LIMIT: Duration = Duration::from_secs(40);

/// A disk of a bad guest.
#[derive(Debug)]
pub struct Stage {
    /// The gateway behind it, on the file engine: what is tested is in front.
    pub rig: Rig,
    /// The disk.
    pub export: VhostExport,
}

/// What a process holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Held {
    descriptors: usize,
    threads: usize,
}

/// Tries something on a disk; afterwards the neighbour must have worked throughout, nebd must hold no more than before,
/// and a good guest must be served.
///
/// # Errors
/// What did not hold.
pub fn play(test: impl FnOnce(&mut Stage) -> anyhow::Result<()>) -> anyhow::Result<()> {
    play_as(Shown::default(), test)
}

/// As [`play`], on a disk that is shown otherwise.
///
/// # Errors
/// What did not hold.
pub fn play_as(shown: Shown, test: impl FnOnce(&mut Stage) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let rig = Rig::file()?;
    let (disk, other) = (rig.create("disk", DISK)?, rig.create("other", DISK)?);
    let export = rig.export_to_guest_beside(&disk, shown, &other)?;
    let mut stage = Stage { rig, export };
    let other = stage.export.neighbour.clone().context("a neighbour was asked for")?;
    let mut witness = wait_until("the neighbour to be served", LIMIT, || {
        nbd::Connection::open(&other.socket, &other.volume, LIMIT).map(Some)
    })?;
    (0..2).try_for_each(|round| work(&mut witness, round))?;
    // Every thread of nebd has its link when each queue was used.
    (0..2).try_for_each(|_| stage.warm_up(shown))?;
    let (held, memory) = (stage.settled()?, stage.own_kib()?);
    let (stop, stopped) = mpsc::channel::<()>();
    let neighbour = std::thread::spawn(move || -> anyhow::Result<()> {
        let mut round = 1;
        loop {
            let last = stopped.recv_timeout(PAUSE) != Err(RecvTimeoutError::Timeout);
            round += 1;
            work(&mut witness, round).with_context(|| format!("round={round}"))?;
            if last {
                return Ok(());
            }
        }
    });
    let outcome = test(&mut stage)
        .and_then(|()| stage.works(shown.read_only).context("a good guest that comes afterwards"))
        .and_then(|()| stage.wait_until_held(held));
    drop(stop);
    let Ok(worked) = neighbour.join() else { bail!("the neighbour panicked") };
    outcome.with_context(|| stage.export.nebd.log_tail())?;
    worked.context("another export was disturbed")?;
    stage.export.nebd.assert_running()?;
    let grown = stage.own_kib()?.saturating_sub(memory);
    ensure!(grown <= GROWTH_KIB, "nebd grew: kib={grown} limit={GROWTH_KIB}");
    ensure!(!stage.export.nebd.log()?.contains("panicked"), "{}", stage.export.nebd.log_tail());
    Ok(())
}

/// One round of the neighbour: writes a block and reads it back.
fn work(witness: &mut nbd::Connection, round: u64) -> anyhow::Result<()> {
    let place = round % 16 * 4096;
    let data = pattern(round, place, 4096);
    witness.succeed(nbd::Kind::Write, place, 4096, &data)?;
    let found = witness.succeed(nbd::Kind::Read, place, 4096, &[])?;
    ensure!(found == data, "read something else than was written: offset={place}");
    Ok(())
}

impl Stage {
    /// Where front-ends connect.
    pub fn socket(&self) -> &Path {
        &self.export.socket
    }

    /// The gateway behind the disk, to be held back so that requests stay in flight. The neighbour waits then, too.
    pub fn gateway(&self) -> &Process {
        self.rig.gateway()
    }

    /// A guest that uses all queues.
    fn warm_up(&self, shown: Shown) -> anyhow::Result<()> {
        let mut guest = self.guest_as(Setup { queues: shown.queues, ..Setup::default() })?;
        let read = [Piece::Out(header(kind::IN, 0)), Piece::In(512), Piece::In(1)];
        for queue in 0..usize::from(shown.queues) {
            ensure!(guest.status(queue, &read)? == OK, "queue={queue}");
        }
        Ok(())
    }

    /// A guest as it should be is served.
    ///
    /// # Errors
    /// If it is not.
    pub fn works(&self, read_only: bool) -> anyhow::Result<()> {
        let mut guest = Guest::usual(self.socket())?;
        let sector = SECTORS - PROBE;
        if !read_only {
            let data = pattern(7, sector, 4096);
            guest.write(sector, &data)?;
            ensure!(guest.read(sector, 4096)? == data, "a good guest reads something else than it wrote");
        }
        guest.read(0, 512).map(drop)
    }

    /// A guest with one queue.
    ///
    /// # Errors
    /// If it is not served.
    pub fn guest(&self) -> anyhow::Result<Guest> {
        Guest::usual(self.socket())
    }

    /// A guest that is otherwise.
    ///
    /// # Errors
    /// If it is not served.
    pub fn guest_as(&self, setup: Setup) -> anyhow::Result<Guest> {
        Guest::started(self.socket(), setup)
    }

    /// What breaks the queue of a guest is counted; afterwards the queue can be made anew.
    ///
    /// # Errors
    /// If the queue goes on, or does not serve again.
    pub fn breaks(
        &self,
        setup: Setup,
        wrong: impl FnOnce(&mut Guest) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let counted = self.export.metric("spline_nebd_broken_queues")?;
        let mut guest = self.guest_as(setup)?;
        wrong(&mut guest)?;
        guest.broken(0)?;
        wait_until("a broken queue to be counted", LIMIT, || {
            Ok((self.export.metric("spline_nebd_broken_queues")? > counted).then_some(()))
        })?;
        guest.mend(0)
    }

    /// As [`Stage::breaks`], where the device may also answer the request with an error, in the byte that is answered here.
    ///
    /// # Errors
    /// If the request succeeds, or the guest is not served afterwards.
    pub fn fails(
        &self,
        setup: Setup,
        wrong: impl FnOnce(&mut Guest) -> anyhow::Result<u64>,
    ) -> anyhow::Result<()> {
        let mut guest = self.guest_as(setup)?;
        let status = wrong(&mut guest)?;
        guest.broken_or_refused(0, status)?;
        guest.mend(0)
    }

    fn nebd_id(&self) -> anyhow::Result<u32> {
        self.export.nebd.id().context("nebd does not run")
    }

    fn held(&self) -> anyhow::Result<Held> {
        let count = |what: &str| -> anyhow::Result<usize> {
            Ok(std::fs::read_dir(format!("/proc/{}/{what}", self.nebd_id()?))?.count())
        };
        Ok(Held { descriptors: count("fd")?, threads: count("task")? })
    }

    /// What nebd holds once it has noticed that nobody is connected.
    fn settled(&self) -> anyhow::Result<Held> {
        let mut last = self.held()?;
        let mut same = 0;
        wait_until("nebd to let go", LIMIT, || {
            let now = self.held()?;
            same = if now == last { same + 1 } else { 0 };
            last = now;
            Ok((same >= 5).then_some(now))
        })
    }

    /// Waits until nebd holds no more than that.
    fn wait_until_held(&self, before: Held) -> anyhow::Result<()> {
        wait_until("nebd to close what the guest left", LIMIT, || {
            let now = self.held()?;
            let listed = || -> Vec<String> {
                let Ok(id) = self.nebd_id() else { return Vec::new() };
                let entries = std::fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
                entries
                    .filter_map(|entry| Some(std::fs::read_link(entry.path()).ok()?.display().to_string()))
                    .collect()
            };
            ensure!(
                now.descriptors <= before.descriptors && now.threads <= before.threads,
                "now={now:?} before={before:?} descriptors={:?}",
                listed()
            );
            Ok(Some(()))
        })
    }

    /// Memory of nebd's own, KiB: what it shares with the guest is the guest's.
    fn own_kib(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.nebd_id()?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// A connection to the neighbour, byte by byte.
    ///
    /// # Errors
    /// If it is refused.
    pub fn neighbour(&self) -> anyhow::Result<raw::Raw> {
        let neighbour = self.export.neighbour.as_ref().context("a neighbour was asked for")?;
        let mut raw = raw::Raw::haggling(&neighbour.socket)?;
        raw.go(neighbour.volume.as_bytes(), &[])?;
        Ok(raw)
    }
}
