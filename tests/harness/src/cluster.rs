//! A cluster of real processes on loopback: one metadata server, three chunkservers, a gateway, and a nebd per export.

use crate::export::Export;
use crate::process::Process;
use crate::proxy::{self, Hold};
use crate::{binaries, metrics, ports, tool, wait_until};
use anyhow::{Context, ensure};
use serde_json::Value;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Chunkservers of a cluster under test.
pub const CHUNKSERVERS: usize = 3;
/// Copysets: enough that every chunkserver leads some, few enough for two cores.
const COPYSETS: u32 = 6;
/// Time for a part to serve, far above the usual: the machine may be busy with other tests.
pub const START_LIMIT: Duration = Duration::from_secs(60);

/// The running processes. Dropping it kills them; if the test panicked, their logs are shown.
#[derive(Debug)]
pub struct Cluster {
    /// The metadata server.
    pub mds: Process,
    /// The chunkservers, zones z1 to z3.
    pub chunkservers: Vec<Process>,
    /// The gateway.
    pub gateway: Process,
    mds_address: SocketAddr,
    gateway_admin: SocketAddr,
    chunkserver_addresses: Vec<SocketAddr>,
    metrics_addresses: Vec<SocketAddr>,
    hold: Arc<Hold>,
    dir: TempDir,
}

/// What a cluster under test is like, where it is not as usual.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// Log that a copyset may have past its checkpoint, such as `1M`; empty: the default.
    pub checkpoint_log: &'static str,
    /// Chunkservers are reached through proxies that can hold a message back, see [`Cluster::hold`].
    pub proxied: bool,
    /// Where the first chunkserver keeps its data; the others, in the cluster's directory.
    pub first_data_dir: Option<PathBuf>,
    /// Raft groups; `None`: six.
    pub copysets: Option<u32>,
    /// More lines of the gateway's config.
    pub gateway_config: &'static str,
}

