//! TCP proxies between processes under test, which can hold back what was sent: a message that is stuck in the network.
//!
//! Called by tests through [`crate::cluster`]. Must not know: what the bytes mean. A test names bytes of its own; the first
//! connection on which they pass is held from there on, in that direction only, until the test lets it go. Every other
//! connection flows, so a sender that tries again by another one gets through.

use crate::wait_until;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes passed on at once.
const PIECE_BYTES: usize = 64 << 10;

/// What all proxies of a cluster hold back: at most one connection.
#[derive(Debug, Default)]
pub struct Hold {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    /// Everything flows.
    #[default]
    Idle,
    /// The first connection on which these bytes pass will be held.
    Armed(Vec<u8>),
    /// One connection is held.
    Held,
}

impl Hold {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the first connection on which `bytes` are sent to a server is held, these bytes included.
    pub fn arm(&self, bytes: &[u8]) {
        *self.state() = State::Armed(bytes.to_vec());
    }

    /// Waits until a connection is held.
    ///
    /// # Errors
    /// If none is within `limit`.
    pub fn wait_until_held(&self, limit: Duration) -> anyhow::Result<()> {
        wait_until("the bytes to be held back", limit, || Ok((*self.state() == State::Held).then_some(())))
    }

    /// Lets what was held back go on its way.
    pub fn release(&self) {
        *self.state() = State::Idle;
        self.changed.notify_all();
    }

    /// Called with what is about to be passed on; returns when it may be.
    fn pass(&self, recent: &[u8]) {
        let mut state = self.state();
        match &*state {
            State::Armed(bytes) if contains(recent, bytes) => *state = State::Held,
            _ => return,
        }
        self.changed.notify_all();
        while *state == State::Held {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn tail_bytes(&self) -> usize {
        match &*self.state() {
            State::Armed(bytes) => bytes.len(),
            State::Idle | State::Held => 0,
        }
    }
}

fn contains(whole: &[u8], part: &[u8]) -> bool {
    !part.is_empty() && whole.windows(part.len()).any(|window| window == part)
}

/// Starts a proxy on `listener` that connects to `target`. It lives as long as the test process.
///
/// # Errors
/// If no thread can be started.
pub fn start(listener: TcpListener, target: SocketAddr, hold: Arc<Hold>) -> std::io::Result<()> {
    let accept = move || {
        for client in listener.incoming().flatten() {
            // A server that is down refuses: so does its proxy.
            let Ok(server) = TcpStream::connect(target) else { continue };
            let ways = (client.try_clone(), server.try_clone());
            let (Ok(from_client), Ok(from_server)) = ways else { continue };
            let hold = Arc::clone(&hold);
            std::thread::spawn(move || pump(from_client, server, Some(&hold)));
            std::thread::spawn(move || pump(from_server, client, None));
        }
    };
    std::thread::Builder::new().name("proxy".into()).spawn(accept).map(drop)
}

/// Passes bytes on in one direction until either side ends, and tells both.
fn pump(mut from: TcpStream, mut to: TcpStream, hold: Option<&Hold>) {
    let _ = (from.set_nodelay(true), to.set_nodelay(true));
    let mut piece = vec![0; PIECE_BYTES];
    // The end of what was passed on: the bytes looked for may come in two pieces.
    let mut recent = Vec::new();
    while let Ok(count @ 1..) = from.read(&mut piece) {
        if let Some(hold) = hold {
            recent.extend_from_slice(&piece[..count]);
            hold.pass(&recent);
            let keep = hold.tail_bytes().min(recent.len());
            recent.drain(..recent.len() - keep);
        }
        if to.write_all(&piece[..count]).is_err() {
            break;
        }
    }
    let _ = (to.shutdown(Shutdown::Write), from.shutdown(Shutdown::Read));
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn only_the_connection_with_the_named_bytes_is_held() {
        let server = TcpListener::bind("127.0.0.1:0").expect("binds");
        let (proxy, hold) = (TcpListener::bind("127.0.0.1:0").expect("binds"), Arc::new(Hold::default()));
        let at = proxy.local_addr().expect("bound");
        start(proxy, server.local_addr().expect("bound"), Arc::clone(&hold)).expect("starts");
        let connect = || {
            let client = TcpStream::connect(at).expect("connects");
            let (server, _) = server.accept().expect("accepts");
            (client, server)
        };
        let ((mut first, mut at_first), (mut second, mut at_second)) = (connect(), connect());
        hold.arm(b"needle");
        first.write_all(b"hay need").expect("sends");
        let mut got = [0; 8];
        at_first.read_exact(&mut got).expect("flows");
        first.write_all(b"le late").expect("sends");
        hold.wait_until_held(LIMIT).expect("is held");
        // The sender gives up; what it sent is still on its way.
        drop(first);
        second.write_all(b"needle").expect("sends");
        let mut got = [0; 6];
        at_second.read_exact(&mut got).expect("flows");
        hold.release();
        let mut rest = Vec::new();
        at_first.read_to_end(&mut rest).expect("arrives after all");
        assert_eq!(rest, b"le late");
    }
}
