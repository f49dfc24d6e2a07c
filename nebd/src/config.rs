//! The config of one nebd process: where its gateway is, and the exports that it serves.
//!
//! Read by `main`, checked once; everything behind it takes [`Checked`], one for each export.

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use spline_types::VolumeName;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// As in the TOML file; flags override it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The gateway's unix socket.
    pub gateway_socket: PathBuf,
    /// Holds `nebd/<volume>.json` while a volume is served.
    pub runtime_dir: PathBuf,
    /// TCP address for `GET /metrics`.
    pub metrics_listen: Option<SocketAddr>,
    /// User to become once the sockets are bound; none: stay as started. Its groups come with it.
    pub user: Option<String>,
    /// Give up what this process does not need once it has its sockets: other files, other programs, most of the kernel.
    pub confine: bool,
    /// The exports, `[[export]]` each.
    #[serde(rename = "export")]
    pub exports: Vec<ExportConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            gateway_socket: "/run/spline/gateway.sock".into(),
            runtime_dir: "/run/spline".into(),
            metrics_listen: None,
            user: None,
            confine: true,
            exports: Vec::new(),
        }
    }
}

/// One volume, and how guests see it: over NBD, as a vhost-user-blk device, or both.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExportConfig {
    /// The volume to serve.
    pub volume: String,
    /// Name of the NBD export; empty: the volume's name. The empty name is always served too.
    pub name: String,
    /// Shown by `nbdinfo --list`.
    pub description: String,
    /// Refuse writes.
    pub read_only: bool,
    /// Take the volume from another gateway that serves it, once, at the start. A flag only: from a file, a nebd that is
    /// started again would take it again.
    #[serde(skip)]
    pub force: bool,
    /// Unix socket for NBD clients.
    pub listen_unix: Option<PathBuf>,
    /// TCP address for NBD clients; loopback only, unless `allow_insecure`.
    pub listen_tcp: Option<SocketAddr>,
    /// Allow TCP clients from elsewhere: NBD without TLS is open to whoever reaches it.
    pub allow_insecure: bool,
    /// NBD clients at a time; more are turned away.
    pub max_connections: usize,
    /// Seconds that an NBD client may take for its handshake.
    pub handshake_seconds: u64,
    /// Seconds after which the log names an NBD client that neither reads its replies nor goes on with a write, if it holds
    /// more memory than its share and others wait for it. It is not cut: its guest may be paused.
    pub stuck_seconds: u64,
    /// Unix socket for a vhost-user front-end, such as QEMU.
    pub vhost_socket: Option<PathBuf>,
    /// Most queues that a guest may use.
    pub vhost_queues: u16,
    /// Most descriptors of one queue; a power of two.
    pub vhost_queue_size_max: u16,
    /// Threads that serve the queues; none: one for each queue, but no more than there are cores, nor than 4.
    pub vhost_threads: Option<u16>,
    /// Serial number of the device, at most 20 printable ASCII characters; empty: the first 20 of the volume's name.
    pub serial: String,
}

impl Default for ExportConfig {
    fn default() -> Self {
        Self {
            volume: String::new(),
            name: String::new(),
            description: String::new(),
            read_only: false,
            force: false,
            listen_unix: None,
            listen_tcp: None,
            allow_insecure: false,
            max_connections: 64,
            handshake_seconds: 10,
            stuck_seconds: 30,
            vhost_socket: None,
            vhost_queues: QUEUES_MAX,
            vhost_queue_size_max: QUEUE_SIZE_MAX,
            vhost_threads: None,
            serial: String::new(),
        }
    }
}

