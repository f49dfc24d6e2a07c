//! The config of one nebd: one volume, where its gateway is, where its clients come from.

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use spline_types::VolumeName;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// As in the TOML file; flags override it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The volume to serve.
    pub volume: String,
    /// The gateway's unix socket.
    pub gateway_socket: PathBuf,
    /// Name of the NBD export; empty: the volume's name. The empty name is always served too.
    pub export: String,
    /// Shown by `nbdinfo --list`.
    pub description: String,
    /// Unix socket for clients.
    pub listen_unix: Option<PathBuf>,
    /// TCP address for clients; loopback only, unless `allow_insecure`.
    pub listen_tcp: Option<SocketAddr>,
    /// Allow TCP clients from elsewhere: NBD without TLS is open to whoever reaches it.
    pub allow_insecure: bool,
    /// Refuse writes.
    pub read_only: bool,
    /// Take the volume from another gateway that serves it, once, at the start. A flag only: from a file, a nebd that is
    /// started again would take it again.
    #[serde(skip)]
    pub force: bool,
    /// TCP address for `GET /metrics`.
    pub metrics_listen: Option<SocketAddr>,
    /// Holds `nebd/<volume>.json` while the volume is served.
    pub runtime_dir: PathBuf,
    /// Clients at a time; more are turned away.
    pub max_connections: usize,
    /// Seconds that a client may take for its handshake.
    pub handshake_seconds: u64,
    /// Seconds after which the log names a client that neither reads its replies nor goes on with a write, if it holds more
    /// memory than its share and others wait for it. It is not cut: its guest may be paused.
    pub stuck_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            volume: String::new(),
            gateway_socket: "/run/spline/gateway.sock".into(),
            export: String::new(),
            description: String::new(),
            listen_unix: None,
            listen_tcp: None,
            allow_insecure: false,
            read_only: false,
            force: false,
            metrics_listen: None,
            runtime_dir: "/run/spline".into(),
            max_connections: 64,
            handshake_seconds: 10,
            stuck_seconds: 30,
        }
    }
}

/// Most clients that a config may allow: each may hold its share, see [`crate::budget`], beside what is common to all.
const CONNECTIONS_MAX: usize = 1024;
/// Longest export name or description, bytes: every client shows it whole.
const TEXT_BYTES_MAX: usize = 256;

/// What a checked config comes to.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The volume.
    pub volume: VolumeName,
    /// The export's name.
    pub export: String,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How long a client may take nothing while others wait for what it holds, before the log names it.
    pub stuck_limit: Duration,
}

impl Config {
    /// Checks what types can not.
    ///
    /// # Errors
    /// The first thing that is wrong, and what to do about it.
    pub fn check(&self) -> anyhow::Result<Checked> {
        if self.volume.is_empty() {
            bail!("no volume given: set volume, such as volume = \"disk0\"");
        }
        let volume: VolumeName = self.volume.parse().map_err(anyhow::Error::msg).context("volume")?;
        if self.listen_unix.is_none() && self.listen_tcp.is_none() {
            bail!("nowhere to listen: set listen_unix or listen_tcp");
        }
        if let Some(address) = self.listen_tcp
            && !address.ip().is_loopback()
            && !self.allow_insecure
        {
            bail!(
                "NBD here has neither encryption nor passwords, so TCP is for loopback only; use an SSH tunnel, or set \
                 allow_insecure on a network that you trust: listen_tcp={address}"
            );
        }
        for (key, text) in [("export", &self.export), ("description", &self.description)] {
            let plain = text.len() <= TEXT_BYTES_MAX && !text.chars().any(char::is_control);
            ensure!(plain, "{key} must have at most {TEXT_BYTES_MAX} bytes and no control characters");
        }
        ensure!(
            (1..=CONNECTIONS_MAX).contains(&self.max_connections),
            "max_connections must be 1 to {CONNECTIONS_MAX}: max_connections={}",
            self.max_connections
        );
        for (key, seconds) in
            [("handshake_seconds", self.handshake_seconds), ("stuck_seconds", self.stuck_seconds)]
        {
            ensure!((1..=3600).contains(&seconds), "{key} must be 1 to 3600: {key}={seconds}");
        }
        let export = if self.export.is_empty() { self.volume.clone() } else { self.export.clone() };
        let handshake_timeout = Duration::from_secs(self.handshake_seconds);
        Ok(Checked {
            volume,
            export,
            handshake_timeout,
            stuck_limit: Duration::from_secs(self.stuck_seconds),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_tcp_needs_a_decision() {
        let tcp = |text: &str| Config {
            volume: "disk0".into(),
            listen_tcp: Some(text.parse().expect("an address")),
            ..Config::default()
        };
        assert!(tcp("127.0.0.1:10809").check().is_ok());
        assert!(tcp("[::1]:10809").check().is_ok());
        let refused = tcp("0.0.0.0:10809").check().expect_err("open to everyone");
        assert!(refused.to_string().contains("allow_insecure"), "{refused}");
        assert!(Config { allow_insecure: true, ..tcp("0.0.0.0:10809") }.check().is_ok());
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let good = Config { volume: "a".into(), listen_unix: Some("/x".into()), ..Config::default() };
        assert_eq!(good.check().expect("good").export, "a");
        for (bad, word) in [
            (Config { volume: String::new(), ..good.clone() }, "volume"),
            (Config { volume: "../x".into(), ..good.clone() }, "volume"),
            (Config { listen_unix: None, ..good.clone() }, "listen"),
            (Config { export: "a\nb".into(), ..good.clone() }, "export"),
            (Config { max_connections: 0, ..good.clone() }, "max_connections"),
            (Config { handshake_seconds: 0, ..good.clone() }, "handshake_seconds"),
            (Config { stuck_seconds: 3601, ..good.clone() }, "stuck_seconds"),
        ] {
            let refused = bad.check().expect_err(word);
            assert!(format!("{refused:#}").contains(word), "{refused:#}");
        }
    }
}
