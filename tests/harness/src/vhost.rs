//! A nebd process that exports a volume to a guest as a vhost-user-blk device.

pub use crate::cluster::START_LIMIT;
use crate::cluster::configured;
use crate::metrics;
use crate::process::Process;
use crate::{ports, wait_until};
use anyhow::{Context, ensure};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How nebd shows a volume to its guest.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// Refuse writes.
    pub read_only: bool,
    /// Virtqueues.
    pub queues: u16,
}

impl Default for Shown {
    fn default() -> Self {
        Self { read_only: false, queues: 4 }
    }
}

/// What else a nebd serves.
#[derive(Clone, Debug)]
pub struct Neighbour {
    /// The volume, which is the NBD export's name too.
    pub volume: String,
    /// Where NBD clients connect.
    pub socket: PathBuf,
}

/// A nebd process with a vhost-user-blk export.
#[derive(Debug)]
pub struct VhostExport {
    /// The process.
    pub nebd: Process,
    /// Where the guest's front-end connects.
    pub socket: PathBuf,
    /// The volume.
    pub volume: String,
    /// Another volume that the same process serves over NBD, if that was asked for.
    pub neighbour: Option<Neighbour>,
    metrics: SocketAddr,
}

impl VhostExport {
    /// Starts a nebd on sockets in `dir`, and waits until it serves.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn start(dir: &Path, gateway: &Path, volume: &str, shown: Shown) -> anyhow::Result<Self> {
        Self::start_beside(dir, gateway, volume, shown, None)
    }

    /// As [`VhostExport::start`], in a process that serves another volume over NBD too.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn start_beside(
        dir: &Path,
        gateway: &Path,
        volume: &str,
        shown: Shown,
        neighbour: Option<&str>,
    ) -> anyhow::Result<Self> {
        let mut export = Self::new(dir, gateway, volume, shown, neighbour)?;
        export.nebd.start()?;
        export.wait_until_serving()?;
        Ok(export)
    }

    fn new(
        dir: &Path,
        gateway: &Path,
        volume: &str,
        shown: Shown,
        neighbour: Option<&str>,
    ) -> anyhow::Result<Self> {
        let base = Path::new(volume.trim_start_matches("file:")).file_stem().context("a volume's name")?;
        let name = format!("nebd-vhost-{}", base.to_string_lossy());
        let socket = dir.join(format!("{name}.sock"));
        let neighbour = neighbour.map(|volume| Neighbour {
            volume: volume.to_owned(),
            socket: dir.join(format!("{name}-nbd.sock")),
        });
        let metrics = ports::free(1)?[0];
        let mut text = format!(
            "gateway_socket = {gateway:?}\nmetrics_listen = \"{metrics}\"\nruntime_dir = {:?}\n[[export]]\nvolume = {volume:?}\n\
             vhost_socket = {socket:?}\nvhost_queues = {}\nread_only = {}\n",
            dir.join(format!("run-{name}")),
            shown.queues,
            shown.read_only,
        );
        if let Some(Neighbour { volume, socket }) = &neighbour {
            text += &format!("[[export]]\nvolume = {volume:?}\nlisten_unix = {socket:?}\n");
        }
        let nebd = configured(dir, &name, "spline-nebd", &text)?;
        Ok(Self { nebd, socket, volume: volume.to_owned(), neighbour, metrics })
    }

    /// Kills it, starts it again, and waits until it serves.
    ///
    /// # Errors
    /// Why it does not serve.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.nebd.restart()?;
        self.wait_until_serving()
    }

    /// Waits until it talks to front-ends.
    ///
    /// # Errors
    /// Why it does not.
    pub fn wait_until_serving(&mut self) -> anyhow::Result<()> {
        let (nebd, socket) = (&mut self.nebd, &self.socket);
        wait_until("nebd to serve a guest", START_LIMIT, || {
            nebd.assert_running()?;
            answers(socket).map(Some)
        })
        .with_context(|| self.nebd.log_tail())
    }

    /// Sum of a counter or gauge, over all labels that begin as `name` does.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn metric(&self, name: &str) -> anyhow::Result<f64> {
        metrics::sum(self.metrics, name)
    }
}

/// Whether a device listens at `socket` and tells its features (vhost-user, `VHOST_USER_GET_FEATURES`).
///
/// # Errors
/// If nobody listens, or what is said is no answer.
pub fn answers(socket: &Path) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let words = [1u32, 1, 0];
    stream.write_all(&words.map(u32::to_le_bytes).concat())?;
    let mut reply = [0; 20];
    stream.read_exact(&mut reply)?;
    ensure!(reply[..12] == [1u32, 5, 8].map(u32::to_le_bytes).concat(), "no answer: {reply:?}");
    Ok(())
}