/// Most exports of one process: they share its descriptors, its memory and its fate.
pub const EXPORTS_MAX: usize = 64;
/// Most NBD clients that a config may allow: each may hold its share, see [`crate::budget`], beside what is common to all.
const CONNECTIONS_MAX: usize = 1024;
/// Longest export name or description, bytes: every client shows it whole.
const TEXT_BYTES_MAX: usize = 256;
/// Most queues of a device: more than the virtual processors that one disk is worth.
pub const QUEUES_MAX: u16 = 16;
/// Most descriptors of one queue, what QEMU offers at most.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Least descriptors of one queue: a request takes three.
const QUEUE_SIZE_MIN: u16 = 4;
/// Threads of a device if the config does not say: four fill what a gateway answers.
const THREADS_DEFAULT_MAX: u16 = 4;
/// Bytes of a serial number, virtio 1.2 section 5.2.6, `VIRTIO_BLK_T_GET_ID`.
pub const SERIAL_BYTES: usize = 20;

/// What the config of one export comes to, with what it needs of its process.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The gateway's unix socket.
    pub gateway_socket: PathBuf,
    /// Where the status files lie.
    pub runtime_dir: PathBuf,
    /// The volume.
    pub volume: VolumeName,
    /// The export's name.
    pub name: String,
    /// One line for humans; may be empty.
    pub description: String,
    /// Refuse writes.
    pub read_only: bool,
    /// Take the volume from another gateway, once.
    pub force: bool,
    /// Served over NBD.
    pub nbd: Option<CheckedNbd>,
    /// Served as a vhost-user-blk device. At least one of the two is there.
    pub vhost: Option<CheckedVhost>,
}

/// How an export is served over NBD.
#[derive(Clone, Debug)]
pub struct CheckedNbd {
    /// Unix socket for clients.
    pub listen_unix: Option<PathBuf>,
    /// TCP address for clients. At least one of the two is there.
    pub listen_tcp: Option<SocketAddr>,
    /// Clients at a time.
    pub max_connections: usize,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How long a client may take nothing while others wait for what it holds, before the log names it.
    pub stuck_limit: Duration,
}

/// How an export is served as a vhost-user-blk device.
#[derive(Clone, Debug)]
pub struct CheckedVhost {
    /// Unix socket for the front-end.
    pub socket: PathBuf,
    /// Most queues, 1 to 16.
    pub queues: u16,
    /// Most descriptors of one queue, a power of two up to 1024.
    pub queue_size_max: u16,
    /// Threads that serve them, 1 to `queues`.
    pub threads: u16,
    /// At most 20 bytes of printable ASCII.
    pub serial: String,
}

impl Config {
    /// Checks what types can not. Answers at least one export; their volumes and sockets are distinct.
    ///
    /// # Errors
    /// The first thing that is wrong, and what to do about it.
    pub fn check(&self) -> anyhow::Result<Vec<Checked>> {
        ensure!(
            !self.exports.is_empty(),
            "no volume given: use --volume, or [[export]] with volume = \"disk0\""
        );
        ensure!(
            self.exports.len() <= EXPORTS_MAX,
            "too many exports for one process, start another: exports={} limit={EXPORTS_MAX}",
            self.exports.len()
        );
        ensure!(self.user.as_deref() != Some(""), "user must not be empty: leave it out to stay as started");
        let mut checked = Vec::new();
        for export in &self.exports {
            let context = || format!("export of volume={:?}", export.volume);
            checked.push(export.check(self).with_context(context)?);
        }
        distinct("volume", self.exports.iter().map(|export| &export.volume))?;
        distinct(
            "socket",
            self.exports.iter().flat_map(|export| export.listen_unix.iter().chain(&export.vhost_socket)),
        )?;
        let tcp = self.exports.iter().filter_map(|export| export.listen_tcp);
        distinct("listen_tcp", tcp.filter(|address| address.port() != 0))?;
        Ok(checked)
    }
}

fn distinct<T: Eq + std::hash::Hash + std::fmt::Debug>(
    key: &str,
    values: impl Iterator<Item = T>,
) -> anyhow::Result<()> {
    let mut seen = HashSet::new();
    for value in values {
        if let Some(twice) = seen.replace(value) {
            bail!("{key} is used twice, each needs its own: {key}={twice:?}");
        }
    }
    Ok(())
}

