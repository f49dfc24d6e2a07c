//! Sockets that systemd listens on for this process: a `.socket` unit beside its `.service`.
//!
//! Called by whoever would bind the socket otherwise. The socket and its file are systemd's: they were there before this
//! process and stay when it ends, so that clients wait in the backlog meanwhile. Must not know: what is said on a socket.

#![allow(unsafe_code)]

use rustix::net::{AddressFamily, SocketAddrUnix, getsockname, sockopt};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Mutex;

/// What systemd has passed and nobody has taken yet; `None` until the first question.
static PASSED: Mutex<Option<Vec<OwnedFd>>> = Mutex::new(None);

/// The unix socket at `path` that systemd listens on for this process (sd_listen_fds(3)), once: who asks again gets none.
/// None also if systemd has passed nothing.
///
/// # Errors
/// If what systemd says can not be understood, or it has passed sockets, but none that listens at `path`.
pub fn take_unix_listener(path: &Path) -> io::Result<Option<UnixListener>> {
    let mut passed = PASSED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if passed.is_none() {
        *passed = Some(passed_by_systemd()?);
    }
    let Some(sockets) = passed.as_mut().filter(|sockets| !sockets.is_empty()) else { return Ok(None) };
    match sockets.iter().position(|socket| listens_at(socket, path)) {
        Some(at) => Ok(Some(UnixListener::from(sockets.swap_remove(at)))),
        None => {
            let message = format!(
                "systemd listens elsewhere, let ListenStream= of the .socket unit name the same path: path={}",
                path.display()
            );
            Err(io::Error::new(io::ErrorKind::InvalidInput, message))
        }
    }
}

fn passed_by_systemd() -> io::Result<Vec<OwnedFd>> {
    let numbers = sd_notify::listen_fds()?;
    // SAFETY: systemd opened these descriptors for this process (LISTEN_PID is checked, and that they are open, by setting
    // close-on-exec on each), and nobody else takes them: this runs once, under the lock of `PASSED`.
    Ok(numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect())
}

fn listens_at(socket: &OwnedFd, path: &Path) -> bool {
    let is_unix = sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX);
    let listens = sockopt::socket_acceptconn(socket) == Ok(true);
    let address = getsockname(socket).ok().and_then(|address| SocketAddrUnix::try_from(address).ok());
    is_unix
        && listens
        && address.is_some_and(|address| address.path_bytes() == Some(path.as_os_str().as_encoded_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_is_known_by_its_address() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.sock");
        let listener = OwnedFd::from(UnixListener::bind(&path).expect("binds"));
        assert!(listens_at(&listener, &path));
        assert!(!listens_at(&listener, &dir.path().join("y.sock")));
        let (one, _other) = UnixStream::pair().expect("pair");
        assert!(!listens_at(&one.into(), &path), "it does not listen");
        let file = std::fs::File::open(dir.path()).expect("opens");
        assert!(!listens_at(&file.into(), &path), "it is no socket");
    }

    #[test]
    fn without_systemd_there_is_none() {
        assert!(take_unix_listener(Path::new("/run/none.sock")).expect("nothing to misunderstand").is_none());
    }
}
