//! Where clients knock: unix sockets and TCP.
//!
//! Called by the event loop. Must not know: the protocol.

use anyhow::{Context, bail};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Owner and group may connect: QEMU runs as a user of its own.
const SOCKET_MODE: u32 = 0o660;

/// A listening socket. Dropping it removes a unix socket's file.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket and its path.
    Unix(UnixListener, PathBuf),
    /// A TCP socket.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at `path`. A socket file that nobody listens on is replaced.
    ///
    /// # Errors
    /// If somebody listens there, the path is something else than a socket, or can not be bound.
    pub fn unix(path: &Path) -> anyhow::Result<Self> {
        if let Ok(metadata) = std::fs::symlink_metadata(path) {
            if !metadata.file_type().is_socket() {
                bail!("listen path is not a socket, choose another: path={}", path.display());
            }
            if UnixStream::connect(path).is_ok() {
                bail!("another process listens here, stop it or choose another: path={}", path.display());
            }
            std::fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
        }
        let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
        listener.set_nonblocking(true)?;
        Ok(Self::Unix(listener, path.to_owned()))
    }

    /// Listens at `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// If it can not be bound.
    pub fn tcp(address: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
        listener.set_nonblocking(true)?;
        Ok(Self::Tcp(listener))
    }

    /// The socket, to be watched.
    pub fn socket(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, _) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }

    /// How clients name it: `nbd+unix:///?socket=…` or `nbd://…`.
    pub fn uri(&self) -> String {
        match self {
            Self::Unix(_, path) => format!("nbd+unix:///?socket={}", path.display()),
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("nbd://{address}"),
                Err(_) => "nbd://".to_owned(),
            },
        }
    }

    /// Takes one client, its socket non-blocking; `None` if nobody waits.
    ///
    /// # Errors
    /// Those of accept, such as no descriptor left.
    pub fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let accepted = match self {
            Self::Unix(listener, _) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(OwnedFd::from(stream))
            }),
            Self::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                Ok(OwnedFd::from(stream))
            }),
        };
        match accepted {
            Ok(socket) => Ok(Some(socket)),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            },
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("nbd.sock");
        drop(UnixListener::bind(&path).expect("binds"));
        let first = Listener::unix(&path).expect("replaces the dead socket");
        let refused = Listener::unix(&path).expect_err("somebody listens");
        assert!(refused.to_string().contains("another process listens"), "{refused}");
        drop(first);
        assert!(!path.exists());
        std::fs::write(&path, "precious").expect("writes");
        assert!(Listener::unix(&path).is_err());
        assert!(path.exists(), "a file is never removed");
    }
}
