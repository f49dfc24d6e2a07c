//! Whether somebody listens on a unix socket: asked before its file is replaced.
//!
//! Called by whoever binds a socket where one may have been left behind. Must not know: what is said on it.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::io;
use std::path::Path;

/// Whether the socket at `path` is somebody's: a process accepts connections there, or systemd does for one that is to be
/// started. Never waits, however many wait to be accepted. Whoever listens sees a connection that says nothing.
///
/// # Errors
/// If it can not be told, because this user may not connect, say.
pub fn is_listened_on(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        // Its queue is full; or it is a socket of another kind.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    #[test]
    fn a_socket_is_somebodys_while_it_is_open() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.sock");
        assert!(!is_listened_on(&path).expect("tells"), "nothing is there");
        let listener = UnixListener::bind(&path).expect("binds");
        assert!(is_listened_on(&path).expect("tells"));
        // Nobody accepts: at some time the queue is full.
        rustix::net::listen(&listener, 1).expect("shortens the queue");
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let mut waiting = Vec::new();
        loop {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket");
            match connect(&socket, &SocketAddrUnix::new(&path).expect("a path")) {
                Ok(()) => waiting.push(socket),
                Err(full) => break assert_eq!(full, Errno::AGAIN),
            }
        }
        assert!(is_listened_on(&path).expect("tells"), "the queue is full");
        drop((listener, waiting));
        assert!(!is_listened_on(&path).expect("tells"), "left behind");
        std::fs::remove_file(&path).expect("removes");
        let _datagrams = UnixDatagram::bind(&path).expect("binds");
        assert!(is_listened_on(&path).expect("tells"), "of another kind");
    }
}
