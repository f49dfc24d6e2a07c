//! Loopback addresses that nobody listens on.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

/// `count` distinct free addresses. Another process may take one before it is used; the test fails then, loudly.
///
/// # Errors
/// If the system has none left.
pub fn free(count: usize) -> std::io::Result<Vec<SocketAddr>> {
    let held: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
    held.iter().map(TcpListener::local_addr).collect()
}
