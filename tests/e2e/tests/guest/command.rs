//! `spline vhost`: what it starts serves a guest, and what it prints is what QEMU and libvirt are given.

use crate::scripts::script;
use anyhow::{Context, ensure};
use serde_json::Value;
use spline_harness::guest::Machine;
use spline_harness::{Cluster, Guest};
use std::path::Path;

const SCRIPT: &str = r#"
echo "serial $(cat /sys/block/vda/serial) queues $(ls /sys/block/vda/mq | wc -l)"
dd if=/dev/urandom of=/run/blocks bs=64k count=4 2>/run/dd
dd if=/run/blocks of=/dev/vda bs=64k oflag=direct 2>/run/dd
dd if=/dev/vda bs=64k count=4 iflag=direct 2>/run/dd | cmp - /run/blocks
"#;

/// The cluster's `spline vhost`; ends what it has started when it is dropped.
struct Exported<'a> {
    cluster: &'a Cluster,
    runtime_dir: String,
}

impl Exported<'_> {
    fn vhost(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let place = ["--runtime-dir", &self.runtime_dir];
        self.cluster.spline(&[&["vhost"], arguments, &place[..]].concat())
    }
}

impl Drop for Exported<'_> {
    fn drop(&mut self) {
        let _ = self.vhost(&["rm", "vm/disk"]);
    }
}

#[test]
fn serves_a_guest_from_export_to_removal() -> anyhow::Result<()> {
    let cluster = Cluster::start()?;
    cluster.create_volume("vm/disk", "64M")?;
    let runtime_dir = cluster.dir().join("run").to_string_lossy().into_owned();
    let exported = Exported { cluster: &cluster, runtime_dir };
    let gateway = cluster.gateway_socket().to_string_lossy().into_owned();
    let export = ["export", "vm/disk", "--queues", "2", "--serial", "a serial number", "--gateway", &gateway];
    let facts = exported.vhost(&export)?;
    let socket = facts["socket"].as_str().context("a socket")?;
    ensure!(facts["queues"] == 2 && facts["qemu"][1].to_string().contains(socket), "{facts}");
    let again = exported.vhost(&export).expect_err("it is exported");
    ensure!(again.to_string().contains("already exported"), "{again}");

    let listed = exported.vhost(&["ls"])?;
    ensure!(listed[0]["volume"] == "vm/disk" && listed[0]["alive"] == true, "{listed}");
    let xml = exported.vhost(&["xml", "vm/disk", "--target", "vdx"])?;
    let disk = xml["disk"].as_str().context("xml")?;
    ensure!(disk.contains(&format!("path='{socket}'")) && disk.contains("queues='2'"), "{disk}");

    let machine = Machine::new([(Path::new(socket), 2)]);
    let mut guest = Guest::start(cluster.dir(), "command", &machine, &script(&[], SCRIPT))?;
    let seen = guest.wait_for("serial ")?;
    ensure!(seen == "a serial number queues 2", "{seen}");
    guest.finish()?;

    exported.vhost(&["rm", "vm/disk"])?;
    ensure!(exported.vhost(&["ls"])?.as_array().is_some_and(Vec::is_empty), "it is gone");
    ensure!(exported.vhost(&["xml", "vm/disk"]).is_err(), "it is gone");
    Ok(())
}
