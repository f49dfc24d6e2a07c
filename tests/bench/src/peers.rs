//! The servers that Spline is measured against, each on a unix socket: `nbdkit file`, `qemu-nbd`, and its own parts without a link.

use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running server process; killed when dropped.
pub struct Peer {
    child: Child,
    socket: PathBuf,
    uri: String,
}

impl Peer {
    /// nbdkit's file plugin on `file`: it serves from the page cache.
    ///
    /// # Errors
    /// nbdkit missing, or not listening within ten seconds.
    pub fn nbdkit_file(file: &Path, socket: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(socket).arg("file").arg(file);
        Self::start(command, socket)
    }

    /// qemu-nbd with direct IO and io_uring on `file`.
    ///
    /// # Errors
    /// qemu-nbd missing, or not listening within ten seconds.
    pub fn qemu_nbd(file: &Path, socket: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new("qemu-nbd");
        command
            .args(["--cache=none", "--aio=io_uring", "-f", "raw", "-t", "-e", "8", "-k"])
            .arg(socket)
            .arg(file);
        Self::start(command, socket)
    }

    fn start(mut command: Command, socket: &Path) -> anyhow::Result<Self> {
        let _ = std::fs::remove_file(socket);
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("cannot start {name}"))?;
        let peer = Self {
            child,
            socket: socket.to_owned(),
            uri: format!("nbd+unix:///?socket={}", socket.display()),
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(&peer.socket).is_err() {
            if Instant::now() > deadline {
                bail!("{name} does not listen: socket={}", peer.socket.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(peer)
    }

    /// The socket it listens on; its export has the empty name.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The NBD uri of its export.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Its process id, for the CPU account.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

/// Our own device, or our NBD server with `nbd`, and engine in one process, on `file`; its files lie in `dir`.
///
/// # Errors
/// The binary missing, or not listening within ten seconds.
pub fn direct(dir: &Path, file: &Path, nbd: bool) -> anyhow::Result<Peer> {
    let binary = std::env::current_exe()?.with_file_name("spline-bench-direct");
    let socket = dir.join(if nbd { "direct-nbd.sock" } else { "direct.sock" });
    let mut command = Command::new(binary);
    command.args(nbd.then_some("--nbd"));
    command
        .arg("--file")
        .arg(file)
        .arg("--socket")
        .arg(&socket)
        .arg("--runtime-dir")
        .arg(dir.join("run-direct"));
    Peer::start(command, &socket)
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}
