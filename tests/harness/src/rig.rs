//! What a behaviour is tested against: a gateway on local files, or a whole cluster.

use crate::cluster::{Cluster, START_LIMIT, Shape, configured};
use crate::export::Export;
use crate::process::Process;
use crate::vhost::{Shown, VhostExport};
use crate::{binaries, ports, tool, wait_until};
use anyhow::Context;
use serde_json::Value;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use tempfile::TempDir;

/// An upgrade that is under way.
#[derive(Debug)]
pub struct Upgrading(JoinHandle<anyhow::Result<String>>);

/// Something that serves volumes.
#[derive(Debug)]
pub enum Rig {
    /// A gateway with the file engine, and its directory.
    File {
        /// The gateway.
        gateway: Process,
        /// Where its administration listens.
        admin: SocketAddr,
        /// Files, sockets, logs.
        dir: TempDir,
    },
    /// A cluster.
    Cluster(Box<Cluster>),
}

impl Rig {
    /// Starts a gateway that serves files, past the page cache where it can.
    ///
    /// # Errors
    /// If it does not start.
    pub fn file() -> anyhow::Result<Self> {
        Self::file_with("")
    }

    /// As [`Rig::file`], with more lines in the gateway's config.
    ///
    /// # Errors
    /// If it does not start.
    pub fn file_with(more: &str) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("spline-").tempdir()?;
        let socket = dir.path().join("gateway.sock");
        let admin = ports::free(1)?[0];
        let text = format!(
            "link_socket = {socket:?}\nadmin_listen = \"{admin}\"\nmds = []\nfile_roots = [{:?}]\n{more}",
            dir.path().canonicalize()?
        );
        let mut gateway = configured(dir.path(), "gateway", "spline-gateway", &text)?;
        gateway.start()?;
        wait_until("the gateway to listen", START_LIMIT, || {
            gateway.assert_running()?;
            Ok(Some(UnixStream::connect(&socket).map(drop)?))
        })?;
        Ok(Self::File { gateway, admin, dir })
    }

    /// Starts a cluster.
    ///
    /// # Errors
    /// If it does not start.
    pub fn cluster() -> anyhow::Result<Self> {
        Ok(Self::Cluster(Box::new(Cluster::start()?)))
    }

    /// As [`Rig::cluster`], with more lines in the gateway's config.
    ///
    /// # Errors
    /// If it does not start.
    pub fn cluster_with(gateway_config: &'static str) -> anyhow::Result<Self> {
        Ok(Self::Cluster(Box::new(Cluster::start_as(&Shape { gateway_config, ..Shape::default() })?)))
    }

    /// Both kinds, one after the other: runs `test` against each and says which failed.
    ///
    /// # Errors
    /// The first failure.
    pub fn both(test: impl Fn(&Rig) -> anyhow::Result<()>) -> anyhow::Result<()> {
        test(&Self::file()?).map_err(|error| error.context("engine=file"))?;
        test(&Self::cluster()?).map_err(|error| error.context("engine=cluster"))
    }

    /// Directory for the test's own files.
    pub fn dir(&self) -> &Path {
        match self {
            Self::File { dir, .. } => dir.path(),
            Self::Cluster(cluster) => cluster.dir(),
        }
    }

    /// Creates an empty volume of `bytes` and answers its name.
    ///
    /// # Errors
    /// What refused it.
    pub fn create(&self, name: &str, bytes: u64) -> anyhow::Result<String> {
        match self {
            Self::Cluster(cluster) => {
                cluster.create_volume(name, &bytes.to_string())?;
                Ok(name.to_owned())
            }
            Self::File { dir, .. } => {
                let path: PathBuf = dir.path().canonicalize()?.join(format!("{name}.img"));
                std::fs::File::create(&path)?.set_len(bytes)?;
                Ok(format!("file:{}", path.display()))
            }
        }
    }

    /// Exports a volume.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn export(&self, volume: &str, read_only: bool) -> anyhow::Result<Export> {
        Export::start(self.dir(), &self.gateway_socket(), volume, read_only)
    }

    /// Creates and exports a volume.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn serve(&self, name: &str, bytes: u64) -> anyhow::Result<Export> {
        self.export(&self.create(name, bytes)?, false)
    }

    /// Exports a volume to a guest.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn export_to_guest(&self, volume: &str, shown: Shown) -> anyhow::Result<VhostExport> {
        VhostExport::start(self.dir(), &self.gateway_socket(), volume, shown)
    }

    /// As [`Rig::export_to_guest`], from a process that serves another volume over NBD too.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn export_to_guest_beside(
        &self,
        volume: &str,
        shown: Shown,
        neighbour: &str,
    ) -> anyhow::Result<VhostExport> {
        VhostExport::start_beside(self.dir(), &self.gateway_socket(), volume, shown, Some(neighbour))
    }

    /// The gateway.
    pub fn gateway(&self) -> &Process {
        match self {
            Self::File { gateway, .. } => gateway,
            Self::Cluster(cluster) => &cluster.gateway,
        }
    }

    /// The gateway, to be killed and started.
    pub fn gateway_mut(&mut self) -> &mut Process {
        match self {
            Self::File { gateway, .. } => gateway,
            Self::Cluster(cluster) => &mut cluster.gateway,
        }
    }

    /// Where the gateway's administration listens.
    pub fn gateway_admin(&self) -> SocketAddr {
        match self {
            Self::File { admin, .. } => *admin,
            Self::Cluster(cluster) => cluster.gateway_admin(),
        }
    }

    /// What `spline gateway status` says.
    ///
    /// # Errors
    /// If the gateway does not answer.
    pub fn gateway_status(&self) -> anyhow::Result<Value> {
        let text = tool::run(&mut gateway_command("status", self.gateway_admin())?)?;
        serde_json::from_str(&text).with_context(|| format!("not json: {text:?}"))
    }

    /// Runs `spline gateway upgrade`, to another binary than the running one if there is one; from then on the new process is
    /// the gateway. Answers what the command said.
    ///
    /// # Errors
    /// Why the gateway was not upgraded.
    pub fn upgrade(&mut self, binary: Option<&Path>) -> anyhow::Result<Value> {
        let upgrading = self.begin_upgrade(binary)?;
        self.end_upgrade(upgrading)
    }

    /// Begins what [`Rig::upgrade`] does; the command runs by itself until [`Rig::end_upgrade`] waits for it.
    ///
    /// # Errors
    /// If the command can not be run.
    pub fn begin_upgrade(&self, binary: Option<&Path>) -> anyhow::Result<Upgrading> {
        Process::adopt_orphans()?;
        let mut command = gateway_command("upgrade", self.gateway_admin())?;
        if let Some(binary) = binary {
            command.arg("--binary").arg(binary);
        }
        Ok(Upgrading(std::thread::spawn(move || tool::run(&mut command))))
    }

    /// Waits for the end of an upgrade; from then on the new process is the gateway. Answers what the command said.
    ///
    /// # Errors
    /// Why the gateway was not upgraded.
    pub fn end_upgrade(&mut self, upgrading: Upgrading) -> anyhow::Result<Value> {
        let text = upgrading.0.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        let told: Value = serde_json::from_str(&text).with_context(|| format!("not json: {text:?}"))?;
        let pid = told["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("no process id")?;
        self.gateway_mut().follow(pid, START_LIMIT)?;
        Ok(told)
    }

    /// Link socket of the gateway.
    pub fn gateway_socket(&self) -> PathBuf {
        self.dir().join("gateway.sock")
    }
}

fn gateway_command(what: &str, admin: SocketAddr) -> anyhow::Result<Command> {
    let mut command = Command::new(binaries::find("spline")?);
    command.args(["gateway", what, "--json", "--admin", &admin.to_string()]);
    Ok(command)
}
