//! Where clients and front-ends knock: unix sockets and TCP.
//!
//! Bound before this process gives up its privileges, by [`crate::doors`]; opened, which only then lets anybody connect, by
//! whoever serves the export once the gateway has accepted the volume. Must not know: the protocol.

use anyhow::{Context, bail};
use rustix::fs::Stat;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use spline_process::listening;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Owner and group may connect: QEMU runs as a user of its own.
const SOCKET_MODE: u32 = 0o660;
/// Connections that may wait to be accepted; nebd accepts them in bursts of less.
const BACKLOG: i32 = 128;

/// A bound socket. Dropping it removes a unix socket's file.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket and its file.
    Unix(UnixListener, SocketFile),
    /// A TCP socket.
    Tcp(TcpListener),
}

/// The file of a unix socket that this process has bound.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode: the path may have been taken by another process since.
    identity: (u64, u64),
}

impl SocketFile {
    fn is_ours(&self) -> bool {
        rustix::fs::lstat(&self.path).is_ok_and(|found| identity(&found) == self.identity)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_ours()
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "socket stays behind, the next start replaces it");
        }
    }
}

#[allow(clippy::useless_conversion)] // The widths differ between architectures.
fn identity(stat: &Stat) -> (u64, u64) {
    (u64::from(stat.st_dev), u64::from(stat.st_ino))
}

impl Listener {
    /// Binds `path`; nobody can connect before [`open`](Self::open). A socket file that nobody listens on is replaced.
    ///
    /// # Errors
    /// If somebody listens there, the path is something else than a socket, or can not be bound.
    pub fn unix(path: &Path) -> anyhow::Result<Self> {
        if let Ok(metadata) = std::fs::symlink_metadata(path) {
            if !metadata.file_type().is_socket() {
                bail!("listen path is not a socket, choose another: path={}", path.display());
            }
            let taken = listening::is_listened_on(path);
            if taken
                .with_context(|| format!("can not tell whether somebody listens: path={}", path.display()))?
            {
                bail!("another process listens here, stop it or choose another: path={}", path.display());
            }
            std::fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
        }
        let socket = socket(AddressFamily::UNIX)?;
        SocketAddrUnix::new(path)
            .and_then(|address| net::bind(&socket, &address))
            .with_context(|| format!("listen on {}", path.display()))?;
        let found = rustix::fs::lstat(path).with_context(|| format!("look at {}", path.display()))?;
        let file = SocketFile { path: path.to_owned(), identity: identity(&found) };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
        Ok(Self::Unix(socket.into(), file))
    }

    /// Binds `address`; port 0 takes a free one. Nobody can connect before [`open`](Self::open).
    ///
    /// # Errors
    /// If it can not be bound.
    pub fn tcp(address: SocketAddr) -> anyhow::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = socket(family)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        net::bind(&socket, &address).with_context(|| format!("listen on {address}"))?;
        Ok(Self::Tcp(socket.into()))
    }

    /// Lets clients connect.
    ///
    /// # Errors
    /// If another process has taken the path or the port since it was bound.
    pub fn open(&self) -> anyhow::Result<()> {
        if let Self::Unix(_, file) = self
            && !file.is_ours()
        {
            bail!(
                "another process has taken the path, stop it or choose another: path={}",
                file.path.display()
            );
        }
        net::listen(self.socket(), BACKLOG).with_context(|| format!("listen on {}", self.nbd_uri()))
    }

    /// The socket, to be watched.
    pub fn socket(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, _) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }

    /// The file of a unix socket.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(_, file) => Some(&file.path),
            Self::Tcp(_) => None,
        }
    }

    /// How NBD clients name it: `nbd+unix:///?socket=…` or `nbd://…`.
    pub fn nbd_uri(&self) -> String {
        match self {
            Self::Unix(_, file) => format!("nbd+unix:///?socket={}", file.path.display()),
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

fn socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(net::socket_with(family, SocketType::STREAM, flags, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("nbd.sock");
        drop(UnixListener::bind(&path).expect("binds"));
        let first = Listener::unix(&path).expect("replaces the dead socket");
        first.open().expect("opens");
        let refused = Listener::unix(&path).expect_err("somebody listens");
        assert!(refused.to_string().contains("another process listens"), "{refused}");
        drop(first);
        assert!(!path.exists());
        std::fs::write(&path, "precious").expect("writes");
        assert!(Listener::unix(&path).is_err());
        assert!(path.exists(), "a file is never removed");
    }

    #[test]
    fn nobody_enters_before_it_is_open() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("nbd.sock");
        let unix = Listener::unix(&path).expect("binds");
        let tcp = Listener::tcp("127.0.0.1:0".parse().expect("an address")).expect("binds");
        let uri = tcp.nbd_uri();
        let address = uri.strip_prefix("nbd://").expect("a TCP address");
        let refused = UnixStream::connect(&path).expect_err("not open");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert!(TcpStream::connect(address).is_err());
        unix.open().expect("opens");
        tcp.open().expect("opens");
        UnixStream::connect(&path).expect("connects");
        TcpStream::connect(address).expect("connects");
        assert!(unix.accept().expect("accepts").is_some());
        assert!(tcp.accept().expect("accepts").is_some());
        assert!(unix.accept().expect("accepts").is_none());
    }

    #[test]
    fn a_path_that_another_took_is_neither_opened_nor_removed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("nbd.sock");
        let slow = Listener::unix(&path).expect("binds");
        let quick = Listener::unix(&path).expect("nobody listens there");
        let refused = slow.open().expect_err("taken");
        assert!(refused.to_string().contains("taken the path"), "{refused}");
        drop(slow);
        quick.open().expect("opens");
        UnixStream::connect(&path).expect("connects");
    }
}
