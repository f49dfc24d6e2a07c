//! Real processes for tests: finds the binaries, starts a cluster on loopback in a temporary directory, kills, stops
//! and restarts its parts, waits on conditions, shows logs when a test fails.
//!
//! Called by tests/{conformance,fault,e2e,bench}. Knows: flags and config files of the processes, `spline --json`,
//! the NBD protocol of a small client of its own. Must never know: the libraries of the processes.
//!
//! Modules in the order in which a test meets them: [`rig`] → [`cluster`] or [`dev`] → [`export`] → [`process`] → [`binaries`],
//! [`ports`]; [`proxy`] holds messages back, [`small_disk`] can be filled, [`metrics`] are read, [`nbd`] speaks to exports,
//! [`tool`] runs foreign clients, [`wait`] waits. [`vhost`] starts a nebd for a guest, [`storage_daemon`] what it is compared with,
//! [`virtio`] is the guest's driver; [`guest`] is a whole guest, [`qmp`] its machine; [`machine`] is a host with systemd. [`stalls`] tells how long clients waited,
//! [`rounds`] how often a test is to be repeated, how long and with which seed.

pub mod binaries;
pub mod cluster;
pub mod dev;
pub mod export;
pub mod guest;
pub mod machine;
pub mod metrics;
pub mod nbd;
pub mod ports;
pub mod process;
pub mod proxy;
pub mod qmp;
pub mod rig;
pub mod rounds;
pub mod small_disk;
pub mod stalls;
pub mod storage_daemon;
pub mod tool;
pub mod vhost;
pub mod virtio;
pub mod wait;

pub use cluster::{Cluster, Shape};
pub use dev::{DEV_LIMIT, Dev};
pub use export::Export;
pub use guest::Guest;
pub use machine::Machine;
pub use process::Process;
pub use qmp::Qmp;
pub use rig::Rig;
pub use rounds::{rounds, seed, soak_time};
pub use stalls::Stalls;
pub use storage_daemon::StorageDaemon;
pub use tempfile::tempdir;
pub use tool::Tool;
pub use vhost::VhostExport;
pub use wait::wait_until;
