//! What the operations share: the ledger, the soft state and the configuration.
//!
//! Locks are held for moments and never across an await. Where several are needed, the order is: state (through the
//! ledger), leases, topology, transfers.

use crate::config::Config;
use crate::lease::Leases;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::topology::Topology;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Shared by all operations of one metadata server.
pub struct Context {
    /// Replicated state.
    pub ledger: Ledger,
    /// How it runs.
    pub config: Config,
    /// What it counts.
    pub metrics: Metrics,
    leases: Mutex<Leases>,
    topology: Mutex<Topology>,
}

impl Context {
    /// Soft state starts empty, now.
    pub fn new(ledger: Ledger, config: Config, metrics: Metrics) -> Self {
        let now = Instant::now();
        let leases = Mutex::new(Leases::new(config.lease, now));
        let topology = Mutex::new(Topology::new(config.down_after, now));
        Self { ledger, config, metrics, leases, topology }
    }

    /// The leases, locked.
    pub fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What chunkservers reported, locked.
    pub fn topology(&self) -> MutexGuard<'_, Topology> {
        self.topology.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wall clock, milliseconds since 1970.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
