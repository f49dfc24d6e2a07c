//! What a disk is for: file systems on it, written through four queues, trimmed, found again after a reboot.

use crate::scripts::script;
use anyhow::ensure;
use spline_harness::cluster::START_LIMIT;
use spline_harness::guest::Machine;
use spline_harness::vhost::{Shown, VhostExport};
use spline_harness::{Cluster, Guest, wait_until};

/// mkfs.xfs makes nothing smaller than 300 MB.
const SIZE: &str = "512M";
/// What the guest has written and removed is more than this, in bytes.
const GIVEN_BACK: u64 = 24 << 20;

fn stored(cluster: &Cluster) -> anyhow::Result<u64> {
    Ok(cluster.spline(&["volume", "info", "disk"])?["bytes_stored"].as_u64().unwrap_or(0))
}

#[test]
fn are_made_verified_trimmed_and_survive_a_reboot() -> anyhow::Result<()> {
    let cluster = Cluster::start()?;
    cluster.create_volume("disk", SIZE)?;
    let shown = Shown { queues: 4, ..Shown::default() };
    let export = VhostExport::start(cluster.dir(), &cluster.gateway_socket(), "disk", shown)?;
    let machine = Machine { cpus: 4, ..Machine::new([(&*export.socket, 4)]) };
    let text = script(&[], include_str!("scripts/file_systems.sh"));
    let mut guest = Guest::start(cluster.dir(), "file-systems", &machine, &text)?;
    ensure!(guest.wait_for("queues ")? == "4");
    ensure!(guest.wait_for("serial ")? == "disk", "the serial number is the volume's name");

    guest.wait_for("full")?;
    // Chunkservers report what they store once in a while.
    let full = wait_until("the volume to be full", START_LIMIT, || {
        let full = stored(&cluster)?;
        ensure!(full > GIVEN_BACK, "stored={full}");
        Ok(Some(full))
    })?;
    guest.tell("trim")?;
    guest.wait_for("trimmed")?;
    wait_until("the space to be given back", START_LIMIT, || {
        let left = stored(&cluster)?;
        ensure!(left + GIVEN_BACK <= full, "full={full} left={left}");
        Ok(Some(()))
    })?;
    guest.tell("go on")?;
    guest.wait_for("rebooting")?;
    guest.wait_for("found after the reboot")?;
    guest.finish().map(drop)
}
