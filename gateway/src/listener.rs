//! The unix socket on which links are accepted.
//!
//! Called by the gateway. Knows: whether systemd listens for it, whether another gateway holds the socket, who may connect
//! (owner and group). Must not know: what is said on a link. Invariant: `bounded` (links are limited).

use crate::link::{self, Links};
use anyhow::Context;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use spline_process::{activation, listening};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// Most links at once: several per guest, several hundred guests.
const LINKS_MAX: usize = 4096;
/// Owner and group may connect: whoever can connect can read and write every volume.
const SOCKET_MODE: u32 = 0o660;
/// Pause after a failed accept: most likely there is no descriptor left, which passes when a link ends.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that listens. Removes its file when dropped, unless systemd owns it.
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// systemd made the socket, and keeps it when this gateway ends: nebds wait in its backlog for the next one.
    is_systemds: bool,
    /// Held for as long as the socket is ours; released by the kernel however the process ends.
    lock: OwnedFd,
}

/// A listening socket on its way to the next process of the gateway.
pub(crate) struct PassedListener {
    pub(crate) socket: OwnedFd,
    /// The open file of the lock, which is held by whoever has it.
    pub(crate) lock: OwnedFd,
    pub(crate) is_systemds: bool,
}

impl Listener {
    /// What another process needs to listen on; this one goes on as well.
    pub(crate) fn pass(&self) -> io::Result<PassedListener> {
        let (socket, lock) = (self.listener.as_fd().try_clone_to_owned()?, self.lock.try_clone()?);
        Ok(PassedListener { socket, lock, is_systemds: self.is_systemds })
    }

    /// Listens on what another process has listened on.
    pub(crate) fn adopt(path: &Path, passed: PassedListener) -> io::Result<Self> {
        let PassedListener { socket, lock, is_systemds } = passed;
        if !rustix::net::sockopt::socket_acceptconn(&socket)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "socket does not listen"));
        }
        let listener = std::os::unix::net::UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, path: path.to_owned(), is_systemds, lock })
    }

    /// Takes the socket that systemd listens on for this process, or binds it. A file that a dead gateway left is replaced; one
    /// on which somebody listens is not touched.
    pub(crate) fn bind(path: &Path) -> anyhow::Result<Self> {
        let lock = hold(path)?;
        let (listener, is_systemds) = match activation::take_unix_listener(path)? {
            Some(listener) => {
                info!(path = %path.display(), "systemd's socket is taken");
                listener.set_nonblocking(true)?;
                (UnixListener::from_std(listener)?, true)
            }
            None => (bind_anew(path)?, false),
        };
        Ok(Self { listener, path: path.to_owned(), is_systemds, lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts links until `leaving`; each runs as a task of `tasks`. From `passed` on they are another process's, and so is the
    /// socket's file.
    pub(crate) async fn run(
        self,
        links: Arc<Links>,
        tasks: TaskTracker,
        leaving: CancellationToken,
        passed: CancellationToken,
    ) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = passed.cancelled() => return std::mem::forget(self),
                () = leaving.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok(_) if tasks.len() >= LINKS_MAX => {
                    warn!(limit = LINKS_MAX, "too many links, a new one is cut");
                }
                Ok((stream, _)) => drop(tasks.spawn(link::serve(stream, Arc::clone(&links)))),
                Err(error) => {
                    warn!(%error, "can not accept a link");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if !self.is_systemds {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Makes the socket's file, in place of what a dead gateway left. The lock must be held.
fn bind_anew(path: &Path) -> anyhow::Result<UnixListener> {
    let shown = path.display();
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            // Its lock is free, so no gateway accepts there: systemd does, before it starts one.
            let taken = listening::is_listened_on(path);
            if taken.with_context(|| format!("can not tell whether somebody listens: link_socket={shown}"))? {
                anyhow::bail!(
                    "somebody listens here already; if that is systemd, start the gateway by systemctl start spline-gateway, \
                     or stop spline-gateway.socket first: link_socket={shown}"
                );
            }
            info!(path = %shown, "socket of a gateway that has ended is replaced");
            std::fs::remove_file(path).with_context(|| format!("can not remove a socket: path={shown}"))?;
        }
        Ok(_) => anyhow::bail!("something that is not a socket is in the way: link_socket={shown}"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("can not look at path={shown}")),
    }
    // Bound under another name first: nobody connects before the mode is set.
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh)
        .with_context(|| format!("can not listen; does the directory exist: link_socket={shown}"))?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    std::fs::rename(&fresh, path)?;
    Ok(listener)
}

/// Takes the lock beside the socket: two gateways that start at once do not remove each other's socket.
fn hold(path: &Path) -> anyhow::Result<OwnedFd> {
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    let lock_path = PathBuf::from(lock_path);
    let shown = lock_path.display();
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let lock = open(&lock_path, flags, Mode::RUSR | Mode::WUSR)
        .with_context(|| format!("can not open the lock of the socket: path={shown}"))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).with_context(|| {
        format!("another gateway runs with link_socket={}; stop it or use another socket", path.display())
    })?;
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_is_passed_on_stays() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("gateway.sock");
        let old = Listener::bind(&path).expect("binds");
        let new = Listener::adopt(&path, old.pass().expect("passes")).expect("adopts");
        std::mem::forget(old);
        std::os::unix::net::UnixStream::connect(&path).expect("somebody listens");
        new.listener.accept().await.expect("the new one accepts");
        assert!(Listener::bind(&path).is_err(), "the lock went over too");
        drop(new);
        assert!(!path.exists());
        let (socket, lock) = std::os::unix::net::UnixStream::pair().expect("opens");
        let passed = PassedListener { socket: socket.into(), lock: lock.into(), is_systemds: false };
        assert!(Listener::adopt(&path, passed).is_err(), "this one does not listen");
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("gateway.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("binds"));
        let listener = Listener::bind(&path).expect("replaces the stale one");
        assert_eq!(std::fs::metadata(&path).expect("exists").permissions().mode() & 0o777, SOCKET_MODE);
        let refused = Listener::bind(&path).err().expect("one is enough");
        assert!(refused.to_string().contains("another gateway runs"), "{refused}");
        std::os::unix::net::UnixStream::connect(&path).expect("the first still listens");
        drop(listener);
        assert!(!path.exists());
        // systemd, which starts a gateway when somebody connects.
        let systemds = std::os::unix::net::UnixListener::bind(&path).expect("binds");
        let refused = Listener::bind(&path).err().expect("is not taken away").to_string();
        assert!(refused.contains("systemctl") && refused.contains("link_socket="), "{refused}");
        std::os::unix::net::UnixStream::connect(&path).expect("has its name still");
        drop(systemds);
        std::fs::remove_file(&path).expect("removes");
        std::fs::write(&path, "precious").expect("writes");
        assert!(Listener::bind(&path).is_err(), "a file is not a stale socket");
        assert_eq!(std::fs::read_to_string(&path).expect("reads"), "precious");
    }
}
