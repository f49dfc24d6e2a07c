//! The metadata server goes away before or in the middle of an upgrade: the upgrade fails and says why, no client sees an error.

use anyhow::{Context, ensure};
use spline_fault::broken::{build, go_on, reached};
use spline_fault::history::History;
use spline_fault::workload::{BLOCKS, EXPORT_BYTES, RECOVERY_LIMIT, Workload};
use spline_harness::{Export, Rig, wait_until};
use std::path::Path;

/// Answers to see before and after each step.
const PROGRESS: u64 = 100;
/// Up to the commit an upgrade may take so long.
const LIMIT: &str = "upgrade_limit = \"4s\"\n";

fn refused<T: std::fmt::Debug>(outcome: anyhow::Result<T>) -> anyhow::Result<String> {
    match outcome {
        Ok(told) => anyhow::bail!("must fail: {told:?}"),
        Err(refused) => Ok(format!("{refused:#}")),
    }
}

fn mds(rig: &mut Rig) -> anyhow::Result<&mut spline_harness::Process> {
    match rig {
        Rig::Cluster(cluster) => Ok(&mut cluster.mds),
        Rig::File { .. } => anyhow::bail!("a cluster is needed"),
    }
}

fn before_the_proof() -> anyhow::Result<()> {
    let mut rig = Rig::cluster_with(LIMIT)?;
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let pid = rig.gateway().id();
    let workload = Workload::start(&export.socket, &export.volume, History::new(BLOCKS), 1);
    workload.wait_for_progress(PROGRESS)?;
    mds(&mut rig)?.kill9()?;
    let said = refused(rig.upgrade(None))?;
    ensure!(said.contains("phase=proof") && said.contains("metadata server"), "{said}");
    // It is still away, and the old one serves as before.
    workload.wait_for_progress(PROGRESS)?;
    ensure!(rig.gateway_status()?["pid"].as_u64() == pid.map(u64::from));
    mds(&mut rig)?.start()?;
    wait_until("the upgrade", RECOVERY_LIMIT, || rig.upgrade(None).map(Some))?;
    workload.wait_for_progress(PROGRESS)?;
    workload.finish().map(drop)
}

#[test]
fn an_upgrade_without_a_metadata_server_changes_nothing() {
    before_the_proof().expect("the old one goes on");
}

/// The metadata server is lost when the new process has proved that it could be reached, and is about to open the sessions.
/// Afterwards nobody knows which of the two it has given the volume to: the old one serves on as it did, until it is told
/// which epoch comes next.
fn in_doubt(rig: &mut Rig, export: &Export) -> anyhow::Result<Workload> {
    let pid = rig.gateway().id();
    let workload = Workload::start(&export.socket, &export.volume, History::new(BLOCKS), 2);
    workload.wait_for_progress(PROGRESS)?;
    // 5: the first message after the proof.
    let binary = build(rig.dir(), Path::new(env!("CARGO_BIN_EXE_broken_gateway")), "waits-at-5")?;
    let upgrading = rig.begin_upgrade(Some(&binary))?;
    reached(&binary)?;
    mds(rig)?.kill9()?;
    go_on(&binary)?;
    let said = refused(rig.end_upgrade(upgrading))?;
    ensure!(said.contains("phase=preparation"), "{said}");
    ensure!(rig.gateway_status()?["pid"].as_u64() == pid.map(u64::from), "the old one is there");
    workload.wait_for_progress(PROGRESS).context("the old one goes on")?;
    Ok(workload)
}

fn after_the_proof() -> anyhow::Result<()> {
    let mut rig = Rig::cluster_with(LIMIT)?;
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let workload = in_doubt(&mut rig, &export)?;
    mds(&mut rig)?.start()?;
    wait_until("the upgrade", RECOVERY_LIMIT, || Ok(rig.upgrade(None).ok()))?;
    workload.wait_for_progress(PROGRESS)?;
    ensure!(workload.reconnected() == 0, "clients were disconnected");
    workload.finish().map(drop)
}

#[test]
fn a_metadata_server_that_is_lost_after_the_proof_is_an_upgrade_that_fails() {
    after_the_proof().expect("the old one goes on");
}

/// The metadata server comes back for the next gateway only, which is not the old one and does not know of the doubt.
fn stopped_in_doubt() -> anyhow::Result<()> {
    let mut rig = Rig::cluster_with(LIMIT)?;
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let workload = in_doubt(&mut rig, &export)?;
    let status =
        rig.gateway_mut().terminate(RECOVERY_LIMIT).context("a stop waits for no metadata server")?;
    ensure!(status.success(), "status={status} log={}", rig.gateway().log_tail());
    mds(&mut rig)?.start()?;
    rig.gateway_mut().start()?;
    workload.wait_for_progress(PROGRESS).context("the next gateway has the volume")?;
    ensure!(workload.reconnected() == 0, "clients were disconnected");
    workload.finish().map(drop)
}

#[test]
fn a_stop_while_nobody_knows_who_has_the_volume_is_a_stop() {
    stopped_in_doubt().expect("the next one has it");
}