impl Cluster {
    /// Starts all, as usual, and waits until every copyset is led.
    ///
    /// # Errors
    /// What did not start.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_as(&Shape::default())
    }

    /// As [`Cluster::start`], in another shape.
    ///
    /// # Errors
    /// What did not start.
    pub fn start_as(shape: &Shape) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("spline-").tempdir()?;
        let root = dir.path();
        let addresses = ports::free(2 * CHUNKSERVERS + 2)?;
        let mds_address = addresses[0];
        let copysets = shape.copysets.unwrap_or(COPYSETS);
        let mds = configured(
            root,
            "mds",
            "spline-mds",
            &format!(
                "data_dir = {:?}\nlisten = \"{mds_address}\"\ncopysets = {copysets}\nheartbeat = \"200ms\"\ndown_after = \"2s\"\n",
                made(root.join("mds"))?
            ),
        )?;
        let (mut chunkservers, mut chunkserver_addresses) = (Vec::new(), Vec::new());
        let hold = Arc::new(Hold::default());
        let metrics_addresses = addresses[CHUNKSERVERS + 1..=2 * CHUNKSERVERS].to_vec();
        for (at, listen) in addresses[1..=CHUNKSERVERS].iter().enumerate() {
            let number = at + 1;
            let name = format!("chunkserver{number}");
            let data_dir =
                shape.first_data_dir.clone().filter(|_| at == 0).unwrap_or_else(|| root.join(&name));
            let metrics = metrics_addresses[at];
            let mut text = format!(
                "data_dir = {:?}\nlisten = \"{listen}\"\nzone = \"z{number}\"\nmds = [\"{mds_address}\"]\nspare_chunks = 2\nlog_segment = \"32M\"\n\
                 metrics_listen = \"{metrics}\"\n",
                made(data_dir)?
            );
            let mut address = *listen;
            if shape.proxied {
                let proxy = TcpListener::bind("127.0.0.1:0")?;
                address = proxy.local_addr()?;
                text += &format!("advertise = \"{address}\"\n");
                proxy::start(proxy, *listen, Arc::clone(&hold))?;
            }
            if !shape.checkpoint_log.is_empty() {
                text += &format!("checkpoint_log = {:?}\n", shape.checkpoint_log);
            }
            chunkserver_addresses.push(address);
            chunkservers.push(configured(root, &name, "spline-chunkserver", &text)?);
        }
        let gateway_admin = addresses[2 * CHUNKSERVERS + 1];
        let gateway = gateway(root, "gateway", mds_address, gateway_admin, shape.gateway_config)?;
        let mut cluster = Self {
            mds,
            chunkservers,
            gateway,
            mds_address,
            gateway_admin,
            chunkserver_addresses,
            metrics_addresses,
            hold,
            dir,
        };
        cluster.mds.start()?;
        cluster.chunkservers.iter_mut().try_for_each(Process::start)?;
        cluster.gateway.start()?;
        cluster.wait_until_led()?;
        Ok(cluster)
    }

    /// The directory of data, sockets, configs and logs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Directory of a chunkserver's data, if it lies in the cluster's directory.
    pub fn data_dir(&self, chunkserver: usize) -> PathBuf {
        self.dir().join(format!("chunkserver{}", chunkserver + 1))
    }

    /// Metrics page of a chunkserver.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn metrics_page(&self, chunkserver: usize) -> anyhow::Result<String> {
        metrics::page(self.metrics_addresses[chunkserver])
    }

    /// Where the metadata server listens.
    pub fn mds_address(&self) -> SocketAddr {
        self.mds_address
    }

    /// Where the gateway's administration listens.
    pub fn gateway_admin(&self) -> SocketAddr {
        self.gateway_admin
    }

    /// Link socket of the gateway.
    pub fn gateway_socket(&self) -> PathBuf {
        self.dir().join("gateway.sock")
    }

    /// What the proxies of a cluster that has some hold back.
    pub fn hold(&self) -> &Hold {
        &self.hold
    }

    /// Starts a second gateway, of another name; answers it and its link socket.
    ///
    /// # Errors
    /// If it does not start.
    pub fn second_gateway(&self) -> anyhow::Result<(Process, PathBuf)> {
        let mut process = gateway(self.dir(), "gateway2", self.mds_address, ports::free(1)?[0], "")?;
        process.start()?;
        let socket = self.dir().join("gateway2.sock");
        wait_until("the second gateway to listen", START_LIMIT, || {
            process.assert_running()?;
            Ok(Some(std::os::unix::net::UnixStream::connect(&socket).map(drop)?))
        })?;
        Ok((process, socket))
    }

    /// Sum of a counter or gauge of one chunkserver, over all labels that begin as `name` does.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn metric(&self, chunkserver: usize, name: &str) -> anyhow::Result<f64> {
        metrics::sum(self.metrics_addresses[chunkserver], name)
    }

    /// As [`Cluster::metric`], over all chunkservers that answer.
    pub fn metric_of_all(&self, name: &str) -> f64 {
        (0..CHUNKSERVERS).filter_map(|chunkserver| self.metric(chunkserver, name).ok()).sum()
    }

    /// Runs `spline --json` with `arguments` and answers what it printed.
    ///
    /// # Errors
    /// What it said if it failed.
    pub fn spline(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let mut command = Command::new(binaries::find("spline")?);
        command.args(arguments).args(["--json", "--mds", &self.mds_address.to_string()]);
        let text = tool::run(&mut command)?;
        serde_json::from_str(&text).with_context(|| format!("not json: {text:?}"))
    }

    /// Waits until every chunkserver is up and every copyset has a leader.
    ///
    /// # Errors
    /// What is missing.
    pub fn wait_until_led(&mut self) -> anyhow::Result<()> {
        wait_until("every copyset to be led", START_LIMIT, || {
            let status = self.status()?;
            let up = status.servers.iter().filter(|server| server.state == "up").count();
            let led = !status.leaders.is_empty() && status.leaders.iter().all(Option::is_some);
            ensure!(up >= CHUNKSERVERS && led, "up={up} leaders={:?}", status.leaders);
            Ok(Some(()))
        })
        .with_context(|| self.logs())
    }

    /// What `spline cluster status` says.
    ///
    /// # Errors
    /// If the metadata server does not answer.
    pub fn status(&self) -> anyhow::Result<Status> {
        let value = self.spline(&["cluster", "status"])?;
        let servers = value["chunkservers"].as_array().context("chunkservers")?.iter();
        let copysets = value["copysets"].as_array().context("copysets")?.iter();
        Ok(Status {
            servers: servers
                .map(|server| Server {
                    id: server["id"].as_u64().unwrap_or(0),
                    number: self.number_of(server["address"].as_str().unwrap_or_default()),
                    state: server["state"].as_str().unwrap_or_default().to_owned(),
                    full: server["full"].as_bool().unwrap_or(false),
                    heard: Duration::from_millis(server["last_heartbeat_ms"].as_u64().unwrap_or(u64::MAX)),
                    leaders: server["leaders"].as_u64().unwrap_or(0),
                })
                .collect(),
            leaders: copysets.clone().map(|copyset| copyset["leader"].as_u64()).collect(),
            members: copysets
                .map(|copyset| {
                    copyset["members"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect()
                })
                .collect(),
        })
    }

    fn number_of(&self, address: &str) -> Option<usize> {
        self.chunkserver_addresses.iter().position(|known| known.to_string() == address)
    }

    /// Waits until every chunkserver has reported once more, and so was told what the metadata server knows now.
    ///
    /// # Errors
    /// If one has not.
    pub fn wait_until_told(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        wait_until("every chunkserver to be told", START_LIMIT, || {
            let status = self.status()?;
            let told = |server: &Server| server.number.is_none() || server.heard < begun.elapsed();
            Ok(status.servers.iter().all(told).then_some(()))
        })
    }

    /// Positions in [`Cluster::chunkservers`], the one that leads most copysets first.
    ///
    /// # Errors
    /// If the metadata server does not answer.
    pub fn by_leadership(&self) -> anyhow::Result<Vec<usize>> {
        let mut servers = self.status()?.servers;
        servers.retain(|server| server.number.is_some());
        servers.sort_by_key(|server| std::cmp::Reverse(server.leaders));
        let numbers: Vec<usize> = servers.iter().filter_map(|server| server.number).collect();
        ensure!(numbers.len() == CHUNKSERVERS, "chunkservers={numbers:?}");
        Ok(numbers)
    }

    /// Creates a volume; `size` as people write it.
    ///
    /// # Errors
    /// What `spline` says.
    pub fn create_volume(&self, name: &str, size: &str) -> anyhow::Result<()> {
        self.spline(&["volume", "create", name, size]).map(drop)
    }

    /// Starts a nebd that exports `volume`, and waits until it serves.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn export(&self, volume: &str, read_only: bool) -> anyhow::Result<Export> {
        Export::start(self.dir(), &self.gateway_socket(), volume, read_only)
    }

    /// Kills every process at once, then starts all again.
    ///
    /// # Errors
    /// What did not start.
    pub fn restart_all(&mut self) -> anyhow::Result<()> {
        self.gateway.kill9()?;
        self.chunkservers.iter_mut().try_for_each(Process::kill9)?;
        self.mds.kill9()?;
        self.mds.start()?;
        self.chunkservers.iter_mut().try_for_each(Process::start)?;
        self.gateway.start()
    }

    fn logs(&self) -> String {
        let all = [&self.mds, &self.gateway].into_iter().chain(&self.chunkservers);
        all.map(|process| format!("---- {} ----\n{}\n", process.name(), process.log_tail())).collect()
    }
}

