//! kill -9 of each part, and of all at once, under load: no error at the client, nothing acknowledged is lost, nothing
//! comes back that was replaced.

use spline_fault::history::History;
use spline_fault::rounds;
use spline_fault::workload::{BLOCKS, Workload, verify};
use spline_harness::{Cluster, Export};

/// Answers to see before a fault and after it.
const PROGRESS: u64 = 300;

/// Runs `fault` again and again under load, then verifies, restarts everything, and verifies again.
fn survive(usual_rounds: usize, fault: impl Fn(&mut Cluster, &mut Export, &Workload) -> anyhow::Result<()>) {
    let mut cluster = Cluster::start().expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    let mut export = cluster.export("disk", false).expect("export");
    let mut history = History::new(BLOCKS);
    for round in 0..rounds(usual_rounds) {
        let workload = Workload::start(&export.socket, "disk", history, round as u64);
        workload.wait_for_progress(PROGRESS).expect("progress before the fault");
        fault(&mut cluster, &mut export, &workload).expect("fault");
        workload.wait_for_progress(PROGRESS).expect("progress after the fault");
        history = workload.finish().expect("workload");
    }
    export.nebd.kill9().expect("kills");
    cluster.restart_all().expect("restarts");
    let export = cluster.export("disk", false).expect("export");
    verify(&export.socket, "disk", &mut history).expect("all is there after a cold start");
}

#[test]
fn leader_chunkserver() {
    survive(2, |cluster, _, _| {
        let leader = cluster.by_leadership()?[0];
        cluster.chunkservers[leader].kill9()?;
        cluster.chunkservers[leader].start()
    });
}

#[test]
fn leader_chunkserver_that_stays_away() {
    survive(1, |cluster, _, workload| {
        let leader = cluster.by_leadership()?[0];
        cluster.chunkservers[leader].kill9()?;
        workload.wait_for_progress(PROGRESS)?;
        cluster.chunkservers[leader].start()
    });
}

#[test]
fn follower_chunkserver() {
    survive(2, |cluster, _, workload| {
        let order = cluster.by_leadership()?;
        let follower = order[order.len() - 1];
        cluster.chunkservers[follower].kill9()?;
        workload.wait_for_progress(PROGRESS)?;
        cluster.chunkservers[follower].start()
    });
}

#[test]
fn metadata_server() {
    survive(2, |cluster, _, workload| {
        cluster.mds.kill9()?;
        // IO survives without it.
        workload.wait_for_progress(PROGRESS)?;
        cluster.mds.start()
    });
}

#[test]
fn gateway() {
    survive(3, |cluster, _, _| cluster.gateway.restart());
}

#[test]
fn everything_but_nebd_at_once() {
    survive(2, |cluster, _, _| cluster.restart_all());
}

#[test]
fn nebd() {
    survive(2, |_, export, workload| {
        workload.expect_nebd_to_die();
        export.nebd.restart()?;
        export.wait_until_serving()
    });
}

#[test]
fn everything_at_once() {
    survive(1, |cluster, export, workload| {
        workload.expect_nebd_to_die();
        export.nebd.kill9()?;
        cluster.restart_all()?;
        export.nebd.start()?;
        export.wait_until_serving()
    });
}
