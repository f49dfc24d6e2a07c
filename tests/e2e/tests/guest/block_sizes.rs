//! Volumes of either block size, and one that may only be read.

use crate::scripts::script;
use anyhow::{Context, ensure};
use spline_harness::guest::Machine;
use spline_harness::vhost::{Shown, VhostExport};
use spline_harness::{Cluster, Guest, Tool};

const NAMES: [&str; 3] = ["of-512", "of-4096", "read-only"];
/// sha256 of what is written to the third volume before it is shown: 64 KiB of 0x5a.
const HASH_COMMAND: &str = "head -c 65536 /dev/zero | tr '\\0' '\\132' | sha256sum | cut -d' ' -f1";

#[test]
fn are_what_the_volume_says_and_read_only_is_read_only() -> anyhow::Result<()> {
    let cluster = Cluster::start()?;
    for (name, block) in NAMES.into_iter().zip(["512", "4096", "4096"]) {
        cluster.spline(&["volume", "create", name, "64M", "--block-size", block])?;
    }
    let mut writable = cluster.export(NAMES[2], false)?;
    Tool::new("qemu-io").args(["-f", "raw", "-c", "write -P 0x5a 0 64k", &writable.uri()]).run()?;
    writable.nebd.kill9()?;

    let mut exports = Vec::new();
    for name in NAMES {
        let shown = Shown { queues: 2, read_only: name == NAMES[2] };
        exports.push(VhostExport::start(cluster.dir(), &cluster.gateway_socket(), name, shown)?);
    }
    let machine = Machine::new(exports.iter().map(|export| (&*export.socket, 2)));
    let text = script(&[], include_str!("scripts/block_sizes.sh"));
    let mut guest = Guest::start(cluster.dir(), "block-sizes", &machine, &text)?;
    let sizes = guest.wait_for("sizes ")?;
    ensure!(sizes == "512 4096 4096", "sizes={sizes}");
    ensure!(guest.wait_for("read-only ")? == "1");
    let wanted = Tool::new("sh").args(["-c", HASH_COMMAND]).run()?;
    let holds = guest.wait_for("holds ").context("what the read-only disk holds")?;
    ensure!(holds == wanted.trim(), "holds={holds} wanted={wanted}");
    guest.finish().map(drop)
}
