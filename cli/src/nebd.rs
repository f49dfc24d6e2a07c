//! Starting `spline-nebd` as a process of its own, and waiting until it serves.
//!
//! Called by `nbd export` and by `dev`. Knows: nebd's flags. Must not know: links, sessions, the cluster.

use crate::nbd_client::{NbdAddress, NbdClient, NbdError};
use anyhow::{Context, bail};
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
    /// Where NBD clients connect.
    pub listen: NbdAddress,
    /// Refuse writes.
    pub read_only: bool,
    /// Take the volume from another gateway.
    pub force: bool,
    /// Directory of the status files.
    pub runtime_dir: PathBuf,
    /// Where its log goes.
    pub log: PathBuf,
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
        match &self.listen {
            NbdAddress::Unix(path) => command.arg("--listen-unix").arg(path),
            NbdAddress::Tcp(address) => command.arg("--listen-tcp").arg(address.to_string()),
        };
        if self.read_only {
            command.arg("--read-only");
        }
        if self.force {
            command.arg("--force");
        }
        command.arg("--runtime-dir").arg(&self.runtime_dir);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        command.spawn().with_context(|| format!("can not start nebd: path={}", binary.display()))
    }

    /// Waits until the export answers a handshake; gives up when `child` ends or `limit` has passed.
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
                Err(error @ NbdError::Refused { .. }) => return Err(error.into()),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).with_context(|| {
                        format!(
                            "nebd does not serve, does the gateway run? log={}\n{}",
                            self.log.display(),
                            tail(&self.log)
                        )
                    });
                }
                Err(_) => std::thread::sleep(TRY_EVERY),
            }
        }
    }

    /// Enters the export once.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn probe(&self, timeout: Duration) -> Result<(), NbdError> {
        NbdClient::connect(&self.listen, &self.volume, timeout)?.disconnect()
    }

    /// The NBD URI of the export.
    pub fn uri(&self) -> String {
        self.listen.uri(&self.volume)
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
