//! Hosts of one process over loopback. Each lives on its own runtime: dropping that runtime is the nearest thing to
//! `kill -9` (nothing is flushed, every socket is reset).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus_client::registry::Registry;
use spline_raft::{Group, GroupId, LogCommand, NodeId, ProposeError, RaftConfig, RaftHost, Role};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::machine::{Machine, Shared};

pub(crate) const GROUP: GroupId = GroupId(7);
/// Longest wait of any test for anything: far beyond what a slow machine needs.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) address: SocketAddr,
    pub(crate) group: Group,
    pub(crate) shared: Shared,
    pub(crate) host: RaftHost,
    metrics: Registry,
    runtime: Option<Runtime>,
}

impl Node {
    /// Starts a host and its replica; the address is kept over restarts if given.
    pub(crate) fn start(dir: PathBuf, id: NodeId, address: Option<SocketAddr>) -> Node {
        Node::start_with(dir, id, address, |_| {})
    }

    /// Like [`Node::start`], with changes to the configuration.
    pub(crate) fn start_with(
        dir: PathBuf,
        id: NodeId,
        address: Option<SocketAddr>,
        change: impl FnOnce(&mut RaftConfig),
    ) -> Node {
        let mut config = RaftConfig::new(dir.join("raft"), id);
        config.wal.segment_bytes = 4 << 20;
        config.wal.spare_segments = 1;
        change(&mut config);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (address, group, shared, host, metrics) = runtime.block_on(async move {
            let mut metrics = Registry::default();
            let host = RaftHost::open(config, &mut metrics).await.unwrap();
            let machine = Machine::open(&dir.join("state"));
            let shared = machine.shared.clone();
            let group = host.start_group(GROUP, machine).await.unwrap();
            let listen = address.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
            let listener = TcpListener::bind(listen).await.unwrap();
            let address = listener.local_addr().unwrap();
            tokio::spawn(serve(listener, host.clone()));
            (address, group, shared, host, metrics)
        });
        Node { id, address, group, shared, host, metrics, runtime: Some(runtime) }
    }

    /// Ends the host without a word and waits until its log is released.
    pub(crate) fn kill(mut self) -> SocketAddr {
        let address = self.address;
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(PATIENCE);
        }
        address
    }

    /// Ends the host in order.
    pub(crate) fn shut_down(self) -> SocketAddr {
        let host = self.host.clone();
        self.run(async move { host.shutdown().await });
        self.kill()
    }

    pub(crate) fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        self.runtime.as_ref().unwrap().block_on(work)
    }

    pub(crate) fn propose(&self, register: u64, value: &str) -> Result<u64, ProposeError> {
        let (group, command) = (self.group.clone(), command(register, value));
        let answer = self.run(async move { group.propose(command).await })?;
        Ok(u64::from_le_bytes(answer.as_ref().try_into().unwrap()))
    }

    /// A counter of this host.
    pub(crate) fn count(&self, name: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.metrics).unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("spline_raft_{name}_total ")));
        value.unwrap_or_else(|| panic!("no counter {name}")).parse().unwrap()
    }

    pub(crate) fn role(&self) -> Role {
        self.group.status().role
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub(crate) fn command(register: u64, value: &str) -> LogCommand {
    LogCommand {
        meta: Bytes::copy_from_slice(&register.to_le_bytes()),
        payload: Bytes::copy_from_slice(value.as_bytes()),
    }
}

async fn serve(listener: TcpListener, host: RaftHost) {
    while let Ok((stream, _)) = listener.accept().await {
        let host = host.clone();
        tokio::spawn(async move {
            let Ok((sender, mut receiver)) = spline_wire::accept(stream, PATIENCE).await else { return };
            while let Ok(Some(frame)) = receiver.next().await {
                host.handle(frame, &sender).await;
            }
        });
    }
}

pub(crate) fn introduce(nodes: &[&Node]) {
    let book: HashMap<NodeId, SocketAddr> = nodes.iter().map(|node| (node.id, node.address)).collect();
    nodes.iter().for_each(|node| node.host.set_addresses(book.clone()));
}

/// Waits for a condition; the text says what never came true.
pub(crate) fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(begun.elapsed() < PATIENCE, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The index of the node that leads with an applied entry of its term.
pub(crate) fn leader(nodes: &[&Node]) -> usize {
    until("a leader that can be read from", || {
        nodes.iter().position(|node| {
            node.role() == Role::Leader && {
                let group = node.group.clone();
                node.run(async move { group.read_lease().await.is_ok() })
            }
        })
    })
}

/// Proposes at whoever leads until it is answered.
pub(crate) fn write(nodes: &[&Node], register: u64, value: &str) -> u64 {
    until("a write is answered", || nodes[leader(nodes)].propose(register, value).ok())
}

/// Three hosts of one group, with a leader.
pub(crate) fn three(dirs: &[tempfile::TempDir]) -> Vec<Node> {
    let nodes: Vec<Node> =
        (0..3).map(|i| Node::start(dirs[i].path().to_owned(), NodeId(i as u64 + 1), None)).collect();
    let all: Vec<&Node> = nodes.iter().collect();
    introduce(&all);
    let members: Vec<NodeId> = nodes.iter().map(|node| node.id).collect();
    for node in &nodes {
        let (group, members) = (node.group.clone(), members.clone());
        node.run(async move { group.bootstrap(&members).await.unwrap() });
    }
    leader(&all);
    nodes
}

pub(crate) fn dirs(count: usize) -> Vec<tempfile::TempDir> {
    (0..count).map(|_| tempfile::tempdir().unwrap()).collect()
}
