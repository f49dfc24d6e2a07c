//! qemu-storage-daemon's vhost-user-blk export of a file: proves what is asked of ours, and is measured beside it.

use crate::process::Process;
use crate::{Tool, vhost, wait_until};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// How the daemon serves a file.
#[derive(Clone, Copy, Debug)]
pub struct Serving {
    /// Refuse writes.
    pub read_only: bool,
    /// Virtqueues.
    pub queues: u16,
}

/// A running daemon with one export. Dropping it kills it.
#[derive(Debug)]
pub struct StorageDaemon {
    /// The process.
    pub process: Process,
    /// Where the guest's front-end connects.
    pub socket: PathBuf,
}

impl StorageDaemon {
    /// Starts one in `dir` that serves `file` past the page cache, by io_uring, in a thread of its own, and waits until it
    /// listens. It takes no lock on the file, so that others may serve it too while nobody uses this one.
    ///
    /// # Errors
    /// If it is not installed, or does not start.
    pub fn start(dir: &Path, name: &str, file: &Path, serving: Serving) -> anyhow::Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let read_only = if serving.read_only { "on" } else { "off" };
        let writable = if serving.read_only { "off" } else { "on" };
        let arguments = [
            "--blockdev".into(),
            format!(
                "driver=file,node-name=disk,filename={},cache.direct=on,aio=io_uring,discard=unmap,locking=off,read-only={read_only}",
                file.display()
            ),
            "--object".into(),
            "iothread,id=thread".into(),
            "--export".into(),
            format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable={writable},num-queues={},iothread=thread",
                socket.display(),
                serving.queues
            ),
        ];
        let binary =
            PathBuf::from(Tool::new("sh").args(["-c", "command -v qemu-storage-daemon"]).run()?.trim());
        let mut process = Process::new(name, binary, arguments.map(OsString::from).to_vec(), dir);
        process.start()?;
        let mut daemon = Self { process, socket };
        daemon.wait_until_listening()?;
        Ok(daemon)
    }

    /// Kills it, starts it again, and waits until it listens.
    ///
    /// # Errors
    /// If it does not start.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.process.kill9()?;
        // It does not take a socket over that another has left.
        let _ = std::fs::remove_file(&self.socket);
        self.process.start()?;
        self.wait_until_listening()
    }

    fn wait_until_listening(&mut self) -> anyhow::Result<()> {
        let (process, socket) = (&mut self.process, &self.socket);
        wait_until("qemu-storage-daemon to listen", vhost::START_LIMIT, || {
            process.assert_running()?;
            vhost::answers(socket).map(Some)
        })
    }
}
