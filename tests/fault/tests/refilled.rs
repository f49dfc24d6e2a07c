//! A replica that has lost its data, or must not trust it, is filled again by its peers and serves right data.

use anyhow::{Context, ensure};
use spline_fault::failover::{lead_alone, wait_until_refilled};
use spline_fault::history::History;
use spline_fault::workload::{BLOCKS, RECOVERY_LIMIT, Workload, verify};
use spline_harness::{Cluster, Export, Shape, wait_until};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Whose data is lost.
const VICTIM: usize = 2;
/// Answers before and after the loss.
const PROGRESS: u64 = 600;

/// Kills a chunkserver under load, does `harm` to its data directory, starts it, waits until it is filled again, makes it
/// serve everything and verifies every block.
fn refill(harm: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<Cluster> {
    // Checkpoints after little log: what the peers have purged can only come by a snapshot.
    // As few copysets as hold a segment: every one of them is written to.
    let shape = Shape { checkpoint_log: "64K", copysets: Some(3), ..Shape::default() };
    let mut cluster = Cluster::start_as(&shape)?;
    cluster.create_volume("disk", "1G")?;
    let export = cluster.export("disk", false)?;
    let workload = Workload::start(&export.socket, "disk", History::new(BLOCKS), 1);
    workload.wait_for_progress(PROGRESS)?;
    let before = cluster.status()?.server(VICTIM).context("server")?.id;
    wait_until("logs to be purged", RECOVERY_LIMIT, || {
        let copysets = cluster.status()?.leaders.len() as f64;
        let made = cluster.metric(0, "spline_raft_checkpoints_total")?;
        Ok((made >= 2.0 * copysets).then_some(()))
    })?;
    cluster.chunkservers[VICTIM].kill9()?;
    harm(&cluster.data_dir(VICTIM))?;
    cluster.chunkservers[VICTIM].start()?;
    wait_until_refilled(&cluster, VICTIM, before)?;
    let items = cluster.metric(VICTIM, "spline_raft_snapshot_items_received_total")?;
    ensure!(items > 0.0, "filled by log, not by snapshot");
    workload.wait_for_progress(PROGRESS)?;
    let history = workload.finish()?;
    check_alone(&mut cluster, &export, history)?;
    Ok(cluster)
}

fn check_alone(cluster: &mut Cluster, export: &Export, history: History) -> anyhow::Result<()> {
    let (mut history, away) = lead_alone(cluster, VICTIM, export, history)?;
    verify(&export.socket, "disk", &mut history).context("served by the refilled replica")?;
    cluster.chunkservers[away].start()?;
    cluster.wait_until_led()
}

#[test]
fn an_emptied_directory() {
    refill(|dir| {
        fs::remove_dir_all(dir)?;
        Ok(fs::create_dir(dir)?)
    })
    .expect("is filled again");
}

#[test]
fn a_log_that_is_damaged_inside() {
    let cluster = refill(damage_log).expect("is filled again");
    let said = cluster.chunkservers[VICTIM].log().expect("log");
    let line = said.lines().find(|line| line.contains("log is damaged inside"));
    assert!(line.is_some_and(|line| line.contains("ERROR")), "{said}");
    let page = cluster.metrics_page(VICTIM).expect("metrics");
    for name in ["spline_wal_sync_seconds", "spline_raft_proposals"] {
        let told = page.lines().filter(|line| {
            *line == format!("# TYPE {name} histogram") || *line == format!("# TYPE {name} counter")
        });
        assert_eq!(told.count(), 1, "{name} is registered once");
    }
}

/// Flips one bit in the middle of what the log holds.
fn damage_log(dir: &Path) -> anyhow::Result<()> {
    let mut segments: Vec<PathBuf> = fs::read_dir(dir.join("raft"))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    segments.retain(|path| path.extension().is_some_and(|extension| extension == "wal"));
    segments.sort();
    let first = segments.first().context("a segment")?;
    let bytes = fs::read(first)?;
    let end = bytes.iter().rposition(|byte| *byte != 0).context("an empty log")?;
    let at = (end / 2..end).find(|at| bytes[*at] != 0).context("nothing to damage")?;
    let file = fs::File::options().write(true).open(first)?;
    file.write_all_at(&[bytes[at] ^ 0x10], at as u64)?;
    Ok(())
}
