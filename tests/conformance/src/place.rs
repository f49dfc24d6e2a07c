//! Where behaviours are tried: NBD and vhost-user-blk, on files and on a cluster; and, to prove the behaviours themselves,
//! on the vhost-user-blk export of qemu-storage-daemon.

use crate::disk::Disk;
use crate::disk::nbd::NbdDisk;
use crate::disk::virtio::GuestDisk;
use anyhow::{Context, bail};
use spline_harness::storage_daemon::Serving;
use spline_harness::vhost::Shown;
use spline_harness::{Export, Rig, StorageDaemon, VhostExport};
use std::cell::Cell;
use std::path::{Path, PathBuf};

/// Queues that every disk has.
pub const QUEUES: u16 = 4;

/// What a disk is asked with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Front {
    /// NBD clients.
    Nbd,
    /// A guest's driver.
    Vhost,
}

/// Something that serves disks.
#[derive(Debug)]
pub struct Place {
    front: Front,
    ground: Ground,
    disks: Cell<u32>,
}

#[derive(Debug)]
enum Ground {
    Ours(Rig),
    StorageDaemon(PathBuf),
}

impl Place {
    /// Ours, on an engine.
    pub fn ours(front: Front, rig: Rig) -> Self {
        Self { front, ground: Ground::Ours(rig), disks: Cell::new(0) }
    }

    /// qemu-storage-daemon, on files in `dir`.
    pub fn storage_daemon(dir: &Path) -> Self {
        Self { front: Front::Vhost, ground: Ground::StorageDaemon(dir.to_owned()), disks: Cell::new(0) }
    }

    /// Serves a new disk of `bytes`.
    ///
    /// # Errors
    /// Why it is not served.
    pub fn serve(&self, bytes: u64) -> anyhow::Result<Served> {
        self.serve_as(bytes, false)
    }

    /// Serves a new disk that refuses writes.
    ///
    /// # Errors
    /// Why it is not served.
    pub fn serve_read_only(&self, bytes: u64) -> anyhow::Result<Served> {
        self.serve_as(bytes, true)
    }

    fn serve_as(&self, bytes: u64, read_only: bool) -> anyhow::Result<Served> {
        let number = self.disks.get();
        self.disks.set(number + 1);
        let name = format!("disk{number}");
        let rig = match &self.ground {
            Ground::Ours(rig) => rig,
            Ground::StorageDaemon(dir) => {
                let file = dir.join(format!("{name}.img"));
                std::fs::File::create(&file)?.set_len(bytes)?;
                let serving = Serving { read_only, queues: QUEUES };
                return Ok(Served::StorageDaemon(StorageDaemon::start(dir, &name, &file, serving)?));
            }
        };
        let volume = rig.create(&name, bytes)?;
        Ok(match self.front {
            Front::Nbd => Served::Nbd(rig.export(&volume, read_only)?),
            Front::Vhost => Served::Vhost(rig.export_to_guest(&volume, Shown { read_only, queues: QUEUES })?),
        })
    }

    /// The rig, if it is ours.
    pub fn rig(&self) -> Option<&Rig> {
        match &self.ground {
            Ground::Ours(rig) => Some(rig),
            Ground::StorageDaemon(_) => None,
        }
    }
}

/// A disk that is served.
#[derive(Debug)]
pub enum Served {
    /// Ours, over NBD.
    Nbd(Export),
    /// Ours, to a guest.
    Vhost(VhostExport),
    /// Another's, to a guest.
    StorageDaemon(StorageDaemon),
}

impl Served {
    /// A client with one queue.
    ///
    /// # Errors
    /// If it is refused.
    pub fn open(&self) -> anyhow::Result<Box<dyn Disk>> {
        self.open_with(1, false)
    }

    /// A client with some queues; `read_only`: one that takes a disk that refuses writes.
    ///
    /// # Errors
    /// If it is refused.
    pub fn open_with(&self, queues: usize, read_only: bool) -> anyhow::Result<Box<dyn Disk>> {
        Ok(match self {
            Self::Nbd(export) => Box::new(NbdDisk::open(&export.socket, &export.volume, queues)?),
            Self::Vhost(export) => Box::new(GuestDisk::open(&export.socket, queues, read_only)?),
            Self::StorageDaemon(daemon) => Box::new(GuestDisk::open(&daemon.socket, queues, read_only)?),
        })
    }

    /// Kills who serves it and starts it again.
    ///
    /// # Errors
    /// If it does not serve then.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Nbd(export) => {
                export.nebd.restart()?;
                export.wait_until_serving()
            }
            Self::Vhost(export) => export.restart(),
            Self::StorageDaemon(daemon) => daemon.restart(),
        }
    }

    fn log_tail(&self) -> String {
        match self {
            Self::Nbd(export) => export.nebd.log_tail(),
            Self::Vhost(export) => export.nebd.log_tail(),
            Self::StorageDaemon(daemon) => daemon.process.log_tail(),
        }
    }
}

/// A behaviour's name, and what tries it on a place.
pub type Behaviour = (&'static str, fn(&Place) -> anyhow::Result<()>);

/// Tries every behaviour on a place; all of them, whatever fails before.
///
/// # Errors
/// All that do not hold.
pub fn try_all(place: &Place, behaviours: &[Behaviour]) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for (name, behaviour) in behaviours {
        let begun = std::time::Instant::now();
        let outcome = behaviour(place);
        println!(
            "{name}: {} ({:.1} s)",
            if outcome.is_ok() { "ok" } else { "FAILED" },
            begun.elapsed().as_secs_f64()
        );
        failed.extend(outcome.err().map(|error| format!("{name}: {error:#}")));
    }
    if !failed.is_empty() {
        bail!("{} of {} behaviours do not hold:\n{}", failed.len(), behaviours.len(), failed.join("\n"));
    }
    Ok(())
}

/// Runs a test on a served disk; shows the server's log if it fails.
///
/// # Errors
/// What did not hold.
pub fn on(served: &Served, test: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    test().with_context(|| served.log_tail())
}
