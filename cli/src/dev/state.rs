//! The directory of `spline dev`: its lock, its paths, and the ports that it remembers.
//!
//! Called by `dev`. Invariant: one process per directory, by a lock that dies with the process.

use anyhow::{Context, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

/// Chunkservers of the cluster to try, each in a zone of its own.
pub const CHUNKSERVERS: usize = 3;
/// Longest path of a unix socket, bytes (`sun_path` less its final zero).
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Format of the state file. 1: addresses and the last check.
const STATE_VERSION: u32 = 1;
const STATE_FILE: &str = "state.json";

/// What is remembered from start to start.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// See [`STATE_VERSION`].
    pub version: u32,
    /// Where the metadata server listens.
    pub mds: SocketAddr,
    /// Where the chunkservers listen.
    pub chunkservers: [SocketAddr; CHUNKSERVERS],
    /// Where the gateway's administration listens.
    pub gateway: SocketAddr,
    /// Where the metrics of all parts are served: metadata server, chunkservers, gateway.
    pub metrics: [SocketAddr; CHUNKSERVERS + 2],
    /// Seed of what the last check left on its volume, for the next one to find.
    pub checked: Option<u64>,
}

/// The locked directory.
#[derive(Debug)]
pub struct DevDir {
    root: PathBuf,
    state: State,
    _lock: File,
}

impl DevDir {
    /// Opens, or makes, the directory; with `fresh`, empties it first.
    ///
    /// # Errors
    /// If another process runs in it, if it is not a directory of `spline dev`, or was left by a newer version.
    pub fn open(root: &Path, fresh: bool) -> anyhow::Result<Self> {
        let shown = root.display();
        std::fs::create_dir_all(root).with_context(|| format!("can not make the directory: dir={shown}"))?;
        let root = root.canonicalize()?;
        let is_ours = root.join(STATE_FILE).is_file();
        let is_empty = std::fs::read_dir(&root)?.flatten().all(|entry| entry.file_name() == "lock");
        ensure!(
            is_ours || is_empty,
            "directory holds something else, choose another with --dir: dir={shown}"
        );
        let lock = File::create(root.join("lock"))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!(
                "another spline dev runs in this directory, stop it or choose another with --dir: dir={shown}"
            );
        }
        if fresh {
            empty(&root)?;
        }
        let state = match std::fs::read_to_string(root.join(STATE_FILE)) {
            Ok(text) => State::parse(&text).with_context(|| format!("state file is refused: dir={shown}"))?,
            Err(_) => State::choose()?,
        };
        let mut dir = Self { root, state, _lock: lock };
        dir.state.move_taken_ports()?;
        dir.save()?;
        std::fs::create_dir_all(dir.runtime_dir())?;
        Ok(dir)
    }

    /// What is remembered.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Remembers what a check has left behind.
    ///
    /// # Errors
    /// If the state file can not be written.
    pub fn remember_check(&self, seed: u64) -> anyhow::Result<()> {
        write_state(&self.root, &State { checked: Some(seed), ..self.state.clone() })
    }

    fn save(&self) -> anyhow::Result<()> {
        write_state(&self.root, &self.state)
    }

    /// The directory itself, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Data of one part; made if need be.
    ///
    /// # Errors
    /// If it can not be made.
    pub fn data(&self, part: &str) -> anyhow::Result<PathBuf> {
        let path = self.root.join(part);
        std::fs::create_dir_all(&path)
            .with_context(|| format!("can not make the directory: dir={}", path.display()))?;
        Ok(path)
    }

    /// Link socket of the gateway.
    pub fn gateway_socket(&self) -> PathBuf {
        self.root.join("gateway.sock")
    }

    /// Socket of an export.
    ///
    /// # Errors
    /// If the directory's path is too long for a unix socket.
    pub fn export_socket(&self, export: &str) -> anyhow::Result<PathBuf> {
        let path = self.root.join(format!("{export}.sock"));
        let length = path.as_os_str().len();
        ensure!(
            length <= SOCKET_PATH_BYTES_MAX,
            "path is too long for a unix socket, choose a shorter --dir: path={} bytes={length} limit={SOCKET_PATH_BYTES_MAX}",
            path.display()
        );
        Ok(path)
    }

    /// Directory of nebd's status files.
    pub fn runtime_dir(&self) -> PathBuf {
        self.root.join("run")
    }

    /// Log of this process.
    pub fn log(&self) -> PathBuf {
        self.root.join("dev.log")
    }

    /// Log of an export's nebd.
    pub fn nebd_log(&self, export: &str) -> PathBuf {
        self.root.join(format!("nebd-{export}.log"))
    }
}

