//! How fast and at what cost groups replicate: three hosts in one process over loopback, logs on the real disk.
//!
//! `cargo run --release -p spline-raft --example raft_bench [-- DIR]`. Prints, for each number of groups and proposals
//! in flight, proposals per second, latency percentiles and CPU time per proposal (all three replicas and the
//! proposer together), then the idle cost of a hundred groups.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use prometheus_client::registry::Registry;
use spline_raft::{
    Answer, Checkpoint, CheckpointJob, Group, GroupId, LogCommand, LogPosition, NodeId, RaftConfig, RaftHost,
    Role, SnapshotSink, SnapshotSource, StateMachine,
};
use tokio::net::TcpListener;

/// Counts what it is given.
struct Counting;
struct NoJob;

impl StateMachine for Counting {
    fn checkpoint(&self) -> Checkpoint {
        Checkpoint::default()
    }
    async fn apply(&mut self, batch: Vec<(LogPosition, LogCommand)>) -> io::Result<Vec<Answer>> {
        Ok(vec![Bytes::new(); batch.len()])
    }
    fn begin_checkpoint(&mut self) -> Box<dyn CheckpointJob> {
        Box::new(NoJob)
    }
    fn snapshot_source(&self) -> io::Result<(Checkpoint, Box<dyn SnapshotSource>)> {
        Err(io::Error::other("the benchmark has nothing to send"))
    }
    fn snapshot_sink(&mut self) -> io::Result<Box<dyn SnapshotSink>> {
        Err(io::Error::other("the benchmark has nothing to receive"))
    }
    async fn installed(&mut self, _checkpoint: Checkpoint) -> io::Result<()> {
        Ok(())
    }
}

impl CheckpointJob for NoJob {
    fn run(self: Box<Self>, _checkpoint: Checkpoint) -> BoxFuture<'static, io::Result<()>> {
        async { Ok(()) }.boxed()
    }
}

/// User and system time of this process.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<u64> =
        stat.rsplit(')').next().unwrap_or("").split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
    // Fields 14 and 15 of proc(5), in ticks of 10 ms.
    Duration::from_millis((fields.get(11).unwrap_or(&0) + fields.get(12).unwrap_or(&0)) * 10)
}

async fn host(dir: PathBuf, id: u64) -> (RaftHost, SocketAddr) {
    let host =
        RaftHost::open(RaftConfig::new(dir, NodeId(id)), &mut Registry::default()).await.expect("host opens");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    let serving = host.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let host = serving.clone();
            tokio::spawn(async move {
                let accepted = spline_wire::accept(stream, Duration::from_secs(5)).await;
                let Ok((sender, mut receiver)) = accepted else { return };
                while let Ok(Some(frame)) = receiver.next().await {
                    host.handle(frame, &sender).await;
                }
            });
        }
    });
    (host, address)
}

async fn leaders(hosts: &[RaftHost], count: u32) -> Vec<Group> {
    let members: Vec<NodeId> = (1..=3).map(NodeId).collect();
    let mut leaders = Vec::new();
    let mut groups = Vec::new();
    for id in 0..count {
        let mut replicas = Vec::new();
        for host in hosts {
            replicas.push(host.start_group(GroupId(id), Counting).await.expect("group starts"));
        }
        for replica in &replicas {
            replica.bootstrap(&members).await.expect("bootstrap");
        }
        groups.push(replicas);
    }
    for replicas in groups {
        loop {
            if let Some(leader) = replicas.iter().find(|group| group.status().role == Role::Leader) {
                leaders.push(leader.clone());
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    leaders
}

async fn measure(leaders: &[Group], in_flight: usize, bytes: usize, time: Duration) {
    let done = Arc::new(AtomicU64::new(0));
    let payload = Bytes::from(vec![7; bytes]);
    let (cpu_before, begun) = (cpu(), Instant::now());
    let workers: Vec<_> = (0..in_flight)
        .map(|i| {
            let (group, payload, done) = (leaders[i % leaders.len()].clone(), payload.clone(), done.clone());
            let all = leaders.to_vec();
            tokio::spawn(async move {
                let mut latencies = Vec::new();
                let mut turn = i;
                while begun.elapsed() < time {
                    let group = if all.len() > 1 { &all[turn % all.len()] } else { &group };
                    turn = turn.wrapping_mul(31).wrapping_add(17);
                    let meta = Bytes::from_static(&[0; 64]);
                    let at = Instant::now();
                    if group.propose(LogCommand { meta, payload: payload.clone() }).await.is_ok() {
                        latencies.push(at.elapsed());
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                }
                latencies
            })
        })
        .collect();
    let mut latencies = Vec::new();
    for worker in workers {
        latencies.extend(worker.await.unwrap_or_default());
    }
    latencies.sort_unstable();
    let (count, wall) = (done.load(Ordering::Relaxed), begun.elapsed());
    let spent = cpu() - cpu_before;
    let percentile = |p: usize| latencies.get(latencies.len() * p / 100).map_or(0, Duration::as_micros);
    println!(
        "groups={:<3} in_flight={in_flight:<3} bytes={bytes:<5} per_second={:<7.0} p50_us={:<6} p99_us={:<6} cpu_us={:.1}",
        leaders.len(),
        count as f64 / wall.as_secs_f64(),
        percentile(50),
        percentile(99),
        spent.as_micros() as f64 / count.max(1) as f64,
    );
}

async fn reads(leader: &Group) {
    let (cpu_before, begun) = (cpu(), Instant::now());
    const READS: u32 = 200_000;
    let mut held = 0;
    for _ in 0..READS {
        if let Ok(lease) = leader.read_lease().await {
            held += u32::from(lease.still_held());
        }
    }
    let spent = cpu() - cpu_before;
    println!(
        "read_lease held={held}/{READS} ns={} cpu={spent:?}",
        begun.elapsed().as_nanos() / u128::from(READS)
    );
}

#[tokio::main]
async fn main() {
    let base = std::env::args().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(base).expect("a directory");
    for count in [1, 64, 100] {
        let mut hosts = Vec::new();
        let mut book = HashMap::new();
        for id in 1..=3 {
            let (host, address) = host(dir.path().join(format!("{count}-{id}")), id).await;
            hosts.push(host);
            book.insert(NodeId(id), address);
        }
        hosts.iter().for_each(|host| host.set_addresses(book.clone()));
        let leaders = leaders(&hosts, count).await;
        if count == 100 {
            tokio::time::sleep(Duration::from_secs(2)).await;
            let (cpu_before, begun) = (cpu(), Instant::now());
            tokio::time::sleep(Duration::from_secs(10)).await;
            let share = (cpu() - cpu_before).as_secs_f64() / begun.elapsed().as_secs_f64();
            println!("idle groups={count} replicas={} cpu_percent_of_a_core={:.1}", count * 3, share * 100.0);
        } else {
            for in_flight in [1, 32] {
                measure(&leaders, in_flight, 4096, Duration::from_secs(4)).await;
            }
            reads(&leaders[0]).await;
        }
        for host in &hosts {
            host.shutdown().await;
        }
    }
}
