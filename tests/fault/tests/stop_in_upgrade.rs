//! A stop that comes in the middle of an upgrade: it gives up one that is not committed, and is the new process's afterwards.

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use spline_fault::broken::{build, go_on, reached};
use spline_fault::history::History;
use spline_fault::workload::{BLOCKS, EXPORT_BYTES, RECOVERY_LIMIT, Workload};
use spline_harness::{Rig, wait_until};
use std::path::Path;

/// Answers to see before and after.
const PROGRESS: u64 = 100;

/// Stops the old gateway while a message of a kind is on its way; `heard` is what it says of that. Nobody serves afterwards, until
/// another gateway is started.
fn stopped_at(kind: u16, heard: &str) -> anyhow::Result<()> {
    let mut rig = Rig::file()?;
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let workload = Workload::start(&export.socket, &export.volume, History::new(BLOCKS), kind.into());
    workload.wait_for_progress(PROGRESS)?;
    let broken = Path::new(env!("CARGO_BIN_EXE_broken_gateway"));
    let binary = build(rig.dir(), broken, &format!("waits-at-{kind}"))?;
    let upgrading = rig.begin_upgrade(Some(&binary))?;
    reached(&binary)?;
    let id = rig.gateway().id().and_then(|id| i32::try_from(id).ok()).context("runs")?;
    kill_process(Pid::from_raw(id).context("runs")?, Signal::TERM)?;
    wait_until("the stop to be heard", RECOVERY_LIMIT, || {
        Ok(rig.gateway().log()?.contains(heard).then_some(()))
    })?;
    go_on(&binary)?;
    wait_until("the old gateway to end", RECOVERY_LIMIT, || {
        Ok((!rig.gateway_mut().is_running()?).then_some(()))
    })?;
    // The command hears of it or not.
    drop(upgrading);
    // Its socket is another's as long as one serves.
    wait_until("another gateway to start", RECOVERY_LIMIT, || Ok(rig.gateway_mut().start().ok()))?;
    workload.wait_for_progress(PROGRESS)?;
    ensure!(workload.reconnected() == 0, "clients were disconnected");
    workload.finish().map(drop)
}

#[test]
fn a_stop_before_the_commit_gives_the_upgrade_up() {
    // The new one has prepared everything.
    stopped_at(9, "gateway leaves").expect("nobody serves");
}

#[test]
fn a_stop_after_the_commit_is_the_new_ones() {
    // It serves, and the old one has not heard of it yet.
    stopped_at(14, "the new process is told").expect("nobody serves");
}