/// What the metadata server thinks of the cluster.
#[derive(Debug)]
pub struct Status {
    /// The chunkservers.
    pub servers: Vec<Server>,
    /// The leader's id of each copyset.
    pub leaders: Vec<Option<u64>>,
    /// The members' ids of each copyset.
    pub members: Vec<Vec<u64>>,
}

impl Status {
    /// The server that runs at a position in [`Cluster::chunkservers`] now.
    pub fn server(&self, number: usize) -> Option<&Server> {
        self.servers.iter().find(|server| server.number == Some(number))
    }
}

/// What the metadata server thinks of a chunkserver.
#[derive(Debug)]
pub struct Server {
    /// Its id; another one once its directory was emptied.
    pub id: u64,
    /// Position in [`Cluster::chunkservers`].
    pub number: Option<usize>,
    /// up, down or gone.
    pub state: String,
    /// It can not take another chunk.
    pub full: bool,
    /// Time since it last reported.
    pub heard: Duration,
    /// Copysets it leads.
    pub leaders: u64,
}

/// A process with a config file of its own.
pub(crate) fn configured(dir: &Path, name: &str, binary: &str, text: &str) -> anyhow::Result<Process> {
    let file = dir.join(format!("{name}.toml"));
    std::fs::write(&file, text)?;
    Ok(Process::new(name, binaries::find(binary)?, vec!["--config".into(), file.into()], dir))
}

fn gateway(
    root: &Path,
    name: &str,
    mds: SocketAddr,
    admin: SocketAddr,
    more: &str,
) -> anyhow::Result<Process> {
    let socket = root.join(format!("{name}.sock"));
    let text = format!(
        "id = {name:?}\nlink_socket = {socket:?}\nadmin_listen = \"{admin}\"\nmds = [\"{mds}\"]\n{more}"
    );
    configured(root, name, "spline-gateway", &text)
}

fn made(path: PathBuf) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(&path)?;
    Ok(path)
}
