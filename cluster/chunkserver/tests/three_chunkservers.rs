//! Chunkservers, real log and wire, under a metadata server that knows one copyset: IO, fencing, a lost server, and one
//! whose log fails.

use bytes::Bytes;
use prometheus_client::registry::Registry;
use rustix::process::{Pid, Resource, Rlimit};
use spline_chunkserver::{Chunkserver, Config};
use spline_rpc::mds as pb;
use spline_rpc::mds::cluster_server::{Cluster, ClusterServer};
use spline_types::{
    ChunkCommand, ChunkId, ChunkIndex, ChunkOp, ChunkRange, ChunkserverId, CopysetId, Epoch, Fault, FenceTag,
    Seq, Unavailable, VolumeId,
};
use spline_wire::chunk::{Reply, decode_extents, encode_request};
use spline_wire::{Caller, Kind};
use std::collections::BTreeMap;
use std::io::Read;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Long enough for the slowest machine; only a failure waits for it.
const PATIENCE: Duration = Duration::from_secs(60);
const COPYSET: u32 = 1;

#[derive(Default)]
struct State {
    ids: BTreeMap<String, u32>,
    addresses: BTreeMap<u32, String>,
    led: bool,
    reclaim: Option<u64>,
    reclaimed: bool,
}

/// A metadata server with one copyset on the chunkservers 1 to `members`.
#[derive(Clone)]
struct Mds {
    state: Arc<Mutex<State>>,
    members: u32,
}

impl Mds {
    fn new(members: u32) -> Self {
        Self { state: Arc::default(), members }
    }

    /// Serves at `address`; returns where, and the task to abort.
    async fn serve(&self, address: &str) -> (SocketAddr, tokio::task::JoinHandle<()>) {
        let listener = tokio::net::TcpListener::bind(address).await.expect("binds");
        let at = listener.local_addr().expect("bound");
        let server = tonic::transport::Server::builder().add_service(ClusterServer::new(self.clone()));
        let serving = server.serve_with_incoming(TcpIncoming::from(listener));
        (at, tokio::spawn(async move { serving.await.expect("serves") }))
    }
}

#[tonic::async_trait]
impl Cluster for Mds {
    async fn register(
        &self,
        request: Request<pb::RegisterRequest>,
    ) -> Result<Response<pb::RegisterReply>, Status> {
        let request = request.into_inner();
        let default = Config::default().election_max_ms;
        if request.election_max_ms != default {
            return Err(Status::failed_precondition(format!("not the cluster's: cluster={default}")));
        }
        let mut state = self.state.lock().expect("test");
        let next = state.ids.len() as u32 + 1;
        let id = *state.ids.entry(request.store_uuid).or_insert(next);
        state.addresses.insert(id, request.address);
        Ok(Response::new(pb::RegisterReply { chunkserver_id: id, cluster_id: "test".into() }))
    }

    async fn heartbeat(
        &self,
        request: Request<pb::HeartbeatRequest>,
    ) -> Result<Response<pb::HeartbeatReply>, Status> {
        let request = request.into_inner();
        let mut state = self.state.lock().expect("test");
        let leads = request.copysets.iter().any(|copyset| copyset.leader);
        state.led |= leads;
        state.reclaimed |= request.copysets.iter().any(|copyset| !copyset.reclaimed_volumes.is_empty());
        state.addresses.insert(request.chunkserver_id, request.address);
        let mut reply = pb::HeartbeatReply { interval_ms: 100, ..pb::HeartbeatReply::default() };
        let book = state.addresses.iter();
        reply.chunkservers =
            book.map(|(id, address)| pb::ChunkserverAddress { id: *id, address: address.clone() }).collect();
        if state.ids.len() == self.members as usize {
            let assignment = pb::CopysetAssignment {
                id: COPYSET,
                members: (1..=self.members).collect(),
                bootstrap: !state.led,
            };
            reply.assignments.push(assignment);
        }
        if let (true, Some(volume_id)) = (leads, state.reclaim) {
            reply.reclaims.push(pb::Reclaim { copyset: COPYSET, volume_id });
        }
        Ok(Response::new(reply))
    }

    async fn routes(&self, _: Request<pb::RoutesRequest>) -> Result<Response<pb::RoutesReply>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusReply>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }
}

/// Asks the servers in turn until one has a definite answer.
struct Client {
    callers: Vec<Caller>,
    seq: u64,
}

impl Client {
    fn new(addresses: &[SocketAddr]) -> Self {
        Self { callers: addresses.iter().map(|address| Caller::new(*address)).collect(), seq: 0 }
    }

