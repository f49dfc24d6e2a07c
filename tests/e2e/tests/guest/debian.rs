//! A Debian root file system is copied into a volume, and a guest boots from it to a login prompt under systemd.

use anyhow::Context;
use spline_harness::guest::Machine;
use spline_harness::vhost::{Shown, VhostExport};
use spline_harness::{Cluster, Guest, Tool};
use std::path::Path;

const VOLUME: &str = "root";

#[test]
fn boots_from_a_volume_to_a_login_prompt() -> anyhow::Result<()> {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../qemu/guest-image");
    let image = Tool::new(&recipe.to_string_lossy()).args(["debian"]).run()?.trim().to_owned();
    let cluster = Cluster::start()?;
    cluster.create_volume(VOLUME, "1G")?;
    let mut copied = cluster.export(VOLUME, false)?;
    Tool::new("qemu-img")
        .args(["convert", "-n", "-f", "raw", "-O", "raw", &image, &copied.uri()])
        .run()
        .context("import")?;
    copied.nebd.kill9()?;

    let export = VhostExport::start(cluster.dir(), &cluster.gateway_socket(), VOLUME, Shown::default())?;
    let machine = Machine { root: Some("/dev/vda".into()), ..Machine::new([(&*export.socket, 4)]) };
    let mut guest = Guest::start(cluster.dir(), "debian", &machine, "")?;
    guest.wait_for_console("login: ")?;
    guest.tell("root")?;
    guest.wait_for_console("root@guest:")?;
    // Asked for with a sum, so that what is typed does not pass for the answer.
    guest.tell("echo answer $((40 + 2)) $(systemctl is-active multi-user.target) $(findmnt -no SOURCE /)")?;
    guest.wait_for_console("answer 42 active /dev/vda")?;
    guest.tell("poweroff")?;
    guest.finish().map(drop)
}
