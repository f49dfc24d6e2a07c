//! nebd's thread is on the processor of the gateway's while a client asks for one thing at a time, and is anywhere again when the
//! gateway is gone.

use anyhow::{Context, ensure};
use spline_fault::workload::{EXPORT_BYTES, RECOVERY_LIMIT};
use spline_harness::nbd::{Connection, Kind};
use spline_harness::{Export, Process, Rig, wait_until};
use std::time::{Duration, Instant};

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// On how many processors the thread of a process may run that may run on the fewest.
fn fewest(process: &Process) -> anyhow::Result<usize> {
    let id = process.id().context("runs")?;
    let mut fewest = usize::MAX;
    for thread in std::fs::read_dir(format!("/proc/{id}/task"))? {
        let status = std::fs::read_to_string(thread?.path().join("status"))?;
        let mask = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed:")).context("a mask")?;
        let bits = mask.chars().filter_map(|digit| digit.to_digit(16)).map(u32::count_ones);
        fewest = fewest.min(bits.sum::<u32>() as usize);
    }
    Ok(fewest)
}

fn ask_until_beside(client: &mut Connection, export: &Export, gateway: &Process) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        client.succeed(Kind::Read, 0, 4096, &[])?;
        let found = (fewest(&export.nebd)?, fewest(gateway)?);
        if found == (1, 1) {
            return Ok(());
        }
        ensure!(begun.elapsed() < RECOVERY_LIMIT, "processors of nebd and gateway: {found:?}");
    }
}

fn comes_and_goes() -> anyhow::Result<()> {
    let mut rig = Rig::file()?;
    let export = rig.serve("disk", EXPORT_BYTES)?;
    let own = rustix::thread::sched_getaffinity(None)?.count() as usize;
    let mut client = Connection::open(&export.socket, &export.volume, PATIENCE)?;
    ask_until_beside(&mut client, &export, rig.gateway())?;

    rig.gateway_mut().kill9()?;
    wait_until("nebd to be anywhere", RECOVERY_LIMIT, || {
        let found = fewest(&export.nebd)?;
        ensure!(found == own, "found={found} own={own}");
        Ok(Some(()))
    })?;
    rig.gateway_mut().start()?;
    ask_until_beside(&mut client, &export, rig.gateway())?;

    // The next one may stay elsewhere.
    rig.upgrade(None)?;
    ask_until_beside(&mut client, &export, rig.gateway())?;
    client.close()
}

#[test]
fn nebd_is_beside_the_gateway_while_requests_are_few() {
    comes_and_goes().expect("comes and goes");
}
