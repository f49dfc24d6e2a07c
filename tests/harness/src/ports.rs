//! Loopback addresses that nobody listens on.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

/// Ports to choose from: below those that the system gives to outgoing connections (32768 and up), one of which would
/// take the port of a server that is just being restarted.
const PORTS: std::ops::Range<u16> = 12_000..32_000;

/// `count` distinct free addresses. Another process may take one before it is used; the test fails then, loudly.
///
/// # Errors
/// If there are none left.
pub fn free(count: usize) -> std::io::Result<Vec<SocketAddr>> {
    // Processes begin at different places, and a process never comes back to a port that it has given away.
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let width = PORTS.end - PORTS.start;
    let begin = std::process::id().wrapping_mul(97) % u32::from(width);
    let mut held = Vec::new();
    for _ in 0..width {
        if held.len() == count {
            break;
        }
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = PORTS.start + ((begin + u32::from(step)) % u32::from(width)) as u16;
        held.extend(TcpListener::bind((Ipv4Addr::LOCALHOST, port)));
    }
    if held.len() < count {
        return Err(std::io::ErrorKind::AddrNotAvailable.into());
    }
    held.iter().map(TcpListener::local_addr).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_distinct_and_never_given_twice() {
        let (first, second) = (free(20).expect("free"), free(20).expect("free"));
        let mut all = [first, second].concat();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 40);
    }
}
