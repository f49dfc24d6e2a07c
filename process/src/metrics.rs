//! The metrics endpoint: `GET /metrics` answers OpenMetrics text. One thread, one connection at a time.
//!
//! Called by each `main.rs` with the registry that its parts have filled. Must not know any metric.
//! Invariants: `bounded` (a request head, its time and its answer's time are limited), and a scraper that hangs
//! delays only other scrapers.

pub mod http;

use prometheus_client::metrics::histogram::{Histogram, exponential_buckets_range};
use prometheus_client::registry::Registry;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time that a scraper gets to send its request, and again to take the answer. Local scrapers need a millisecond.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(2);
/// Stack of the endpoint's thread: formatting is shallow, and nebd counts its memory in MiB.
const STACK_BYTES: usize = 256 << 10;
/// Buckets of a latency histogram: 19 steps by a factor of about 2.15 from 10 µs to 10 s.
const LATENCY_BUCKETS: u16 = 19;

/// A running metrics endpoint. Dropping it stops the thread and closes the socket.
#[derive(Debug)]
pub struct Endpoint {
    place: Place,
    /// The listening socket, to wake the thread by.
    socket: OwnedFd,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Serves `registry` at a TCP address; port 0 takes a free one.
///
/// # Errors
/// If the address can not be listened on.
pub fn serve(listen: SocketAddr, registry: Registry) -> io::Result<Endpoint> {
    serve_on(TcpListener::bind(listen)?, registry)
}

/// As [`serve`], on a socket that was bound before.
///
/// # Errors
/// If there is no thread left.
pub fn serve_on(listener: TcpListener, registry: Registry) -> io::Result<Endpoint> {
    let (place, socket) = (Place::Tcp(listener.local_addr()?), listener.try_clone()?.into());
    Endpoint::start((place, socket), registry, move || {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(SCRAPE_TIMEOUT))?;
        stream.set_write_timeout(Some(SCRAPE_TIMEOUT))?;
        Ok(stream)
    })
}

/// Serves `registry` on a unix socket (`curl --unix-socket PATH http://localhost/metrics`). A socket file that is
/// already there is replaced.
///
/// # Errors
/// If the path can not be listened on.
pub fn serve_unix(path: &Path, registry: Registry) -> io::Result<Endpoint> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let (place, socket) = (Place::Unix(path.to_owned()), listener.try_clone()?.into());
    Endpoint::start((place, socket), registry, move || {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(SCRAPE_TIMEOUT))?;
        stream.set_write_timeout(Some(SCRAPE_TIMEOUT))?;
        Ok(stream)
    })
}

/// An empty latency histogram, in seconds, with the buckets that all of Spline uses: 10 µs to 10 s.
pub fn latency_histogram() -> Histogram {
    Histogram::new(exponential_buckets_range(10e-6, 10.0, LATENCY_BUCKETS))
}

impl Endpoint {
    fn start<S: io::Read + io::Write>(
        (place, socket): (Place, OwnedFd),
        registry: Registry,
        accept: impl Fn() -> io::Result<S> + Send + 'static,
    ) -> io::Result<Self> {
        let stopping = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stopping);
        let thread =
            std::thread::Builder::new().name("metrics".into()).stack_size(STACK_BYTES).spawn(move || {
                loop {
                    let accepted = accept();
                    if seen.load(Ordering::Acquire) {
                        return;
                    }
                    match accepted {
                        // A scraper that goes away in the middle is its own affair.
                        Ok(stream) => drop(http::answer(stream, &registry)),
                        Err(e) => {
                            tracing::warn!(error = %e, "metrics endpoint could not accept a connection");
                            // Out of descriptors, most likely: do not spin until some are free again.
                            std::thread::sleep(Duration::from_millis(100));
                        }
                    }
                }
            })?;
        Ok(Self { place, socket, stopping, thread: Some(thread) })
    }

    /// Where it listens, if on TCP.
    pub fn address(&self) -> Option<SocketAddr> {
        match self.place {
            Place::Tcp(address) => Some(address),
            Place::Unix(_) => None,
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // Wakes the thread out of accept, without a connection, which this process may not be allowed to make any more; if that
        // fails, the thread must not be waited for.
        let woken = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both).is_ok();
        if let Place::Unix(path) = &self.place {
            let _ = std::fs::remove_file(path);
        }
        if let (true, Some(thread)) = (woken, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;

    fn registry() -> Registry {
        let mut registry = Registry::default();
        let counter: Counter = Counter::default();
        counter.inc_by(7);
        registry.register("spline_example", "an example", counter);
        registry
    }

    fn ask(mut stream: impl Read + Write, request: &str) -> String {
        stream.write_all(request.as_bytes()).expect("sends");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answers");
        answer
    }

    #[test]
    fn a_scrape_over_tcp_and_unix_sees_the_values() {
        let tcp = serve("127.0.0.1:0".parse().expect("address"), registry()).expect("serves");
        let stream = TcpStream::connect(tcp.address().expect("tcp")).expect("connects");
        let answer = ask(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("spline_example_total 7\n") && answer.ends_with("# EOF\n"), "{answer}");

        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("m.sock");
        let unix = serve_unix(&path, registry()).expect("serves");
        let answer = ask(UnixStream::connect(&path).expect("connects"), "GET /metrics HTTP/1.0\r\n\r\n");
        assert!(answer.contains("spline_example_total 7\n"), "{answer}");
        drop(unix);
        assert!(!path.exists());
    }

    #[test]
    fn dropping_frees_the_port() {
        let endpoint = serve("127.0.0.1:0".parse().expect("address"), registry()).expect("serves");
        let address = endpoint.address().expect("tcp");
        drop(endpoint);
        serve(address, registry()).expect("the port is free again");
    }

    #[test]
    fn a_silent_scraper_does_not_hold_the_endpoint_for_ever() {
        let endpoint = serve("127.0.0.1:0".parse().expect("address"), registry()).expect("serves");
        let address = endpoint.address().expect("tcp");
        let _silent = TcpStream::connect(address).expect("connects");
        let answer = ask(TcpStream::connect(address).expect("connects"), "GET /metrics HTTP/1.1\r\n\r\n");
        assert!(answer.contains("200 OK"), "{answer}");
    }
}
