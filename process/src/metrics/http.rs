//! As much of HTTP/1.1 (RFC 9112) as a metrics scraper needs: one request, one answer, close.
//!
//! Called by the endpoint's thread. The request is foreign input: its head is limited and only its first line is
//! looked at. Must not know sockets.

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

/// Longest request head, bytes; Prometheus sends about 300.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Time for a whole request head, however slowly its bytes drip in; scrapers send it at once.
const HEAD_TIME_MAX: Duration = Duration::from_secs(2);

/// Reads one request and answers it.
///
/// # Errors
/// Those of the stream, time-outs included.
pub fn answer(mut stream: impl Read + Write, registry: &Registry) -> io::Result<()> {
    let head = read_head(&mut stream)?;
    let (status, kind, body) = match judge(&head) {
        Ok(()) => {
            let mut body = String::new();
            encode(&mut body, registry).map_err(io::Error::other)?;
            ("200 OK", "application/openmetrics-text; version=1.0.0; charset=utf-8", body)
        }
        Err(status) => (status, "text/plain; charset=utf-8", format!("{status}\n")),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    stream.flush()
}

/// Everything up to the empty line, or as much of it as is allowed.
fn read_head(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(1024);
    let mut part = [0; 1024];
    let deadline = Instant::now() + HEAD_TIME_MAX;
    while !head.windows(4).any(|four| four == b"\r\n\r\n") && head.len() < HEAD_BYTES_MAX {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match stream.read(&mut part)? {
            0 => break,
            count => head.extend_from_slice(&part[..count]),
        }
    }
    Ok(head)
}

/// Whether a request head asks for the metrics; else the status that says why not.
fn judge(head: &[u8]) -> Result<(), &'static str> {
    if !head.windows(4).any(|four| four == b"\r\n\r\n") {
        return Err(if head.len() >= HEAD_BYTES_MAX {
            "431 Request Header Fields Too Large"
        } else {
            "400 Bad Request"
        });
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    match (words.next(), words.next(), words.next()) {
        (Some(b"GET"), Some(target), Some(b"HTTP/1.1" | b"HTTP/1.0")) => {
            let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
            if path == b"/metrics" { Ok(()) } else { Err("404 Not Found") }
        }
        (Some(_), Some(_), Some(b"HTTP/1.1" | b"HTTP/1.0")) => Err("405 Method Not Allowed"),
        _ => Err("400 Bad Request"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_get_metrics_is_served() {
        assert_eq!(judge(b"GET /metrics HTTP/1.1\r\n\r\n"), Ok(()));
        assert_eq!(judge(b"GET /metrics?x=1 HTTP/1.0\r\nA: b\r\n\r\n"), Ok(()));
        assert_eq!(judge(b"GET / HTTP/1.1\r\n\r\n"), Err("404 Not Found"));
        assert_eq!(judge(b"POST /metrics HTTP/1.1\r\n\r\n"), Err("405 Method Not Allowed"));
        assert_eq!(judge(b"GET /metrics SPDY\r\n\r\n"), Err("400 Bad Request"));
        assert_eq!(judge(b"GET /metrics HTTP/1.1\r\n"), Err("400 Bad Request"));
        assert_eq!(judge(&[b'a'; HEAD_BYTES_MAX]), Err("431 Request Header Fields Too Large"));
    }

    proptest! {
        #[test]
        fn no_head_panics(head in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = judge(&head);
        }
    }
}
