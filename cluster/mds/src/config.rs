//! Configuration of the metadata server: one TOML file, unknown keys refused.
//!
//! Called by `main` and by whoever starts an [`Mds`](crate::Mds) in its own process. Knows: defaults (design §13) and
//! the limits between the values. Must never know: flags, files.

use crate::json::duration;
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Most copysets of a cluster: a heartbeat lists those of one server, and must stay far below gRPC's 4 MiB.
pub const COPYSETS_MAX: u32 = 10_000;
/// Most replicas of a copyset; a write waits for the majority of them.
pub const REPLICAS_MAX: u32 = 7;

/// What an operator may set. Durations are written as text: `10s`, `500ms`, `10min`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory of the tables and the raft log; created when absent.
    pub data_dir: PathBuf,
    /// Where the gRPC services listen; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Number of copysets, created once when enough chunkservers have registered.
    pub copysets: u32,
    /// Replicas of each copyset, in distinct zones.
    pub replicas: u32,
    /// Most other chunkservers with which one chunkserver shares copysets (bounds how many pairs of failures lose
    /// data; more makes rebuilding faster).
    pub scatter_width: u32,
    /// Chunkservers to wait for before copysets are created; 0 means as many as `replicas`. Set it to the size of
    /// the cluster, so that the first ones to register do not get everything.
    pub initial_chunkservers: u32,
    /// A gateway that does not renew for this long may lose its session to another.
    #[serde(with = "duration")]
    pub lease: Duration,
    /// How often chunkservers report.
    #[serde(with = "duration")]
    pub heartbeat: Duration,
    /// A chunkserver that is silent for this long is down.
    #[serde(with = "duration")]
    pub down_after: Duration,
    /// Replicas of a chunkserver that is down for this long are rebuilt elsewhere.
    #[serde(with = "duration")]
    pub rebuild_after: Duration,
    /// Most operators (replica replacements and leader transfers) in flight at once.
    pub operators_max: u32,
    /// Where metrics are served over HTTP; absent: nowhere.
    pub metrics_listen: Option<SocketAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/spline/mds"),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 6700)),
            copysets: 100,
            replicas: 3,
            scatter_width: 12,
            initial_chunkservers: 0,
            lease: Duration::from_secs(10),
            heartbeat: Duration::from_secs(1),
            down_after: Duration::from_secs(5),
            rebuild_after: Duration::from_secs(600),
            operators_max: 16,
            metrics_listen: None,
        }
    }
}

impl Config {
    /// Checks the values against their limits and each other.
    ///
    /// # Errors
    /// A message that names the first value that does not fit and what would.
    pub fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: u32, low: u32, high: u32| match value {
            v if (low..=high).contains(&v) => Ok(()),
            v => Err(format!("{name} must be from {low} to {high}: {name}={v}")),
        };
        within("copysets", self.copysets, 1, COPYSETS_MAX)?;
        within("replicas", self.replicas, 1, REPLICAS_MAX)?;
        within("scatter_width", self.scatter_width, self.replicas.saturating_sub(1).max(1), 10_000)?;
        within("operators_max", self.operators_max, 1, 1000)?;
        let lowest = Duration::from_millis(100);
        for (name, value) in [("lease", self.lease), ("heartbeat", self.heartbeat)] {
            if value < lowest {
                return Err(format!("{name} must be at least 100ms: {name}={value:?}"));
            }
        }
        if self.down_after < self.heartbeat * 2 {
            return Err(format!(
                "down_after must be at least two heartbeats: down_after={:?} heartbeat={:?}",
                self.down_after, self.heartbeat
            ));
        }
        if self.rebuild_after < self.down_after {
            return Err(format!(
                "rebuild_after must not be less than down_after: rebuild_after={:?} down_after={:?}",
                self.rebuild_after, self.down_after
            ));
        }
        Ok(())
    }

    /// Chunkservers that must have registered before copysets are created.
    pub fn chunkservers_needed(&self) -> usize {
        self.initial_chunkservers.max(self.replicas) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_within_the_limits_and_survive_the_round_trip() {
        let config = Config::default();
        assert_eq!(config.check(), Ok(()));
        let text = serde_json::to_string(&config).expect("serialises");
        assert!(text.contains(r#""rebuild_after":"10min""#), "{text}");
        assert_eq!(serde_json::from_str::<Config>(&text).expect("parses"), config);
        assert!(serde_json::from_str::<Config>(r#"{"copyset":1}"#).is_err(), "unknown keys are refused");
    }

    #[test]
    fn values_that_do_not_fit_are_named() {
        let refuse = |change: fn(&mut Config), name: &str| {
            let mut config = Config::default();
            change(&mut config);
            let message = config.check().expect_err(name);
            assert!(message.contains(name), "{message}");
        };
        refuse(|c| c.copysets = 0, "copysets");
        refuse(|c| c.replicas = 9, "replicas");
        refuse(|c| c.scatter_width = 1, "scatter_width");
        refuse(|c| c.lease = Duration::ZERO, "lease");
        refuse(|c| c.down_after = Duration::from_secs(1), "down_after");
        refuse(|c| c.rebuild_after = Duration::from_secs(1), "rebuild_after");
    }
}
