//! kill -9 of each part in turn, and of all at once, under load: no error at the client, nothing acknowledged is lost,
//! nothing comes back that was replaced. Reports the longest stall of each kind.

use anyhow::Context;
use spline_fault::history::History;
use spline_fault::workload::{BLOCKS, EXPORT_BYTES, Workload, verify};
use spline_harness::{Cluster, Export, Rig, Stalls, rounds};
use std::io::Write;

/// Answers to see before a fault and after it.
const PROGRESS: u64 = 200;

type Fault = fn(&mut Cluster, &mut Export, &Workload) -> anyhow::Result<()>;

const FAULTS: [(&str, Fault); 8] = [
    ("leader chunkserver", leader_chunkserver),
    ("leader chunkserver, back later", leader_chunkserver_that_stays_away),
    ("follower chunkserver", follower_chunkserver),
    ("metadata server", metadata_server),
    ("gateway", gateway),
    ("everything but nebd at once", everything_but_nebd),
    ("nebd", nebd),
    ("everything at once", everything),
];

fn leader_chunkserver(cluster: &mut Cluster, _: &mut Export, _: &Workload) -> anyhow::Result<()> {
    let leader = cluster.by_leadership()?[0];
    cluster.chunkservers[leader].restart()
}

fn leader_chunkserver_that_stays_away(
    cluster: &mut Cluster,
    _: &mut Export,
    workload: &Workload,
) -> anyhow::Result<()> {
    let leader = cluster.by_leadership()?[0];
    cluster.chunkservers[leader].kill9()?;
    workload.wait_for_progress(PROGRESS)?;
    cluster.chunkservers[leader].start()
}

fn follower_chunkserver(cluster: &mut Cluster, _: &mut Export, workload: &Workload) -> anyhow::Result<()> {
    let order = cluster.by_leadership()?;
    let follower = order[order.len() - 1];
    cluster.chunkservers[follower].kill9()?;
    workload.wait_for_progress(PROGRESS)?;
    cluster.chunkservers[follower].start()
}

fn metadata_server(cluster: &mut Cluster, _: &mut Export, workload: &Workload) -> anyhow::Result<()> {
    cluster.mds.kill9()?;
    // IO survives without it.
    workload.wait_for_progress(PROGRESS)?;
    cluster.mds.start()
}

fn gateway(cluster: &mut Cluster, _: &mut Export, _: &Workload) -> anyhow::Result<()> {
    cluster.gateway.restart()
}

fn everything_but_nebd(cluster: &mut Cluster, _: &mut Export, _: &Workload) -> anyhow::Result<()> {
    cluster.restart_all()
}

fn nebd(_: &mut Cluster, export: &mut Export, workload: &Workload) -> anyhow::Result<()> {
    workload.expect_nebd_to_die();
    export.nebd.restart()?;
    export.wait_until_serving()
}

fn everything(cluster: &mut Cluster, export: &mut Export, workload: &Workload) -> anyhow::Result<()> {
    workload.expect_nebd_to_die();
    export.nebd.kill9()?;
    cluster.restart_all()?;
    export.nebd.start()?;
    export.wait_until_serving()
}

/// One fault under load; answers the history and tells how long a client waited.
fn survive(
    (kind, fault): (&'static str, Fault),
    cluster: &mut Cluster,
    export: &mut Export,
    history: History,
    seed: u64,
    stalls: &mut Stalls,
) -> anyhow::Result<History> {
    // The next fault finds the last one mended: two at once may leave no majority.
    cluster.wait_until_led()?;
    let workload = Workload::start(&export.socket, &export.volume, history, seed);
    workload.wait_for_progress(PROGRESS).context("progress before the fault")?;
    fault(cluster, export, &workload).context("fault")?;
    workload.wait_for_progress(PROGRESS).context("progress after the fault")?;
    stalls.add(kind, workload.longest_wait());
    workload.finish().context("workload")
}

#[test]
fn every_part_in_turn() {
    let mut cluster = Cluster::start().expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    let mut export = cluster.export("disk", false).expect("export");
    let (mut history, mut stalls) = (History::new(BLOCKS), Stalls::default());
    let mut seed = 0;
    for round in 1..=rounds(1) {
        for fault in FAULTS {
            seed += 1;
            let survived = survive(fault, &mut cluster, &mut export, history, seed, &mut stalls);
            history = survived.unwrap_or_else(|error| panic!("round={round} fault={}: {error:#}", fault.0));
        }
    }
    // Not by a macro: the test harness would keep the table of a test that passes.
    let _ = write!(std::io::stderr(), "\n{stalls}");
    export.nebd.kill9().expect("kills");
    cluster.restart_all().expect("restarts");
    let export = cluster.export("disk", false).expect("export");
    verify(&export.socket, "disk", &mut history).expect("all is there after a cold start");
}

#[test]
fn the_gateway_of_a_file() {
    let mut rig = Rig::file().expect("gateway");
    let export = rig.serve("disk", EXPORT_BYTES).expect("export");
    let mut history = History::new(BLOCKS);
    let Rig::File { gateway, .. } = &mut rig else { unreachable!("a file rig") };
    for round in 0..rounds(3) {
        let workload = Workload::start(&export.socket, &export.volume, history, round as u64);
        workload.wait_for_progress(PROGRESS).expect("progress before the fault");
        // The kernel ends the dead one's ring, and gives its lock back, a little after it is gone.
        gateway.restart().expect("restarts");
        workload.wait_for_progress(PROGRESS).expect("progress after the fault");
        history = workload.finish().expect("nothing is lost, no error");
    }
}
