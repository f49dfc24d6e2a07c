//! The gateway: one process per host that owns volume sessions, splits requests and may be replaced at any moment.
//!
//! Called by `spline-gateway` and by `spline dev`.
//!
//! Knows: links (what nebd says and hears), sessions, engines, limits per volume.
//! Must never know: NBD, vhost-user, who is in front of a link; raft, how chunkservers store.
//!
//! Modules in the order in which a request meets them: [`config`] → `listener` → `link` → `registry` → `session` →
//! `admission` → [`engine`] (`split` → `fanout` for the cluster) and back through `link`; `buffer` and `shared` hold payloads,
//! `metrics` counts, `service` answers operators, [`upgrade`] replaces the process, `watchdog` tells systemd that all of it gets on.
//! [`local`] is the file engine without a link, for whoever measures what a link costs.

#![deny(unsafe_code)]

pub mod config;
pub mod engine;
pub mod local;
pub mod upgrade;

mod admission;
mod buffer;
mod fanout;
mod gateway;
mod link;
mod listener;
mod metrics;
mod registry;
mod service;
mod session;
mod shared;
mod split;
mod watchdog;

pub use config::{Config, FileIo};
pub use gateway::Gateway;
pub use upgrade::{Launch, Predecessor};
