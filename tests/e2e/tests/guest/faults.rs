//! Everything that happens to the host's side while a guest writes and verifies: the guest sees latency, never an error.
//! Reports the longest that a write of the guest was late, by kind of fault.

use crate::scripts::script;
use anyhow::{Context, ensure};
use serde_json::json;
use spline_harness::guest::Machine;
use spline_harness::vhost::{Shown, VhostExport};
use spline_harness::{Cluster, Guest, Stalls, rounds};
use std::io::Write;

/// Answers of the disk to see before a fault and after it.
const BEATS: usize = 5;
/// Rounds of each fault in `make test`.
const USUAL_ROUNDS: usize = 1;
const SIZE: u64 = 128 << 20;
/// What the kernel calls the disk that is plugged in: behind the first one and the one with the programs.
const PLUGGED: &str = "vdc";

/// A guest at work, and what it stands on.
struct Stage {
    guest: Guest,
    /// The guest's first disk.
    export: VhostExport,
    /// The disk that comes and goes.
    second: VhostExport,
    // Its directory holds the logs of the others, which show them when they are dropped.
    cluster: Cluster,
    stalls: Stalls,
    size: u64,
}

type Fault = fn(&mut Stage) -> anyhow::Result<()>;

const FAULTS: [(&str, Fault); 7] = [
    ("none", none),
    ("nebd", |stage| stage.export.nebd.restart()),
    ("gateway", |stage| stage.cluster.gateway.restart()),
    ("leader chunkserver", leader_chunkserver),
    ("guest stopped and continued", stop_and_continue),
    ("volume resized", resize),
    ("another disk plugged and unplugged", plug_and_unplug),
];

fn none(stage: &mut Stage) -> anyhow::Result<()> {
    stage.guest.wait_for_beats(BEATS)
}

fn leader_chunkserver(stage: &mut Stage) -> anyhow::Result<()> {
    let leader = stage.cluster.by_leadership()?[0];
    stage.cluster.chunkservers[leader].restart()
}

fn stop_and_continue(stage: &mut Stage) -> anyhow::Result<()> {
    let mut qmp = stage.guest.qmp()?;
    qmp.execute("stop", json!({}))?;
    let status = qmp.execute("query-status", json!({}))?;
    ensure!(status["running"] == false, "{status}");
    // The gateway goes away while nobody asks for anything, too.
    stage.cluster.gateway.restart()?;
    qmp.execute("cont", json!({})).map(drop)
}

fn resize(stage: &mut Stage) -> anyhow::Result<()> {
    stage.size += SIZE;
    let size = stage.size.to_string();
    stage.cluster.spline(&["volume", "resize", "disk", &size])?;
    stage.guest.tell(&format!("size {size}"))?;
    stage.guest.wait_for(&format!("sized {size}")).map(drop)
}

fn plug_and_unplug(stage: &mut Stage) -> anyhow::Result<()> {
    let socket = stage.second.socket.to_string_lossy().into_owned();
    let mut qmp = stage.guest.qmp()?;
    for (order, answer) in [("fill", "filled"), ("compare", "same")] {
        let address = json!({ "type": "unix", "data": { "path": socket } });
        let backend =
            json!({ "type": "socket", "data": { "addr": address, "server": false, "reconnect": 1 } });
        qmp.execute("chardev-add", json!({ "id": "second", "backend": backend }))?;
        let device =
            json!({ "driver": "vhost-user-blk-pci", "id": "plugged", "chardev": "second", "num-queues": 2 });
        qmp.execute("device_add", device)?;
        stage.guest.tell(&format!("{order} {PLUGGED}"))?;
        stage.guest.wait_for(answer)?;
        qmp.execute("device_del", json!({ "id": "plugged" }))?;
        qmp.wait_for_event("DEVICE_DELETED", "plugged")?;
        qmp.execute("chardev-remove", json!({ "id": "second" }))?;
        stage.guest.tell(&format!("gone {PLUGGED}"))?;
        stage.guest.wait_for(&format!("gone {PLUGGED}"))?;
    }
    Ok(())
}

impl Stage {
    fn new() -> anyhow::Result<Self> {
        let cluster = Cluster::start()?;
        cluster.create_volume("disk", &SIZE.to_string())?;
        cluster.create_volume("second", "64M")?;
        let export =
            |volume| VhostExport::start(cluster.dir(), &cluster.gateway_socket(), volume, Shown::default());
        let (export, second) = (export("disk")?, export("second")?);
        let machine = Machine::new([(&*export.socket, 4)]);
        let text = script(&[], include_str!("scripts/faults.sh"));
        let guest = Guest::start(cluster.dir(), "faults", &machine, &text)?;
        Ok(Self { cluster, export, second, guest, stalls: Stalls::default(), size: SIZE })
    }

    fn survive(&mut self, kind: &'static str, fault: Fault) -> anyhow::Result<()> {
        // The next fault finds the last one mended: two at once may leave no majority.
        self.cluster.wait_until_led()?;
        self.guest.wait_for_beats(BEATS).context("beats before the fault")?;
        self.guest.longest_gap()?;
        fault(self).context("fault")?;
        self.guest.wait_for_beats(BEATS).context("beats after the fault")?;
        let gap = self.guest.longest_gap()?;
        self.stalls.add(kind, gap);
        Ok(())
    }
}

#[test]
fn are_latency_to_a_guest_that_writes_and_verifies() {
    let mut stage = Stage::new().expect("a guest at work");
    for round in 1..=rounds(USUAL_ROUNDS) {
        for (kind, fault) in FAULTS {
            let survived = stage.survive(kind, fault);
            survived.unwrap_or_else(|error| panic!("round={round} fault={kind}: {error:#}"));
        }
    }
    stage.guest.tell("stop").expect("still there");
    let passes = stage.guest.wait_for("passes ").expect("verified");
    assert_ne!(passes, "0");
    stage.guest.finish().expect("no error in the guest");
    // Not by a macro: the test harness would keep the table of a test that passes.
    let _ = write!(std::io::stderr(), "\n{}passes written and verified: {passes}\n", stage.stalls);
}