impl State {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let value: serde_json::Value = serde_json::from_str(text)?;
        let version = value.get("version").and_then(serde_json::Value::as_u64);
        ensure!(
            version == Some(u64::from(STATE_VERSION)),
            "unknown version, use --fresh to start anew: version={version:?} known={STATE_VERSION}"
        );
        Ok(serde_json::from_value(value)?)
    }

    fn choose() -> anyhow::Result<Self> {
        let mut free = free_addresses(2 * CHUNKSERVERS + 4)?.into_iter();
        let mut next = || free.next().context("too few free ports");
        Ok(Self {
            version: STATE_VERSION,
            mds: next()?,
            chunkservers: [next()?, next()?, next()?],
            gateway: next()?,
            metrics: [next()?, next()?, next()?, next()?, next()?],
            checked: None,
        })
    }

    /// Gives new ports to those that something else has taken meanwhile.
    fn move_taken_ports(&mut self) -> anyhow::Result<()> {
        let all = [&mut self.mds, &mut self.gateway].into_iter();
        for address in all.chain(&mut self.chunkservers).chain(&mut self.metrics) {
            if TcpListener::bind(*address).is_err() {
                *address = free_addresses(1)?[0];
            }
        }
        Ok(())
    }
}

/// Loopback addresses that nobody listens on now, all distinct.
fn free_addresses(count: usize) -> std::io::Result<Vec<SocketAddr>> {
    let held: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
    held.iter().map(TcpListener::local_addr).collect()
}

fn write_state(root: &Path, state: &State) -> anyhow::Result<()> {
    let partial = root.join("state.json.new");
    std::fs::write(&partial, serde_json::to_string_pretty(state)?)?;
    Ok(std::fs::rename(partial, root.join(STATE_FILE))?)
}

fn empty(root: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_name() == "lock" {
            continue;
        }
        match entry.file_type()?.is_dir() {
            true => std::fs::remove_dir_all(entry.path())?,
            false => std::fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_remembered_and_the_directory_is_locked() {
        let temporary = tempfile::tempdir().expect("temporary directory");
        let root = temporary.path().join("dev");
        let first = DevDir::open(&root, false).expect("opens");
        assert!(
            format!("{:#}", DevDir::open(&root, false).expect_err("locked")).contains("another spline dev")
        );
        first.remember_check(7).expect("writes");
        let state = first.state().clone();
        drop(first);
        let second = DevDir::open(&root, false).expect("opens");
        assert_eq!(second.state().mds, state.mds);
        assert_eq!(second.state().checked, Some(7));
        drop(second);
        assert_eq!(DevDir::open(&root, true).expect("opens").state().checked, None);
    }

    #[test]
    fn a_taken_port_is_replaced() {
        let mut state = State::choose().expect("chooses");
        let taken = TcpListener::bind(state.mds).expect("takes");
        state.move_taken_ports().expect("moves");
        assert_ne!(state.mds, taken.local_addr().expect("address"));
    }

    #[test]
    fn foreign_directories_and_versions_are_refused() {
        let temporary = tempfile::tempdir().expect("temporary directory");
        std::fs::write(temporary.path().join("thesis.tex"), "precious").expect("writes");
        assert!(DevDir::open(temporary.path(), true).is_err());
        assert!(temporary.path().join("thesis.tex").is_file());
        let error = State::parse(r#"{"version": 2}"#).expect_err("refused");
        assert!(format!("{error:#}").contains("version=Some(2)"), "{error:#}");
    }
}
