//! Processes that are stopped, not dead: a majority that is missing makes writes wait, not fail.

use spline_fault::history::History;
use spline_fault::workload::{BLOCKS, RECOVERY_LIMIT, Workload};
use spline_harness::{Cluster, Process, binaries, tempdir, wait_until};
use std::time::{Duration, Instant};

/// How long nothing may be answered while the majority is stopped. Longer than an election and a client's attempt, so
/// that a cluster which serves with one replica would be caught.
const SILENCE: Duration = Duration::from_secs(4);

#[test]
fn two_of_three_chunkservers_stopped_make_writes_wait() {
    let cluster = Cluster::start().expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    let export = cluster.export("disk", false).expect("export");
    let workload = Workload::start(&export.socket, "disk", History::new(BLOCKS), 1);
    workload.wait_for_progress(300).expect("progress before");
    let order = cluster.by_leadership().expect("leaders");
    for number in &order[..2] {
        cluster.chunkservers[*number].stop().expect("stops");
    }
    // What was on its way is answered still; reads at the third one's own leases too. Then all 32 requests wait.
    let mut seen = (workload.answered(), Instant::now());
    wait_until("silence", RECOVERY_LIMIT, || {
        if workload.answered() != seen.0 {
            seen = (workload.answered(), Instant::now());
        }
        Ok((seen.1.elapsed() >= SILENCE).then_some(()))
    })
    .expect("nothing is answered without a majority");
    for number in &order[..2] {
        cluster.chunkservers[*number].cont().expect("goes on");
    }
    workload.wait_for_progress(300).expect("progress after, without an error");
    workload.finish().expect("nothing is lost");
}

#[test]
fn a_stopped_leader_is_replaced_and_comes_back() {
    let cluster = Cluster::start().expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    let export = cluster.export("disk", false).expect("export");
    let workload = Workload::start(&export.socket, "disk", History::new(BLOCKS), 2);
    workload.wait_for_progress(300).expect("progress before");
    let leader = cluster.by_leadership().expect("leaders")[0];
    cluster.chunkservers[leader].stop().expect("stops");
    workload.wait_for_progress(300).expect("another one leads");
    // It wakes with the belief that it still leads; it must not answer from the past.
    cluster.chunkservers[leader].cont().expect("goes on");
    workload.wait_for_progress(300).expect("progress after");
    workload.finish().expect("nothing is lost, nothing stale is read");
}

#[test]
fn a_chunkserver_that_waits_for_a_metadata_server_can_be_stopped() {
    let dir = tempdir().expect("temporary directory");
    let binary = binaries::find("spline-chunkserver").expect("binary");
    let arguments = ["--listen", "127.0.0.1:0", "--mds", "127.0.0.1:1", "--data-dir"].map(Into::into);
    let mut arguments = Vec::from(arguments);
    arguments.push(dir.path().join("data").into());
    let mut process = Process::new("chunkserver", binary, arguments, dir.path());
    process.start().expect("starts");
    wait_until("it to wait", RECOVERY_LIMIT, || {
        Ok(process.log()?.contains("waits for a metadata server").then_some(()))
    })
    .expect("says so");
    assert!(process.terminate(RECOVERY_LIMIT).expect("ends").success());
}