impl ExportConfig {
    fn check(&self, process: &Config) -> anyhow::Result<Checked> {
        if self.volume.is_empty() {
            bail!("no volume given: set volume, such as volume = \"disk0\"");
        }
        let volume: VolumeName = self.volume.parse().map_err(anyhow::Error::msg).context("volume")?;
        if self.listen_unix.is_none() && self.listen_tcp.is_none() && self.vhost_socket.is_none() {
            bail!("nowhere to listen: set listen_unix, listen_tcp or vhost_socket");
        }
        for (key, text) in [("name", &self.name), ("description", &self.description)] {
            let plain = text.len() <= TEXT_BYTES_MAX && !text.chars().any(char::is_control);
            ensure!(plain, "{key} must have at most {TEXT_BYTES_MAX} bytes and no control characters");
        }
        Ok(Checked {
            gateway_socket: process.gateway_socket.clone(),
            runtime_dir: process.runtime_dir.clone(),
            volume,
            name: if self.name.is_empty() { self.volume.clone() } else { self.name.clone() },
            description: self.description.clone(),
            read_only: self.read_only,
            force: self.force,
            nbd: self.check_nbd()?,
            vhost: self.check_vhost()?,
        })
    }

    fn check_nbd(&self) -> anyhow::Result<Option<CheckedNbd>> {
        if let Some(address) = self.listen_tcp
            && !address.ip().is_loopback()
            && !self.allow_insecure
        {
            bail!(
                "NBD here has neither encryption nor passwords, so TCP is for loopback only; use an SSH tunnel, or set \
                 allow_insecure on a network that you trust: listen_tcp={address}"
            );
        }
        ensure!(
            (1..=CONNECTIONS_MAX).contains(&self.max_connections),
            "max_connections must be 1 to {CONNECTIONS_MAX}: max_connections={}",
            self.max_connections
        );
        for (key, seconds) in
            [("handshake_seconds", self.handshake_seconds), ("stuck_seconds", self.stuck_seconds)]
        {
            ensure!((1..=3600).contains(&seconds), "{key} must be 1 to 3600: {key}={seconds}");
        }
        if self.listen_unix.is_none() && self.listen_tcp.is_none() {
            return Ok(None);
        }
        Ok(Some(CheckedNbd {
            listen_unix: self.listen_unix.clone(),
            listen_tcp: self.listen_tcp,
            max_connections: self.max_connections,
            handshake_timeout: Duration::from_secs(self.handshake_seconds),
            stuck_limit: Duration::from_secs(self.stuck_seconds),
        }))
    }

    fn check_vhost(&self) -> anyhow::Result<Option<CheckedVhost>> {
        let Self { vhost_queues: queues, vhost_queue_size_max: size, serial, .. } = self;
        ensure!(
            (1..=QUEUES_MAX).contains(queues),
            "vhost_queues must be 1 to {QUEUES_MAX}: vhost_queues={queues}"
        );
        ensure!(
            (QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(size) && size.is_power_of_two(),
            "vhost_queue_size_max must be a power of two from {QUEUE_SIZE_MIN} to {QUEUE_SIZE_MAX}: \
             vhost_queue_size_max={size}"
        );
        if let Some(threads) = self.vhost_threads {
            ensure!(
                (1..=*queues).contains(&threads),
                "vhost_threads must be 1 to the number of queues: vhost_threads={threads} vhost_queues={queues}"
            );
        }
        ensure!(
            serial.len() <= SERIAL_BYTES && serial.chars().all(|c| c == ' ' || c.is_ascii_graphic()),
            "serial must have at most {SERIAL_BYTES} printable ASCII characters: serial={serial:?}"
        );
        let Some(socket) = self.vhost_socket.clone() else { return Ok(None) };
        let threads = self.vhost_threads.unwrap_or_else(|| default_threads(*queues));
        // A volume's name is ASCII.
        let serial =
            if serial.is_empty() { self.volume.chars().take(SERIAL_BYTES).collect() } else { serial.clone() };
        Ok(Some(CheckedVhost { socket, queues: *queues, queue_size_max: *size, threads, serial }))
    }
}

fn default_threads(queues: u16) -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    queues.min(THREADS_DEFAULT_MAX).min(u16::try_from(cores).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests;
