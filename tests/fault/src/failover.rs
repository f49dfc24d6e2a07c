//! Makes one replica serve everything, so that what is read is what lies there.

use crate::history::History;
use crate::workload::{RECOVERY_LIMIT, Workload};
use anyhow::ensure;
use spline_harness::cluster::Server;
use spline_harness::{Cluster, Export, wait_until};

/// Answers enough for every chunk of the workload to be written again.
const PROGRESS: u64 = 600;

/// Waits until the server at position `number`, whose id was `before`, has joined every copyset under another id, and
/// the old one has left.
///
/// # Errors
/// If it has not in time.
pub fn wait_until_refilled(cluster: &Cluster, number: usize, before: u64) -> anyhow::Result<()> {
    wait_until("every copyset to be refilled", RECOVERY_LIMIT, || {
        let status = cluster.status()?;
        let now = status.server(number).map_or(0, |server| server.id);
        let refilled = |members: &Vec<u64>| members.contains(&now) && !members.contains(&before);
        ensure!(now != before && status.members.iter().all(refilled), "id={now} {:?}", status.members);
        Ok(Some(()))
    })
}

/// Makes the server at position `number` lead every copyset. First another one is killed, and everything is written again
/// without it; then the third is killed, and the first comes back: only `number` has the whole log then, so nobody else
/// can be elected. Answers the history and the position of the one that is away.
///
/// # Errors
/// If something acknowledged is lost, or it does not come to lead.
pub fn lead_alone(
    cluster: &mut Cluster,
    number: usize,
    export: &Export,
    history: History,
) -> anyhow::Result<(History, usize)> {
    let others: Vec<usize> = (0..cluster.chunkservers.len()).filter(|other| *other != number).collect();
    cluster.chunkservers[others[0]].kill9()?;
    let workload = Workload::start(&export.socket, &export.volume, history, 77);
    workload.wait_for_progress(PROGRESS)?;
    let history = workload.finish()?;
    cluster.chunkservers[others[1]].kill9()?;
    cluster.chunkservers[others[0]].start()?;
    wait_until("one server to lead everything", RECOVERY_LIMIT, || {
        let status = cluster.status()?;
        let id = status.server(number).map(|server: &Server| server.id);
        ensure!(status.leaders.iter().all(|leader| *leader == id), "wanted={id:?} {:?}", status.leaders);
        Ok(Some(()))
    })?;
    Ok((history, others[1]))
}
