//! Starting `spline-nebd` as a process of its own, and waiting until it serves.
//!
//! Called by `export` and by `dev`. Knows: nebd's flags and its [`status`] files. Must not know: links, sessions, the
//! cluster.

pub mod status;

use crate::nbd_client::{NbdAddress, NbdClient, NbdError};
use anyhow::{Context, bail};
use status::Kind;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How often a starting nebd is tried.
const TRY_EVERY: Duration = Duration::from_millis(20);
/// How much of a log is shown when nebd dies at its start.
const LOG_TAIL_LINES: usize = 5;

/// What one nebd process serves, and where.
#[derive(Clone, Debug)]
pub struct NebdSpec {
    /// The volume; also the export's name.
    pub volume: String,
    /// Link socket of the gateway.
    pub gateway: PathBuf,
    /// Who it listens to.
    pub listen: Listen,
    /// Refuse writes.
    pub read_only: bool,
    /// Take the volume from another gateway.
    pub force: bool,
    /// User that the process becomes.
    pub user: Option<String>,
    /// Directory of the status files.
    pub runtime_dir: PathBuf,
    /// Where its log goes.
    pub log: PathBuf,
}

/// Who a nebd listens to.
#[derive(Clone, Debug)]
pub enum Listen {
    /// NBD clients.
    Nbd(NbdAddress),
    /// A virtual machine.
    Vhost(VhostDevice),
}

/// A vhost-user-blk device.
#[derive(Clone, Debug)]
pub struct VhostDevice {
    /// Where QEMU connects.
    pub socket: PathBuf,
    /// Queues that the guest may use.
    pub queues: u16,
    /// Threads that serve them; `None`: as nebd sees fit.
    pub threads: Option<u16>,
    /// Its serial number; `None`: the volume's name.
    pub serial: Option<String>,
}

impl Listen {
    fn flags(&self, command: &mut Command) {
        match self {
            Self::Nbd(NbdAddress::Unix(path)) => _ = command.arg("--listen-unix").arg(path),
            Self::Nbd(NbdAddress::Tcp(address)) => _ = command.arg("--listen-tcp").arg(address.to_string()),
            Self::Vhost(device) => {
                command.arg("--vhost-socket").arg(&device.socket);
                command.arg("--vhost-queues").arg(device.queues.to_string());
                if let Some(threads) = device.threads {
                    command.arg("--vhost-threads").arg(threads.to_string());
                }
                if let Some(serial) = &device.serial {
                    command.arg("--serial").arg(serial);
                }
            }
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nbd(address) => address.fmt(f),
            Self::Vhost(device) => write!(f, "{}", device.socket.display()),
        }
    }
}

impl NebdSpec {
    /// Starts the process, detached from this terminal: a Ctrl-C here is not meant for the guest's disk.
    ///
    /// # Errors
    /// If the binary is not found or can not be started.
    pub fn spawn(&self) -> anyhow::Result<Child> {
        let binary = binary()?;
        let log = File::options().create(true).append(true).open(&self.log);
        let log =
            log.with_context(|| format!("can not write the log of nebd: path={}", self.log.display()))?;
        let mut command = Command::new(&binary);
        command.arg("--volume").arg(&self.volume);
        command.arg("--gateway-socket").arg(&self.gateway);
        self.listen.flags(&mut command);
        if self.read_only {
            command.arg("--read-only");
        }
        if self.force {
            command.arg("--force");
        }
        if let Some(user) = &self.user {
            command.arg("--user").arg(user);
        }
        command.arg("--runtime-dir").arg(&self.runtime_dir);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        command.spawn().with_context(|| format!("can not start nebd: path={}", binary.display()))
    }

    /// Waits until the export serves; gives up when `child` ends or `limit` has passed.
    ///
    /// # Errors
    /// Why it does not serve, with the end of its log.
    pub fn wait_until_serving(&self, child: &mut Child, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = child.try_wait()? {
                bail!("nebd ended at its start: {status} log={}\n{}", self.log.display(), tail(&self.log));
            }
            match self.probe(deadline.saturating_duration_since(Instant::now()).max(TRY_EVERY)) {
                Ok(()) => return Ok(()),
                Err(error) if matches!(error.downcast_ref(), Some(NbdError::Refused { .. })) => {
                    return Err(error);
                }
                Err(error) if Instant::now() >= deadline => {
                    return Err(error.context(format!(
                        "nebd does not serve, does the gateway run? log={}\n{}",
                        self.log.display(),
                        tail(&self.log)
                    )));
                }
                Err(_) => std::thread::sleep(TRY_EVERY),
            }
        }
    }

    /// Whether the export serves. NBD clients may come in any number, so one is tried; a device has room for one guest only, so
    /// its status file is asked.
    ///
    /// # Errors
    /// Why it does not; an [`NbdError`] of an NBD export.
    pub fn probe(&self, timeout: Duration) -> anyhow::Result<()> {
        match &self.listen {
            Listen::Nbd(address) => Ok(NbdClient::connect(address, &self.volume, timeout)?.disconnect()?),
            Listen::Vhost(_) => {
                let mut exports = status::read_all(&self.runtime_dir, Kind::Vhost)?.into_iter();
                let serves = exports.any(|export| export.alive && export.volume == self.volume);
                anyhow::ensure!(serves, "no status file of a living process: volume={}", self.volume);
                Ok(())
            }
        }
    }

    /// Where it is found: an NBD URI, or the path of a socket.
    pub fn place(&self) -> String {
        match &self.listen {
            Listen::Nbd(address) => address.uri(&self.volume),
            Listen::Vhost(_) => self.listen.to_string(),
        }
    }
}

/// `spline-nebd` beside this binary, else in `PATH`.
fn binary() -> anyhow::Result<PathBuf> {
    const NAME: &str = "spline-nebd";
    let own = std::env::current_exe().context("can not tell where this program lies")?;
    let beside = own.with_file_name(NAME);
    if beside.is_file() {
        return Ok(beside);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).map(|dir| dir.join(NAME)).find(|file| file.is_file()) {
        Some(found) => Ok(found),
        None => bail!("{NAME} is neither beside this program nor in PATH: looked={}", beside.display()),
    }
}

/// The name of a volume as a file name: no slashes.
pub fn file_name(volume: &str) -> String {
    volume.trim_start_matches("file:").trim_matches('/').replace('/', "+")
}

fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

/// Whether a process of this id lives.
pub fn is_alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// Asks a process to end (SIGTERM), and ends it (SIGKILL) if it has not after `limit`.
///
/// # Errors
/// If the process may not be signalled.
pub fn stop(pid: u32, limit: Duration, mut ended: impl FnMut() -> bool) -> io::Result<()> {
    let Some(target) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let deadline = Instant::now() + limit;
    rustix::process::kill_process(target, rustix::process::Signal::TERM)?;
    while !ended() {
        if Instant::now() >= deadline {
            rustix::process::kill_process(target, rustix::process::Signal::KILL)?;
            return Ok(());
        }
        std::thread::sleep(TRY_EVERY);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_become_file_names() {
        assert_eq!(file_name("vm/web-1/root"), "vm+web-1+root");
        assert_eq!(file_name("file:/srv/a.img"), "srv+a.img");
    }

    #[test]
    fn life_is_told_from_death() {
        assert!(is_alive(std::process::id()));
        let mut child = Command::new("true").spawn().expect("starts");
        child.wait().expect("ends");
        assert!(!is_alive(child.id()));
    }
}
