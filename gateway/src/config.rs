//! What a gateway is told at start: one TOML file, unknown keys refused, every key with a default.
//!
//! Called by `main` and by whoever starts a gateway as a library. Must not know: how the file is found or printed.

use serde::{Deserialize, Deserializer, Serialize};
use spline_process::config::{duration, size};
use spline_types::ByteSize;
use spline_types::limits::{REQUEST_BYTES_MAX, VOLUME_INFLIGHT_BYTES, VOLUME_INFLIGHT_REQUESTS};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Most requests that one volume may have in flight, whatever the file says; each costs a few hundred bytes.
const INFLIGHT_REQUESTS_MAX: usize = 65_536;
/// Most bytes that one volume may have in flight, whatever the file says (4 GiB): they are resident memory.
const INFLIGHT_BYTES_MAX: u64 = 4 << 30;
/// Longest drain: a supervisor has killed the process long before.
const DRAIN_LIMIT_MAX: Duration = Duration::from_mins(10);
/// Longest time for each part of an upgrade: meanwhile no volume can be opened or closed.
const UPGRADE_LIMIT_MAX: Duration = Duration::from_mins(5);
/// Longest time for which a session outlives its last link: it keeps others from opening the volume.
const SESSION_GRACE_MAX: Duration = Duration::from_hours(1);

/// How the file engine reaches its files.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileIo {
    /// Past the page cache where the request is aligned to 4096 bytes, through it otherwise.
    #[default]
    Direct,
    /// Always through the page cache.
    Buffered,
}

/// Configuration of a gateway.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Stable name under which sessions are opened; a restarted gateway takes its own sessions over at once.
    /// Empty: host name and link socket.
    pub id: String,
    /// Unix socket on which links are accepted.
    pub link_socket: PathBuf,
    /// TCP address of the administration service (gRPC); empty: none, and nobody can ask for an upgrade.
    #[serde(deserialize_with = "address_or_empty", serialize_with = "address_or_none")]
    pub admin_listen: Option<SocketAddr>,
    /// TCP address of the metrics page; empty: none.
    #[serde(deserialize_with = "address_or_empty", serialize_with = "address_or_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// Addresses of the metadata servers, `host:port`; empty: this gateway serves files only.
    pub mds: Vec<String>,
    /// Directories under which `file:/abs/path` volumes may lie; empty: no file volumes.
    pub file_roots: Vec<PathBuf>,
    /// How files are read and written.
    pub file_io: FileIo,
    /// Whether the threads that serve files stay on their processors while few requests are under way, so that nebd comes to them.
    pub stay_on_processor: bool,
    /// How long a shutdown waits for running requests.
    #[serde(with = "duration")]
    pub drain_limit: Duration,
    /// How long the new process of an upgrade may take until it is ready to serve; then it is killed, and nothing has changed.
    /// Under systemd a reload has as long as `TimeoutStartSec`, guests' last requests included: this is to be well below.
    #[serde(with = "duration")]
    pub upgrade_limit: Duration,
    /// How long a session outlives its last link: a restarted nebd finds it open.
    #[serde(with = "duration")]
    pub session_grace: Duration,
    /// Requests of one volume in flight; more wait in their sockets.
    pub inflight_requests: usize,
    /// Bytes of one volume in flight; more wait in their sockets.
    #[serde(with = "size")]
    pub inflight_bytes: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            id: String::new(),
            link_socket: "/run/spline/gateway.sock".into(),
            admin_listen: Some(SocketAddr::from(([127, 0, 0, 1], 6710))),
            metrics_listen: None,
            mds: vec!["127.0.0.1:6700".into()],
            file_roots: Vec::new(),
            file_io: FileIo::default(),
            stay_on_processor: true,
            drain_limit: Duration::from_secs(2),
            upgrade_limit: Duration::from_secs(20),
            session_grace: Duration::from_secs(10),
            inflight_requests: VOLUME_INFLIGHT_REQUESTS,
            inflight_bytes: ByteSize(VOLUME_INFLIGHT_BYTES),
        }
    }
}

impl Config {
    /// Checks what the types can not.
    ///
    /// # Errors
    /// A message that names the key, its value and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        let within = |key: &str, value: u64, low: u64, high: u64| match (low..=high).contains(&value) {
            true => Ok(()),
            false => Err(format!("value is out of range: key={key} value={value} allowed={low}..={high}")),
        };
        within("inflight_requests", self.inflight_requests as u64, 1, INFLIGHT_REQUESTS_MAX as u64)?;
        within("inflight_bytes", self.inflight_bytes.0, REQUEST_BYTES_MAX.into(), INFLIGHT_BYTES_MAX)?;
        for (key, value, most) in [
            ("drain_limit", self.drain_limit, DRAIN_LIMIT_MAX),
            ("upgrade_limit", self.upgrade_limit, UPGRADE_LIMIT_MAX),
            ("session_grace", self.session_grace, SESSION_GRACE_MAX),
        ] {
            if value > most {
                return Err(format!("value is out of range: key={key} value={value:?} limit={most:?}"));
            }
        }
        if let Some(root) = self.file_roots.iter().find(|root| !root.is_absolute()) {
            return Err(format!(
                "file root is not an absolute path: key=file_roots value={}",
                root.display()
            ));
        }
        if !self.link_socket.is_absolute() {
            let value = self.link_socket.display();
            return Err(format!("socket is not an absolute path: key=link_socket value={value}"));
        }
        Ok(())
    }

    /// The id under which sessions are opened: as configured, or host name and link socket.
    pub fn effective_id(&self) -> String {
        if !self.id.is_empty() {
            return self.id.clone();
        }
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        format!("{host}:{}", self.link_socket.display())
    }
}

fn address_or_empty<'de, D: Deserializer<'de>>(input: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(input)?;
    if text.is_empty() {
        return Ok(None);
    }
    let refuse = |_| {
        let message =
            format!("not an address: value={text:?}; write host:port with a numeric host, or \"\" for none");
        serde::de::Error::custom(message)
    };
    text.parse().map(Some).map_err(refuse)
}

fn address_or_none<S: serde::Serializer>(address: &Option<SocketAddr>, out: S) -> Result<S::Ok, S::Error> {
    match address {
        Some(address) => out.collect_str(address),
        None => out.serialize_str(""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_config_is_read_back() {
        let config =
            Config { file_roots: vec!["/srv/images".into()], admin_listen: None, ..Config::default() };
        let text = toml::to_string(&config).expect("prints");
        assert_eq!(toml::from_str::<Config>(&text).expect("reads"), config);
        assert_eq!(toml::from_str::<Config>("").expect("reads"), Config::default());
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused() {
        for text in ["no_such_key = 1", "admin_listen = \"nowhere\"", "file_io = \"magic\""] {
            assert!(toml::from_str::<Config>(text).is_err(), "{text}");
        }
        for text in [
            "inflight_requests = 0",
            "inflight_bytes = \"4KiB\"",
            "session_grace = \"2h\"",
            "file_roots = [\"relative\"]",
            "link_socket = \"relative.sock\"",
        ] {
            let config: Config = toml::from_str(text).expect("reads");
            assert!(config.check().is_err(), "{text}");
        }
    }
}
