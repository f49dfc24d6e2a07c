//! Many volumes of one gateway, each with a nebd and a client of its own: a host full of guests.
//!
//! Called by [`crate::upgrade`] and [`crate::idle`]. Must not know: what is measured.

use crate::guest;
use anyhow::Context;
use spline_harness::nbd::Connection;
use spline_harness::vhost::Shown;
use spline_harness::virtio::VirtioDisk;
use spline_harness::{Cluster, Export, Rig, Shape, VhostExport};
use std::time::Duration;

/// Bytes of each volume; those of a cluster take space only where they are written.
pub const VOLUME_BYTES: u64 = 64 << 20;
/// Longest wait of a client for its server.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// What the volumes lie on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Engine {
    /// Files.
    File,
    /// Three chunkservers on one disk, three replicas.
    Cluster,
}

impl Engine {
    /// Both.
    pub const ALL: [Self; 2] = [Self::File, Self::Cluster];

    /// Its name in the tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Cluster => "cluster",
        }
    }

    /// A gateway without volumes.
    ///
    /// # Errors
    /// What does not start.
    pub fn start(self) -> anyhow::Result<Rig> {
        match self {
            Self::File => Rig::file(),
            Self::Cluster => Ok(Rig::Cluster(Box::new(Cluster::start_as(&Shape::default())?))),
        }
    }
}

/// A guest's disk: its nebd, and the guest.
pub struct Disk {
    /// Connected, with one virtqueue running; `None` while something else is.
    pub guest: Option<VirtioDisk>,
    /// The nebd.
    pub export: VhostExport,
}

/// Creates `count` volumes and gives each to a guest, by a nebd of its own.
///
/// # Errors
/// What does not start.
pub fn disks(rig: &Rig, count: usize, shown: Shown) -> anyhow::Result<Vec<Disk>> {
    let one = |number: usize| {
        let volume = rig.create(&format!("disk{number}"), VOLUME_BYTES)?;
        let export = rig.export_to_guest(&volume, shown)?;
        let guest = Some(guest::idle(&export.socket)?);
        Ok::<_, anyhow::Error>(Disk { guest, export })
    };
    (0..count).map(|number| one(number).with_context(|| format!("volume={number}"))).collect()
}

/// Sum of a metric of all these nebds.
///
/// # Errors
/// If one does not answer.
pub fn sum(disks: &[Disk], metric: &str) -> anyhow::Result<f64> {
    disks.iter().map(|disk| disk.export.metric(metric)).sum()
}

/// An NBD export and its client.
pub struct Served {
    /// Connected.
    pub client: Connection,
    /// The nebd.
    pub export: Export,
}

/// Creates `count` volumes and connects an NBD client to each, by a nebd of its own.
///
/// # Errors
/// What does not start.
pub fn served(rig: &Rig, count: usize) -> anyhow::Result<Vec<Served>> {
    let one = |number: usize| {
        let export = rig.serve(&format!("disk{number}"), VOLUME_BYTES)?;
        let client = Connection::open(&export.socket, &export.volume, HANDSHAKE)?;
        Ok::<_, anyhow::Error>(Served { client, export })
    };
    (0..count).map(|number| one(number).with_context(|| format!("volume={number}"))).collect()
}
