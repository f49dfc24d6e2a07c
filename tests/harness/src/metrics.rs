//! Reads the metrics page of a process.

use anyhow::{Context, ensure};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest wait for a page: a process that is stopped never answers.
const LIMIT: Duration = Duration::from_secs(10);

/// The page, as text.
///
/// # Errors
/// If nobody answers.
pub fn page(address: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    ensure!(text.starts_with("HTTP/1.1 200"), "no metrics: {text}");
    Ok(text)
}

/// Sum of all values whose name, with its labels, begins with `name`.
///
/// # Errors
/// If nobody answers, or a value is not a number.
pub fn sum(address: SocketAddr, name: &str) -> anyhow::Result<f64> {
    let page = page(address)?;
    let values = page.lines().filter(|line| line.starts_with(name)).map(|line| {
        let value = line.rsplit(' ').next().unwrap_or_default();
        value.parse::<f64>().with_context(|| format!("not a metric: {line}"))
    });
    values.sum()
}
