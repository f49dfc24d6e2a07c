//! `spline cluster …`
//!
//! Called by `main`. Must not know generated types or how a table is drawn.

use crate::args;
use crate::mds::{ClusterStatus, Copyset, MdsClient};
use crate::output::{Output, ago, table};
use anyhow::ensure;
use spline_types::ByteSize;
use std::time::{Duration, Instant};

/// How often a cluster that is waited for is asked.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Carries out one command on the cluster.
///
/// # Errors
/// What the metadata server says, or that it does not answer.
pub async fn run(command: args::Cluster, mds: &[String], output: Output) -> anyhow::Result<()> {
    let args::Cluster::Status { wait, copysets } = command;
    let status = match wait {
        None => MdsClient::connect(mds).await?.status().await?,
        Some(seconds) => healthy(mds, Duration::from_secs(seconds.into())).await?,
    };
    output.print(&status, |status| human(status, copysets))
}

/// Asks until every copyset is healthy.
async fn healthy(mds: &[String], limit: Duration) -> anyhow::Result<ClusterStatus> {
    let deadline = Instant::now() + limit;
    loop {
        let asked = async { MdsClient::connect(mds).await?.status().await };
        let missing = match asked.await {
            Ok(status) => match missing(&status) {
                None => return Ok(status),
                Some(missing) => missing,
            },
            Err(error) => format!("{error:#}"),
        };
        ensure!(Instant::now() < deadline, "cluster is not healthy: waited={}s {missing}", limit.as_secs());
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// What a cluster lacks to be healthy.
fn missing(status: &ClusterStatus) -> Option<String> {
    let up = status.chunkservers.iter().filter(|server| server.state == "up").count();
    let (total, healthy) = (status.copysets.len(), count_healthy(status));
    // Copysets are made when enough chunkservers have come.
    let lacks = total == 0 || healthy < total;
    lacks.then(|| format!("chunkservers_up={up} copysets={total} healthy={healthy}"))
}

fn count_healthy(status: &ClusterStatus) -> usize {
    status.copysets.iter().filter(|copyset| copyset.state == "healthy").count()
}

fn human(status: &ClusterStatus, all_copysets: bool) -> String {
    let healthy = count_healthy(status);
    let mut text = format!(
        "cluster {}: {} volumes, {healthy} of {} copysets healthy, version {}\n\n",
        status.cluster_id,
        status.volumes,
        status.copysets.len(),
        status.version
    );
    text += &table(
        &["id", "state", "zone", "address", "used", "capacity", "copysets", "leads", "heard"],
        &[0, 4, 5, 6, 7, 8],
        status.chunkservers.iter().map(|server| {
            vec![
                server.id.to_string(),
                if server.full { format!("{}, full", server.state) } else { server.state.clone() },
                server.zone.clone(),
                server.address.clone(),
                ByteSize(server.used_bytes).to_string(),
                ByteSize(server.capacity_bytes).to_string(),
                server.copysets.to_string(),
                server.leaders.to_string(),
                ago(server.last_heartbeat_ms),
            ]
        }),
    );
    let shown: Vec<&Copyset> =
        status.copysets.iter().filter(|copyset| all_copysets || copyset.state != "healthy").collect();
    if !shown.is_empty() {
        text.push('\n');
        text += &copysets(&shown);
    }
    text
}

fn copysets(shown: &[&Copyset]) -> String {
    table(
        &["copyset", "state", "leader", "members", "term", "reason"],
        &[0, 2, 4],
        shown.iter().map(|copyset| {
            let members: Vec<String> = copyset.members.iter().map(ToString::to_string).collect();
            vec![
                copyset.id.to_string(),
                copyset.state.clone(),
                copyset.leader.map_or_else(|| "-".into(), |leader| leader.to_string()),
                members.join(","),
                copyset.term.to_string(),
                copyset.reason.clone().unwrap_or_default(),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> ClusterStatus {
        let copyset = |id, state: &str| Copyset {
            id,
            members: vec![1, 2, 3],
            leader: None,
            term: 1,
            state: state.into(),
            reason: (state != "healthy").then(|| "chunkserver 3 is down".into()),
        };
        ClusterStatus {
            cluster_id: "c".into(),
            version: "0.1.0".into(),
            volumes: 1,
            chunkservers: Vec::new(),
            copysets: vec![copyset(1, "healthy"), copyset(2, "degraded")],
        }
    }

    #[test]
    fn what_is_missing_is_told() {
        let mut status = status();
        assert_eq!(missing(&status).as_deref(), Some("chunkservers_up=0 copysets=2 healthy=1"));
        status.copysets.pop();
        assert_eq!(missing(&status), None);
        status.copysets.clear();
        assert!(missing(&status).is_some(), "a cluster without copysets can hold nothing");
    }

    #[test]
    fn only_troubled_copysets_are_listed_unless_asked() {
        let text = human(&status(), false);
        assert!(text.contains("1 of 2 copysets healthy"), "{text}");
        assert!(text.contains("  chunkserver 3 is down\n"), "{text}");
        assert!(text.contains("degraded") && !text.contains("\n      1  healthy"), "{text}");
        assert!(human(&status(), true).lines().count() > text.lines().count());
    }
}
