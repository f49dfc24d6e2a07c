//! A cluster of real processes on loopback: one metadata server, three chunkservers, a gateway, and a nebd per export.

use crate::process::Process;
use crate::{binaries, ports, tool, wait_until};
use anyhow::{Context, ensure};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
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
    chunkserver_addresses: Vec<SocketAddr>,
    dir: TempDir,
}

/// A nebd process and what it exports.
#[derive(Debug)]
pub struct Export {
    /// The process.
    pub nebd: Process,
    /// Its unix socket.
    pub socket: PathBuf,
    /// The volume, which is the export's name too.
    pub volume: String,
}

impl Cluster {
    /// Starts all and waits until every copyset is led.
    ///
    /// # Errors
    /// What did not start.
    pub fn start() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("spline-").tempdir()?;
        let root = dir.path();
        let addresses = ports::free(CHUNKSERVERS + 2)?;
        let mds_address = addresses[0];
        let mds = configured(
            root,
            "mds",
            "spline-mds",
            &format!(
                "data_dir = {:?}\nlisten = \"{mds_address}\"\ncopysets = {COPYSETS}\nheartbeat = \"200ms\"\ndown_after = \"2s\"\n",
                made(root.join("mds"))?
            ),
        )?;
        let mut chunkservers = Vec::new();
        let chunkserver_addresses = addresses[1..=CHUNKSERVERS].to_vec();
        for (at, listen) in chunkserver_addresses.iter().enumerate() {
            let number = at + 1;
            let name = format!("chunkserver{number}");
            let text = format!(
                "data_dir = {:?}\nlisten = \"{listen}\"\nzone = \"z{number}\"\nmds = [\"{mds_address}\"]\nspare_chunks = 2\n",
                made(root.join(&name))?
            );
            chunkservers.push(configured(root, &name, "spline-chunkserver", &text)?);
        }
        let text = format!(
            "id = \"test\"\nlink_socket = {:?}\nadmin_listen = \"{}\"\nmds = [\"{mds_address}\"]\n",
            root.join("gateway.sock"),
            addresses[CHUNKSERVERS + 1],
        );
        let gateway = configured(root, "gateway", "spline-gateway", &text)?;
        let mut cluster = Self { mds, chunkservers, gateway, mds_address, chunkserver_addresses, dir };
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

    /// Where the metadata server listens.
    pub fn mds_address(&self) -> SocketAddr {
        self.mds_address
    }

    /// Link socket of the gateway.
    pub fn gateway_socket(&self) -> PathBuf {
        self.dir().join("gateway.sock")
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
                    number: self.number_of(server["address"].as_str().unwrap_or_default()),
                    state: server["state"].as_str().unwrap_or_default().to_owned(),
                    leaders: server["leaders"].as_u64().unwrap_or(0),
                })
                .collect(),
            leaders: copysets.map(|copyset| copyset["leader"].as_u64()).collect(),
        })
    }

    fn number_of(&self, address: &str) -> Option<usize> {
        self.chunkserver_addresses.iter().position(|known| known.to_string() == address)
    }

    /// Positions in [`Cluster::chunkservers`], the one that leads most copysets first.
    ///
    /// # Errors
    /// If the metadata server does not answer.
    pub fn by_leadership(&self) -> anyhow::Result<Vec<usize>> {
        let mut servers = self.status()?.servers;
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
}

/// What the metadata server thinks of a chunkserver.
#[derive(Debug)]
pub struct Server {
    /// Position in [`Cluster::chunkservers`].
    pub number: Option<usize>,
    /// up, down or gone.
    pub state: String,
    /// Copysets it leads.
    pub leaders: u64,
}

impl Export {
    /// Starts a nebd on `<dir>/<volume>.sock`, and waits until it serves.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn start(dir: &Path, gateway: &Path, volume: &str, read_only: bool) -> anyhow::Result<Self> {
        let name = format!("nebd-{}{}", volume.replace(['/', ':'], "_"), if read_only { "-ro" } else { "" });
        let socket = dir.join(format!("{name}.sock"));
        let text = format!(
            "volume = {volume:?}\ngateway_socket = {gateway:?}\nlisten_unix = {socket:?}\nread_only = {read_only}\nruntime_dir = {:?}\n",
            dir.join(format!("run-{name}"))
        );
        let nebd = configured(dir, &name, "spline-nebd", &text)?;
        let mut export = Self { nebd, socket, volume: volume.to_owned() };
        export.nebd.start()?;
        export.wait_until_serving()?;
        Ok(export)
    }

    /// Waits until a client can enter the export.
    ///
    /// # Errors
    /// Why none can.
    pub fn wait_until_serving(&mut self) -> anyhow::Result<()> {
        wait_until("nebd to serve", START_LIMIT, || {
            self.nebd.assert_running()?;
            let connection =
                crate::nbd::Connection::open(&self.socket, &self.volume, Duration::from_secs(10))?;
            connection.close()?;
            Ok(Some(()))
        })
        .with_context(|| self.nebd.log_tail())
    }

    /// Its NBD URI.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.volume, self.socket.display())
    }
}

/// A process with a config file of its own.
pub(crate) fn configured(dir: &Path, name: &str, binary: &str, text: &str) -> anyhow::Result<Process> {
    let file = dir.join(format!("{name}.toml"));
    std::fs::write(&file, text)?;
    Ok(Process::new(name, binaries::find(binary)?, vec!["--config".into(), file.into()], dir))
}

fn made(path: PathBuf) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(&path)?;
    Ok(path)
}
