//! What every process does at its start and end: read its config, log, offer metrics, say that it is ready, stop.
//!
//! Called by the `main.rs` of each process. No async runtime, so that nebd may use it.
//!
//! Knows: TOML, clap, tracing, OpenMetrics text, signals, what systemd passes to a process and wants to hear from it.
//! Must never know: what the process does, the cluster, any wire format.
//!
//! Modules in the order in which a start meets them: [`flags`] → [`config`] → [`logs`] → `open_files` → [`activation`] → [`listening`] → [`metrics`] →
//! [`ready`] → [`watchdog`] → [`signals`]; [`standard_streams`] of one that takes over.

#![deny(unsafe_code)]

pub mod activation;
pub mod config;
pub mod flags;
pub mod listening;
pub mod logs;
pub mod metrics;
mod open_files;
pub mod ready;
pub mod signals;
pub mod standard_streams;
pub mod watchdog;

pub use flags::CommonFlags;

/// The version that every process reports: the workspace's.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