    async fn ask(
        &mut self,
        op: ChunkOp,
        epoch: u64,
        at: u32,
        len: u32,
        payload: &[u8],
    ) -> Result<Bytes, Fault> {
        let end = Instant::now() + PATIENCE;
        loop {
            for caller in self.callers.clone() {
                assert!(Instant::now() < end, "no definite answer: op={op:?}");
                self.seq += 1;
                let seq = Seq::new(self.seq);
                let fence = FenceTag { epoch: Epoch::new(epoch), seq, floor: seq };
                let chunk = ChunkId { volume: VolumeId::new(5), index: ChunkIndex::new(2) };
                let range = ChunkRange::new(at, len).expect("inside");
                let command = ChunkCommand { copyset: CopysetId::new(COPYSET), chunk, op, range, fence };
                let payload =
                    Some(Bytes::copy_from_slice(payload)).filter(|p| !p.is_empty()).into_iter().collect();
                let deadline = (Instant::now() + Duration::from_secs(2)).into();
                let call = caller.call(Kind::ChunkRequest, encode_request(&command), payload, deadline).await;
                let Ok(frame) = call else { continue };
                match Reply::decode(&frame.meta).expect("decodes").result {
                    Ok(()) => return Ok(frame.into_payload()),
                    Err(Fault::Unavailable(Unavailable::NotLeader | Unavailable::Unreachable)) => {}
                    Err(fault) => return Err(fault),
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn start(dir: &std::path::Path, mds: SocketAddr, listen: &str) -> Chunkserver {
    start_counting(dir, mds, listen, &mut Registry::default()).await
}

async fn start_counting(
    dir: &std::path::Path,
    mds: SocketAddr,
    listen: &str,
    counters: &mut Registry,
) -> Chunkserver {
    let config = Config {
        data_dir: dir.to_owned(),
        listen: listen.into(),
        mds: vec![mds.to_string()],
        spare_chunks: 2,
        ..Config::default()
    };
    Chunkserver::start(config, counters).await.expect("starts")
}

#[tokio::test(flavor = "multi_thread")]
async fn io_fencing_restart_and_a_lost_server() {
    let mds = Mds::new(3);
    let (at, serving) = mds.serve("127.0.0.1:0").await;
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().expect("tempdir")).collect();
    let mut servers = Vec::new();
    for dir in &dirs {
        servers.push(start(dir.path(), at, "127.0.0.1:0").await);
    }
    assert_eq!(servers[2].id(), ChunkserverId::new(3));
    let addresses: Vec<_> = servers.iter().map(Chunkserver::wire_address).collect();
    let mut client = Client::new(&addresses);

    assert_eq!(client.ask(ChunkOp::Read, 1, 0, 8192, b"").await.expect("a hole reads"), vec![0; 8192]);
    client.ask(ChunkOp::Write, 1, 100, 5, b"hello").await.expect("writes");
    client.ask(ChunkOp::Write, 1, 1 << 20, 300_000, &[7; 300_000]).await.expect("writes much");
    assert_eq!(client.ask(ChunkOp::Read, 1, 99, 7, b"").await.expect("reads"), &b"\0hello\0"[..]);
    let extents = client.ask(ChunkOp::Status, 1, 0, 1 << 20, b"").await.expect("tells");
    let extents = decode_extents(&extents).expect("decodes");
    assert_eq!(
        extents.iter().map(|e| (e.length, e.hole)).collect::<Vec<_>>(),
        [(4096, false), (1_044_480, true)]
    );

    // A read of a newer session fences the older one, for reads and writes.
    assert_eq!(client.ask(ChunkOp::Read, 2, 100, 5, b"").await.expect("reads"), &b"hello"[..]);
    assert_eq!(client.ask(ChunkOp::Write, 1, 0, 1, b"x").await, Err(Fault::Fenced));
    assert_eq!(client.ask(ChunkOp::Read, 1, 0, 1, b"").await, Err(Fault::Fenced));

    // The metadata server goes away, and all chunkservers restart: what was acknowledged is served.
    serving.abort();
    for server in servers.drain(..) {
        server.shutdown().await;
    }
    for (dir, address) in dirs.iter().zip(&addresses) {
        servers.push(start(dir.path(), at, &address.to_string()).await);
    }
    assert_eq!(client.ask(ChunkOp::Read, 2, 100, 5, b"").await.expect("reads"), &b"hello"[..]);
    assert_eq!(client.ask(ChunkOp::Write, 1, 0, 1, b"x").await, Err(Fault::Fenced));

    // One server is lost: the other two go on.
    servers.remove(0).shutdown().await;
    client.ask(ChunkOp::Discard, 2, 0, 4096, b"").await.expect("discards");
    assert_eq!(client.ask(ChunkOp::Read, 2, 100, 5, b"").await.expect("reads"), vec![0; 5]);
    let much = client.ask(ChunkOp::Read, 2, 1 << 20, 300_000, b"").await.expect("reads");
    assert!(much.iter().all(|byte| *byte == 7));

    // A deleted volume is removed by the copyset's leader and reported.
    mds.state.lock().expect("test").reclaim = Some(5);
    mds.serve(&at.to_string()).await;
    let end = Instant::now() + PATIENCE;
    while !mds.state.lock().expect("test").reclaimed {
        assert!(Instant::now() < end, "the volume was never reclaimed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(client.ask(ChunkOp::Read, 9, 0, 1, b"").await, Err(Fault::Fenced));
    for server in servers {
        server.shutdown().await;
    }
}

/// A planned restart does not pay for what was written before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_after_a_clean_stop_replays_nothing() {
    let mds = Mds::new(1);
    let (at, _serving) = mds.serve("127.0.0.1:0").await;
    let dir = tempfile::tempdir().expect("tempdir");
    let server = start(dir.path(), at, "127.0.0.1:0").await;
    let mut client = Client::new(&[server.wire_address()]);
    client.ask(ChunkOp::Write, 1, 0, 300_000, &[7; 300_000]).await.expect("writes");
    server.shutdown().await;

    let mut counters = Registry::default();
    let server = start_counting(dir.path(), at, "127.0.0.1:0", &mut counters).await;
    let mut client = Client::new(&[server.wire_address()]);
    let read = client.ask(ChunkOp::Read, 1, 0, 300_000, b"").await.expect("reads");
    assert!(read.iter().all(|byte| *byte == 7));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &counters).expect("encodes");
    assert!(text.lines().any(|line| line == "spline_raft_replayed_total 0"), "{text}");
    server.shutdown().await;
}

/// Lease reads rest on one election time: a chunkserver with another one does not start, whether it is new or not.
#[tokio::test(flavor = "multi_thread")]
async fn another_election_time_than_the_clusters_ends_the_start() {
    let mds = Mds::new(1);
    let (at, serving) = mds.serve("127.0.0.1:0").await;
    let dir = tempfile::tempdir().expect("tempdir");
    let longer = Config {
        data_dir: dir.path().to_owned(),
        listen: "127.0.0.1:0".into(),
        mds: vec![at.to_string()],
        spare_chunks: 2,
        election_max_ms: 5000,
        ..Config::default()
    };
    let start_longer = || async {
        let started = Chunkserver::start(longer.clone(), &mut Registry::default()).await;
        format!("{:#}", started.err().expect("is refused"))
    };
    let refused = start_longer().await;
    assert!(refused.contains("does not take this chunkserver: not the cluster's: cluster=1000"), "{refused}");
    start(dir.path(), at, "127.0.0.1:0").await.shutdown().await;
    // From here on it knows by itself.
    serving.abort();
    let refused = start_longer().await;
    assert!(refused.contains("election_max_ms=5000 cluster=1000"), "{refused}");
}

/// A process that may not write its log any more ends, and says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_fails_ends_the_process() {
    let mds = Mds::new(1);
    let (at, _serving) = mds.serve("127.0.0.1:0").await;
    let dir = tempfile::tempdir().expect("tempdir");
    // Beyond the limit of a file's size a write is refused, and else the signal would end the process.
    let mut process = std::process::Command::new("env")
        .args(["--ignore-signal=XFSZ", env!("CARGO_BIN_EXE_spline-chunkserver"), "--listen", "127.0.0.1:0"])
        .args(["--mds", &at.to_string(), "--data-dir"])
        .arg(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut stderr = process.stderr.take().expect("piped");
    let logs = std::thread::spawn(move || {
        let mut logs = String::new();
        stderr.read_to_string(&mut logs).map(|_| logs)
    });
    let end = Instant::now() + PATIENCE;
    let address = loop {
        assert!(Instant::now() < end, "it never registered");
        let address = mds.state.lock().expect("test").addresses.get(&1).cloned();
        match address.and_then(|address| address.parse::<SocketAddr>().ok()) {
            Some(address) => break address,
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let mut client = Client::new(&[address]);
    client.ask(ChunkOp::Write, 1, 0, 4096, &[1; 4096]).await.expect("writes");
    assert!(process.try_wait().expect("asks").is_none());

    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::prlimit(Some(Pid::from_child(&process)), Resource::Fsize, none).expect("limits");
    let writing = tokio::spawn(async move { client.ask(ChunkOp::Write, 1, 0, 4096, &[2; 4096]).await });
    let status = loop {
        assert!(Instant::now() < end, "it runs on");
        match process.try_wait().expect("asks") {
            Some(status) => break status,
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    writing.abort();
    let logs = logs.join().expect("reads").expect("text");
    assert_eq!(status.code(), Some(1), "{logs}");
    assert!(logs.contains("Error: write-ahead log failed") && logs.contains("File too large"), "{logs}");
}
